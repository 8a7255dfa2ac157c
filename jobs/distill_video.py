"""Distil a trained transformer into one that draws in a few steps without guidance; `--model` takes the teacher's run.

Without `--model` the recipe's transformer is trained first. In the toy world the student is scored at the end.
"""

from jobs import cli
from pipeline.chain import Chain

if __name__ == "__main__":
    cli.run(Chain.distill_and_show, __doc__, "python jobs/serve_video.py --model {uri}")
