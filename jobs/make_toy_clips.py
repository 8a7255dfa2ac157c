"""Make the toy world: moving shapes as MP4 files, each with its caption beside it."""

from jobs import cli
from pipeline.chain import Chain

if __name__ == "__main__":
    cli.run(Chain.toy_clips, __doc__, "python jobs/curate_clips.py --source {uri}/clips")
