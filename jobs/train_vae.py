"""Train the causal video VAE on the source's clips."""

from jobs import cli
from pipeline import chain, console, store


def job(hops: chain.Chain) -> store.Manifest:
    """Train the VAE."""
    manifest = hops.vae()
    console.say("next: python jobs/encode_clips.py with the same --source")
    return manifest


if __name__ == "__main__":
    cli.run(job, __doc__)
