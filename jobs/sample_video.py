"""Make videos from prompts: MP4 files and a contact sheet. `--model` takes a run's folder, else one is trained."""

from jobs import cli
from pipeline import chain, console, store


def job(hops: chain.Chain) -> store.Manifest:
    """Sample."""
    manifest = hops.samples()
    console.say(f"look at: {manifest.uri}/contact_sheet.png")
    return manifest


if __name__ == "__main__":
    cli.run(job, __doc__)
