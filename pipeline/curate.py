"""Verb "curate": files of any kind to a table of clips that the next hops can rely on."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import time
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from pipeline import cluster, near_duplicates, schema, settle, sources, store, tasks
from pipeline import previous as earlier
from pipeline.errors import ClipRejected
from pipeline.source_rows import SourceConfig, SourceRow
from pipeline.stages import caption, filters, guard, probe, scenes, score, split
from pipeline.stages.caption import CaptionConfig, caption_rows
from pipeline.stages.captioners import load_captioner
from pipeline.stages.filters import FilterConfig
from pipeline.stages.fingerprint import fingerprint
from pipeline.stages.reader import ClipReader

_SOURCES = pa.schema(
    [
        ("source_index", pa.int64()),
        ("source_key", pa.string()),
        ("source_uri", pa.string()),
        ("caption", pa.string()),
        ("caption_source", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("problem", pa.string()),
    ]
)
CLIPS_PER_SOURCE = 1 << 24  # of positions
_HOW = ("source", "source_hash", "files", "timeout_s", "max_reject_fraction", "rows_per_shard", "near_duplicate_bits")


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
        caption: what stands in for a missing caption.
        max_source_pixels_px: larger files are rejected, not scaled: their frames would fill the memory.
        max_source_duration_s: longer files are rejected.
        scene_threshold: no clip crosses a cut, a frame that changes so many times as much as its neighbours; lower
            finds more. None does not look for cuts, which takes a decoding of the whole file.
        hop_frames: from one window's start to the next one's, for windows that overlap; None is back to back.
        filters: limits on sources and clips.
        keep_scores: measure luma, contrast, sharpness and motion of each clip even where no filter asks for them.
        timeout_s: clock limit of one file's probe.
        max_reject_fraction: the job fails when more than this share of the sources gives no clip (a copy of another
            source counts as good).
        rows_per_shard: clips in one file of the table.
        near_duplicate_bits: of clips whose fingerprints differ in at most so many bits, the first is kept; None keeps
            all but exact copies.
        previous: folder of an earlier result with the same settings; what it found of sources that have not changed is
            used again, but for rejects that another try may save (unreadable, timeout, crashed, quarantined).
        num_actors: most probing processes; None is one a CPU. Does not change the result.
    """

    files: SourceConfig = dataclasses.field(default_factory=SourceConfig)
    fps: float = 8.0
    max_frames: int = 33
    min_frames: int = 9
    stride_frames: int = 4
    max_side_px: int = 96
    max_pixels_px: int = 96 * 96
    stride_px: int = 16
    caption: CaptionConfig = dataclasses.field(default_factory=CaptionConfig)
    max_source_pixels_px: int = 4096 * 4096
    max_source_duration_s: float = 4 * 3600.0
    scene_threshold: float | None = 3.0
    hop_frames: int | None = None
    filters: FilterConfig = dataclasses.field(default_factory=FilterConfig)
    keep_scores: bool = False
    timeout_s: float = 20.0
    max_reject_fraction: float = 0.5
    rows_per_shard: int = 4096
    near_duplicate_bits: int | None = None
    previous: str | None = None
    num_actors: int | None = None

    def __post_init__(self) -> None:
        for name in ("fps", "timeout_s", "max_source_duration_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        for name in ("min_frames", "stride_frames", "stride_px", "rows_per_shard", "max_source_pixels_px"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("hop_frames", "num_actors"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1, or None")
        if self.max_frames < self.min_frames or (self.max_frames - 1) % self.stride_frames:
            rule = (
                f"must be 1 + a multiple of stride_frames={self.stride_frames}, at least min_frames={self.min_frames}"
            )
            raise ValueError(f"max_frames={self.max_frames}: {rule}")
        if self.max_side_px < self.stride_px or self.max_pixels_px < self.stride_px**2:
            limits = f"max_side_px={self.max_side_px}, max_pixels_px={self.max_pixels_px}"
            raise ValueError(f"{limits}: must have room for a square of stride_px={self.stride_px}")
        if self.scene_threshold is not None and not self.scene_threshold > 1:
            raise ValueError(f"scene_threshold={self.scene_threshold}: must be above 1, or None")
        if self.near_duplicate_bits is not None:
            near_duplicates.check_bits(self.near_duplicate_bits)
        if not 0 <= self.max_reject_fraction <= 1:
            raise ValueError(f"max_reject_fraction={self.max_reject_fraction}: must be in [0, 1]")


def curate(config: CurateConfig, source: str, storage: str) -> store.Manifest:
    """Probe, cut, caption and identify all clips of a source; publishes CLIPS and REJECTS.

    Args:
        config: what becomes a clip.
        source: a folder, a manifest or a file: see `pipeline.sources.list_sources`. Workers must be able to open it.
        storage: root of all results.

    Raises:
        SourceError: nothing usable is there.
        ManifestError: `config.previous` is not a result with these settings.
        TooManyRejectsError: too few sources give a clip; the rejects are written, nothing is published.
    """
    rows = sources.list_sources(source, config.files)
    settings = dataclasses.asdict(config)
    del settings["num_actors"], settings["previous"]  # how, not what; and a parent
    identity = {**settings, "source": store.absolute(source), "source_hash": sources.source_hash(rows)}
    name = PurePosixPath(store.absolute(source)).stem or "clips"
    parents = [earlier.load(config.previous, "curate", identity, _HOW)] if config.previous else []
    produce = functools.partial(_produce, config, rows, parents)
    return store.publish_once(cluster.resolve_storage(storage), "curate", name, identity, parents, produce)


def _produce(
    config: CurateConfig, rows: list[SourceRow], previous: list[store.Manifest], folder: str
) -> store.Produced:
    start_s = time.monotonic()
    keys = earlier.source_keys(rows)
    reused = earlier.Reused(files=[], left=list(range(len(rows))))
    if previous:
        reused = earlier.reuse_outcomes(previous[0], keys, folder, CLIPS_PER_SOURCE)
    left = [{"source_key": keys[index], **dataclasses.asdict(rows[index])} for index in reused.left]
    records = tasks.run_tasks(
        folder,
        _tables(left, reused.num),
        functools.partial(CurateSources, config, folder),
        label="curate",
        num_rows=len(left),
        num_actors=config.num_actors or cluster.num_cpus(),
    )
    parts = reused.files + [record["files"]["outcomes"] for record in records]
    settled = settle.settle(folder, parts, config.rows_per_shard, config.near_duplicate_bits)
    num_lost = reused.num_lost + sum(record["num_rejects"] for record in records)  # a copy is no fault of its source
    assert settled.num_sources == len(rows), f"{len(rows)} sources, {settled.num_sources} of them have an outcome"
    guard.check_rejects(num_lost, len(rows), settled.reasons, config.max_reject_fraction, folder)
    elapsed_s = time.monotonic() - start_s
    measures = {
        "sources_per_s": len(rows) / elapsed_s,
        "clips_per_s": settled.num_clips / elapsed_s,
        "clip_frames": settled.num_frames,
        "reused": reused.num,
        **{f"rejects_{reason}": count for reason, count in sorted(settled.reasons.items())},
    }
    counts = {"sources": len(rows), "clips": settled.num_clips, "rejects": settled.reasons.total()}
    return store.Produced(counts=counts, files={**settled.files, "outcomes": parts}, measures=measures)


def _tables(rows: list[guard.Row], first_index: int) -> list[pa.Table]:
    """The sources in tasks: small enough to share out and to do again, large enough to be worth a record."""
    size = min(64, max(1, len(rows) // 32))
    found = [{"source_index": index, **row} for index, row in enumerate(rows, first_index)]
    return [pa.Table.from_pylist(found[first : first + size], schema=_SOURCES) for first in range(0, len(rows), size)]


class CurateSources:
    """Worker: a table of sources to a file of OUTCOMES."""

    def __init__(self, config: CurateConfig, folder: str) -> None:
        self._folder = folder
        self._caption = config.caption
        self._reader = ClipReader(timeout_s=config.timeout_s)
        self._stages = curate_stages(config, self._reader)
        self._captioner = load_captioner(config.caption) if config.caption.needs_frames else None

    def __call__(self, sources: pa.Table, attempt: tasks.Attempt) -> tasks.Record:
        """The record of the task; columns of `_SOURCES` in."""
        rows = [row for source in sources.to_pylist() for row in self._curate(source, attempt)]
        if self._captioner is not None:
            rows = caption_rows(
                rows,
                read=self._reader.read,
                captioner=self._captioner,
                num_concurrent=self._caption.num_concurrent if self._caption.url else 1,  # a model takes one at a time
            )
        outcomes, num_lost = [], 0
        for _, group in itertools.groupby(rows, key=operator.itemgetter("source_index")):
            of_one = list(group)
            num_lost += all(row["reject_reason"] for row in of_one)
            outcomes += [_outcome(row, number) for number, row in enumerate(of_one)]
        name = store.write_shard(self._folder, "outcomes", outcomes)
        return {"files": {"outcomes": name}, "num_rows": sources.num_rows, "num_rejects": num_lost}

    def _curate(self, source: guard.Row, attempt: tasks.Attempt) -> list[guard.Row]:
        try:
            with attempt.working_on(str(source["source_index"])):
                return guard.run_stages(source, self._stages)
        except ClipRejected as verdict:
            return [guard.reject(source, "curate", verdict)]


def _outcome(row: guard.Row, number: int) -> guard.Row:
    position = row["source_index"] * CLIPS_PER_SOURCE + number
    assert number < CLIPS_PER_SOURCE, f"{row['source_uri']} gives more than {CLIPS_PER_SOURCE} clips"
    return {name: row.get(name) for name in schema.OUTCOMES.names} | {"position": position}


def curate_stages(config: CurateConfig, reader: ClipReader) -> list[tuple[str, guard.Stage]]:
    """The row functions from a source to its clips, with their names."""
    near = config.near_duplicate_bits is not None
    stages: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
        (
            "probe",
            probe.probe,
            {"inspect": reader.probe, **_fields(config, "max_source_pixels_px", "max_source_duration_s")},
        ),
        ("filter", filters.check_source, {"config": config.filters}),
        ("caption", caption.caption, _fields(config.caption, "fallback", "template", "recaption")),
        ("resize", split.resize, _fields(config, "max_side_px", "max_pixels_px", "stride_px")),
        ("scenes", scenes.find_cuts, {"read": reader.read, "threshold": config.scene_threshold}),
        ("split", split.split, _fields(config, "fps", "max_frames", "min_frames", "stride_frames", "hop_frames")),
    ]
    if config.keep_scores or config.filters.needs_scores or near:
        stages += [
            ("score", score.score, {"read": reader.read, "fingerprint": fingerprint if near else None}),
            ("filter", filters.check_scores, {"config": config.filters}),
        ]
    stages.append(("identify", split.identify, {}))
    return [(name, functools.partial(stage, **settings)) for name, stage, settings in stages]


def _fields(config: CurateConfig | CaptionConfig, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}
