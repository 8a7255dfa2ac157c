"""Encode the source's clips and captions: LATENTS, what the transformer is trained on."""

from jobs import cli
from pipeline.chain import Chain

if __name__ == "__main__":
    cli.run(Chain.encoded, __doc__, "look at {uri}/report.html, then python jobs/train_video.py with the same --source")
