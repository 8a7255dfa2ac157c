"""Curate and encode as a program that can be killed, which prints digests of what it made.

Run it by `python -m tests.pipeline.hops SOURCE STORAGE MODEL`.
"""

import hashlib
import sys
from pathlib import Path

from pipeline import cluster, store
from pipeline.curate import CurateConfig, curate
from pipeline.encode import EncodeConfig, encode


def digest(manifest):
    """Of a manifest, wherever its storage is."""
    root = manifest.uri.rsplit("/", 2)[0]
    return hashlib.sha256(Path(manifest.uri, store.MANIFEST).read_text().replace(root, "").encode()).hexdigest()


def main(source, storage, model_uri):
    cluster.connect()
    clips = curate(CurateConfig(max_side_px=64, num_actors=2), source, storage)
    model = store.Manifest.load(model_uri)
    config = EncodeConfig(num_actors=2, rows_per_shard=8)
    latents = encode(config, clips, model, store.join(model.uri, "model"), storage)
    sys.stdout.write(f"digest: {digest(clips)} {digest(latents)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
