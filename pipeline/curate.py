"""Verb "curate": files of any kind to a table of clips that the next hops can rely on."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import Counter
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import ray
import ray.data

from pipeline import cluster, schema, sources, store
from pipeline.errors import ClipRejected, RejectReason
from pipeline.source_rows import SourceConfig, SourceRow
from pipeline.stages import caption, guard, probe, split
from pipeline.stages.reader import ClipReader

_SOURCES = pa.schema(
    [
        ("source_index", pa.int64()),
        ("source_uri", pa.string()),
        ("caption", pa.string()),
        ("caption_source", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("problem", pa.string()),
    ]
)
_GUARDED = pa.schema(
    [
        ("source_index", pa.int64()),
        *schema.CLIPS,
        *((name, pa.string()) for name in ("reject_reason", "reject_detail", "reject_stage")),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """What becomes a clip, and of what size.

    Attributes:
        files: how to read a manifest, and which files to use.
        fps: sampling rate; slower files keep their own.
        max_frames: longest clip, 1 + k * stride_frames.
        min_frames: shortest clip of a video; a still picture is one frame.
        stride_frames: the VAE's temporal stride.
        max_side_px: largest height or width; larger pictures are scaled down.
        max_pixels_px: largest height * width.
        stride_px: heights and widths become multiples of this: the VAE's stride times the transformer's patch.
        caption_fallback: what stands in for a missing caption: "filename", "empty" or "reject".
        max_source_pixels_px: larger files are rejected, not scaled: their frames would fill the memory.
        max_source_duration_s: longer files are rejected.
        timeout_s: clock limit of one file's probe.
        max_reject_fraction: the job fails when more than this share of the sources gives no clip (a copy of another
            source counts as good).
        rows_per_shard: clips in one file of the table.
        num_actors: probing processes; None is one a CPU. Does not change the result.
    """

    files: SourceConfig = dataclasses.field(default_factory=SourceConfig)
    fps: float = 8.0
    max_frames: int = 33
    min_frames: int = 9
    stride_frames: int = 4
    max_side_px: int = 96
    max_pixels_px: int = 96 * 96
    stride_px: int = 16
    caption_fallback: str = "filename"
    max_source_pixels_px: int = 4096 * 4096
    max_source_duration_s: float = 4 * 3600.0
    timeout_s: float = 20.0
    max_reject_fraction: float = 0.5
    rows_per_shard: int = 4096
    num_actors: int | None = None

    def __post_init__(self) -> None:
        for name in ("fps", "timeout_s", "max_source_duration_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        for name in ("min_frames", "stride_frames", "stride_px", "rows_per_shard", "max_source_pixels_px"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.max_frames < self.min_frames or (self.max_frames - 1) % self.stride_frames:
            rule = (
                f"must be 1 + a multiple of stride_frames={self.stride_frames}, at least min_frames={self.min_frames}"
            )
            raise ValueError(f"max_frames={self.max_frames}: {rule}")
        if self.max_side_px < self.stride_px or self.max_pixels_px < self.stride_px**2:
            limits = f"max_side_px={self.max_side_px}, max_pixels_px={self.max_pixels_px}"
            raise ValueError(f"{limits}: must have room for a square of stride_px={self.stride_px}")
        if self.caption_fallback not in caption.FALLBACKS:
            raise ValueError(f"caption_fallback={self.caption_fallback!r}: must be one of {caption.FALLBACKS}")
        if not 0 <= self.max_reject_fraction <= 1:
            raise ValueError(f"max_reject_fraction={self.max_reject_fraction}: must be in [0, 1]")
        if self.num_actors is not None and self.num_actors < 1:
            raise ValueError(f"num_actors={self.num_actors}: must be at least 1, or None")


def curate(config: CurateConfig, source: str, storage: str) -> store.Manifest:
    """Probe, cut, caption and identify all clips of a source; publishes CLIPS and REJECTS.

    Args:
        config: what becomes a clip.
        source: a folder, a manifest or a file: see `pipeline.sources.list_sources`. Workers must be able to open it.
        storage: root of all results.

    Raises:
        SourceError: nothing usable is there.
        TooManyRejectsError: too few sources give a clip; the rejects are written, nothing is published.
    """
    rows = sources.list_sources(source, config.files)
    settings = dataclasses.asdict(config)
    del settings["num_actors"]  # how, not what
    identity = {**settings, "source": store.absolute(source), "source_hash": sources.source_hash(rows)}
    name = PurePosixPath(store.absolute(source)).stem or "clips"
    produce = functools.partial(_produce, config, rows)
    return store.publish_once(cluster.resolve_storage(storage), "curate", name, identity, [], produce)


def _produce(config: CurateConfig, rows: list[SourceRow], folder: str) -> store.Produced:
    start_s = time.monotonic()
    clips, rejects = _first_of_each(_run_graph(config, rows))
    elapsed_s = time.monotonic() - start_s
    copies = [row for row in rejects if row["reject_reason"] == RejectReason.DUPLICATE]
    useful = {row["source_index"] for row in (*clips, *copies)}  # a copy is no fault of its source
    assert useful | {row["source_index"] for row in rejects} == set(range(len(rows))), "a source was lost"
    files = {
        "clips": _write(folder, "clips", [_only(clip, schema.CLIPS) for clip in clips], config.rows_per_shard),
        "rejects": _write(folder, "rejects", [guard.reject_row(row) for row in rejects], config.rows_per_shard),
    }
    reasons = Counter(str(row["reject_reason"]) for row in rejects)
    guard.check_rejects(len(rows) - len(useful), len(rows), reasons, config.max_reject_fraction, folder)
    measures = {
        "sources_per_s": len(rows) / elapsed_s,
        "clips_per_s": len(clips) / elapsed_s,
        "clip_frames": sum(clip["num_frames"] for clip in clips),
        **{f"rejects_{reason}": count for reason, count in sorted(reasons.items())},
    }
    counts = {"sources": len(rows), "clips": len(clips), "rejects": len(rejects)}
    return store.Produced(counts=counts, files=files, measures=measures)


def _run_graph(config: CurateConfig, rows: list[SourceRow]) -> list[dict[str, Any]]:
    """The guarded rows of all sources, in the sources' order."""
    cluster.connect()
    table = pa.Table.from_pylist(
        [{"source_index": index, **dataclasses.asdict(row)} for index, row in enumerate(rows)], schema=_SOURCES
    )
    num_actors = min(config.num_actors or int(ray.cluster_resources()["CPU"]), len(rows))
    rows_per_task = max(1, min(64, len(rows) // (4 * num_actors)))
    tasks = [table.slice(first, rows_per_task) for first in range(0, len(rows), rows_per_task)]
    guarded = ray.data.from_arrow(tasks).map_batches(
        CurateSources,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        fn_constructor_args=(config,),
    )
    found = [row for block in ray.get(guarded.to_arrow_refs()) for row in block.to_pylist()]
    return sorted(found, key=lambda row: row["source_index"])  # stable: clips of a source stay in their order


class CurateSources:
    """Worker: a table of sources to a table of guarded rows."""

    def __init__(self, config: CurateConfig) -> None:
        self._stages = curate_stages(config, ClipReader(timeout_s=config.timeout_s))

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Columns of `_SOURCES` in, columns of `_GUARDED` out."""
        rows = [after for before in batch.to_pylist() for after in guard.run_stages(before, self._stages)]
        return pa.Table.from_pylist(rows, schema=_GUARDED)


def curate_stages(config: CurateConfig, reader: ClipReader) -> list[tuple[str, guard.Stage]]:
    """The row functions from a source to its clips, with their names."""
    return [
        (
            "probe",
            functools.partial(
                probe.probe,
                inspect=reader.probe,
                max_source_pixels_px=config.max_source_pixels_px,
                max_source_duration_s=config.max_source_duration_s,
            ),
        ),
        ("caption", functools.partial(caption.caption, fallback=config.caption_fallback)),
        (
            "resize",
            functools.partial(
                split.resize,
                max_side_px=config.max_side_px,
                max_pixels_px=config.max_pixels_px,
                stride_px=config.stride_px,
            ),
        ),
        (
            "split",
            functools.partial(
                split.split,
                fps=config.fps,
                max_frames=config.max_frames,
                min_frames=config.min_frames,
                stride_frames=config.stride_frames,
            ),
        ),
        ("identify", split.identify),
    ]


def _first_of_each(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Clips and rejects; of clips with one id the first stays, the others are rejected."""
    clips: dict[str, dict[str, Any]] = {}
    rejects = []
    for row in rows:
        if row["reject_reason"] is not None:
            rejects.append(row)
        elif row["clip_id"] in clips:
            detail = f"{row['source_uri']}: the same frames as {clips[row['clip_id']]['source_uri']}"
            rejects.append(guard.reject(row, "dedupe", ClipRejected(RejectReason.DUPLICATE, detail)))
        else:
            clips[row["clip_id"]] = row
    return list(clips.values()), rejects


def _only(row: dict[str, Any], columns: pa.Schema) -> dict[str, Any]:
    return {name: row[name] for name in columns.names}


def _write(folder: str, table: str, rows: list[dict[str, Any]], rows_per_shard: int) -> list[str]:
    shards = [rows[first : first + rows_per_shard] for first in range(0, len(rows), rows_per_shard)]
    return [store.write_shard(folder, table, shard) for shard in shards]
