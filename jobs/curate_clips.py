"""Turn a folder, bucket or manifest of videos into CLIPS: probed, cut into windows, sized and captioned."""

from jobs import cli
from pipeline import chain, console, store


def job(hops: chain.Chain) -> store.Manifest:
    """Curate the source."""
    manifest = hops.clips()
    console.say("next: python jobs/train_vae.py with the same --source")
    return manifest


if __name__ == "__main__":
    cli.run(job, __doc__)
