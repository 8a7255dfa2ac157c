"""Turn a folder, bucket or manifest of videos into CLIPS: probed, cut into windows, sized and captioned."""

from jobs import cli
from pipeline.chain import Chain

if __name__ == "__main__":
    cli.run(Chain.clips, __doc__, "look at {uri}/report.html, then python jobs/train_vae.py with the same --source")
