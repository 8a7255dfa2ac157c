"""Encode the source's clips and captions: LATENTS, what the transformer is trained on."""

from jobs import cli
from pipeline import chain, console, store


def job(hops: chain.Chain) -> store.Manifest:
    """Encode the clips."""
    manifest = hops.latents()
    console.say("next: python jobs/train_video.py with the same --source")
    return manifest


if __name__ == "__main__":
    cli.run(job, __doc__)
