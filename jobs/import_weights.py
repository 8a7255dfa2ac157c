"""Turn published checkpoints into a model folder: to sample and to serve.

    python jobs/import_weights.py --out models/wan --transformer Wan2.1-T2V-1.3B --vae Wan2.1-T2V-1.3B/Wan2.1_VAE.pth

A transformer is Wan 2.1's or 2.2's, text- or image-to-video, with the names of diffusers or of its own repository: a
safetensors file or folder, or a .pt or .pth file. Every tensor must fit; what is missing, unexpected or mis-shaped is
named. Nothing in a file is run as code. A diffusers pipeline folder needs no import: it is a model folder already.
"""

import sys

import tyro

from jobs import cli
from pipeline import console
from pipeline.import_weights import ImportConfig, import_weights, next_step


def job(config: ImportConfig) -> None:
    """Import, and say what was written and what can be done with it."""
    for part in import_weights(config):
        size = f"{part.num_parameters:,} parameters, {part.num_bytes:,} bytes"
        console.say(f"{part.part:<12} {size}, from {part.class_name}   {config.out}/{part.part}")
    print(f"next: {next_step(config.out)}")
    print(f"result: {config.out}")


if __name__ == "__main__":
    with cli.errors_in_one_line():
        job(tyro.cli(ImportConfig, args=sys.argv[1:], description=__doc__))
