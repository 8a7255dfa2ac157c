"""Make videos from prompts: MP4 files and a contact sheet. `--model` takes a run's folder, else one is trained."""

from jobs import cli
from pipeline.chain import Chain

if __name__ == "__main__":
    cli.run(Chain.samples, __doc__, "look at {uri}/contact_sheet.png")
