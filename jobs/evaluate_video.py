"""Score a model on toy-world scenes that training never saw: colour, shape, size, direction, speed, background."""

from jobs import cli
from pipeline.chain import Chain

if __name__ == "__main__":
    cli.run(Chain.scores, __doc__, "look at {uri}/contact_sheet.png")
