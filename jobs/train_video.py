"""Train a video diffusion transformer, from video files to samples: every hop that is missing is run first."""

from jobs import cli
from pipeline import chain, store


def job(hops: chain.Chain) -> store.Manifest:
    """Train, sample and, in the toy world, score."""
    return hops.train_and_show()


if __name__ == "__main__":
    cli.run(job, __doc__)
