"""The tables that hops exchange: columns, types and units. Pixels are never stored between hops.

Rows are conserved: every hop asserts that the rows it took in are the rows it put out plus its REJECTS.
"""

from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 2
LATENT_ROWS_PER_GROUP = 16  # small enough to read one sample without its neighbours

LINEAGE = pa.struct([("source_id", pa.string()), ("caption_source", pa.string())])

CLIPS = pa.schema(
    [
        ("clip_id", pa.string()),  # hash of the source file's content and the window
        ("source_uri", pa.string()),
        ("start_s", pa.float64()),  # first frame's presentation time
        ("end_s", pa.float64()),  # exclusive
        ("fps", pa.float32()),  # rate at which the clip is to be sampled
        ("num_frames", pa.int32()),  # at that rate; 1 for an image
        ("height_px", pa.int32()),  # size the clip is decoded to, a multiple of the model's stride
        ("width_px", pa.int32()),
        ("caption", pa.string()),
        ("scores", pa.map_(pa.string(), pa.float32())),
        ("lineage", LINEAGE),
    ]
)

LATENTS = pa.schema(
    [
        ("clip_id", pa.string()),
        ("latents", pa.large_binary()),  # float16, c t h w, normalised per channel: the VAE's mean
        ("latents_std", pa.large_binary()),  # its standard deviation, likewise; null where only the mean is kept
        ("latents_shape", pa.list_(pa.int32())),  # (c, t, h, w)
        ("text", pa.large_binary()),  # float16, s d, unpadded
        ("text_shape", pa.list_(pa.int32())),  # (s, d)
        ("caption", pa.string()),
        ("fps", pa.float32()),
        ("decode_backend", pa.string()),
        ("lineage", LINEAGE),
    ]
)

REJECTS = pa.schema(
    [
        ("what", pa.string()),  # the clip id, or the source's URI where there is no clip yet
        ("reason", pa.string()),  # a RejectReason
        ("detail", pa.string()),
        ("stage", pa.string()),
    ]
)

OUTCOMES = pa.schema(
    [
        ("position", pa.int64()),  # of the row among all, in the order of the sources and of the clips in them
        ("source_index", pa.int64()),
        ("source_key", pa.string()),  # hash of the source's row, which changes with its file, caption and bounds
        *CLIPS,
        ("fingerprint", pa.binary()),  # of what the clip shows, for near copies; or null
        ("reject_reason", pa.string()),  # null where it became a clip
        ("reject_detail", pa.string()),
        ("reject_stage", pa.string()),
    ]
)  # what became of sources, before copies are looked for: clips and rejects in one

TABLES = {"clips": CLIPS, "latents": LATENTS, "rejects": REJECTS, "outcomes": OUTCOMES}


def to_table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as an Arrow table of exactly `schema`.

    Raises:
        ValueError: a row lacks a column or has one too many.
    """
    names = set(schema.names)
    for row in rows:
        if set(row) != names:
            raise ValueError(f"row has columns {sorted(row)}, the table has {sorted(names)}")
    return pa.Table.from_pylist(rows, schema=schema)
