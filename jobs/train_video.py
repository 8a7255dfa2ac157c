"""Train a video diffusion transformer, from video files to samples: every hop that is missing is run first."""

from jobs import cli
from pipeline.chain import Chain

if __name__ == "__main__":
    cli.run(Chain.train_and_show, __doc__, "python jobs/serve_video.py --model {uri}")
