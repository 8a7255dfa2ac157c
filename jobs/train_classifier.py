"""Train a classifier of noisy latents on the toy world's attributes, to lead a model that is told nothing.

Prints how often it is right on held-out clips, by noise level; `report.json` of the result has the same.
"""

from jobs import cli
from pipeline.chain import Chain

if __name__ == "__main__":
    cli.run(Chain.classifier, __doc__, "python jobs/evaluate_video.py --evaluate.classifier {uri}")
