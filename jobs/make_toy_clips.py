"""Make the toy world: moving shapes as MP4 files, each with its caption beside it."""

from jobs import cli
from pipeline import chain, console, store


def job(hops: chain.Chain) -> store.Manifest:
    """Make the clips."""
    manifest = hops.toy_clips()
    console.say(f"next: python jobs/curate_clips.py --source {manifest.uri}/clips")
    return manifest


if __name__ == "__main__":
    cli.run(job, __doc__)
