"""Train the causal video VAE on the source's clips."""

from jobs import cli
from pipeline.chain import Chain

if __name__ == "__main__":
    cli.run(Chain.vae, __doc__, "python jobs/encode_clips.py with the same --source")
