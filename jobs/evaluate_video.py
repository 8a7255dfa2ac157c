"""Score a model on toy-world scenes that training never saw: colour, shape, size, direction, speed, background."""

from jobs import cli
from pipeline import chain, console, evaluate, store


def job(hops: chain.Chain) -> store.Manifest:
    """Generate held-out scenes and measure them."""
    manifest = hops.scores()
    console.score_table(evaluate.read_scores(manifest))
    return manifest


if __name__ == "__main__":
    cli.run(job, __doc__)
