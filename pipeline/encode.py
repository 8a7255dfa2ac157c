"""Verb "encode": clips to latents and text embeddings, the only form in which training sees them."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import ray
from torch import Tensor

from pipeline import cluster, schema, store, tasks
from pipeline import previous as earlier
from pipeline.errors import ClipRejected, ManifestError, RejectReason
from pipeline.heap import keep_freed_memory
from pipeline.stages import guard, latents
from pipeline.stages.reader import ClipReader
from pipeline.stages.window import Clip
from video_dit.shapes import VideoShape
from video_dit.text import load_text_encoder
from video_dit.vae import VideoVAE

_HOW = ("timeout_s", "rows_per_shard", "max_pixels_per_batch", "max_reject_fraction", "num_gpus")
_TOTALS = ("num_latents", "num_rejects", "num_frames", "num_pixels", "decode_s", "encode_s")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How clips become latents.

    Attributes:
        rows_per_shard: clips in one task and one file.
        max_pixels_per_batch: t * h * w of the clips of one shape that go through the VAE together.
        keep_std: store the standard deviation that the VAE tells beside the mean; training then draws from both, a
            little regularisation for twice the size. Without it training sees the mean.
        timeout_s: clock limit for the decoding of one clip.
        max_reject_fraction: the job fails when more than this share of the clips is rejected.
        previous: folder of an earlier result of the same model; its latents are used again for clips that are still
            there with the same caption, and its rejects have another try.
        num_actors: most processes, each with its copy of the model; None is one a CPU, or one a GPU share with
            num_gpus. Does not change the result.
        num_gpus: GPUs (or a share of one) of each process; 0 runs the models on the CPU.
    """

    rows_per_shard: int = 128
    max_pixels_per_batch: int = 8 * 33 * 64 * 64
    keep_std: bool = False
    timeout_s: float = 20.0
    max_reject_fraction: float = 0.5
    previous: str | None = None
    num_actors: int | None = None
    num_gpus: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rows_per_shard", "max_pixels_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s={self.timeout_s}: must be above 0")
        if not 0 <= self.max_reject_fraction <= 1:
            raise ValueError(f"max_reject_fraction={self.max_reject_fraction}: must be in [0, 1]")
        if self.num_actors is not None and self.num_actors < 1:
            raise ValueError(f"num_actors={self.num_actors}: must be at least 1, or None")
        if self.num_gpus < 0:
            raise ValueError(f"num_gpus={self.num_gpus}: must not be negative")


def encode(
    config: EncodeConfig, clips: store.Manifest, model: store.Manifest, model_uri: str, storage: str
) -> store.Manifest:
    """Decode every clip and encode it and its caption; publishes LATENTS, in the order of the clips, and REJECTS.

    With `config.previous` the latents that are used again come first.

    Args:
        config: how.
        clips: what `curate` published.
        model: the published result that the model folder is a part of: the parent in the lineage.
        model_uri: the model folder, with `vae/` and `text_encoder/`.
        storage: root of all results.

    Raises:
        ManifestError: `clips` holds no clips, or `config.previous` is of other settings or another model.
        TooManyRejectsError: too many clips cannot be decoded; the rejects are written, nothing is published.
    """
    if not clips.counts.get("clips"):
        raise ManifestError(f"{clips.uri!r} holds no clips, only {clips.counts}: give what curate_clips printed")
    settings = dataclasses.asdict(config)
    del settings["num_actors"], settings["previous"]  # how, not what; and a parent
    identity = {**settings, "model": model_uri.removeprefix(model.uri).strip("/")}
    parents = [clips, model]
    if config.previous:
        parents.append(earlier.load(config.previous, "encode", identity, _HOW))
        if parents[-1].parents[1]["hash"] != model.hash:
            raise ManifestError(f"previous={config.previous!r}: made with another model; leave previous out")
    produce = functools.partial(_produce, config, clips, parents[2:], model_uri)
    return store.publish_once(cluster.resolve_storage(storage), "encode", clips.name, identity, parents, produce)


def _produce(
    config: EncodeConfig, clips: store.Manifest, previous: list[store.Manifest], model_uri: str, folder: str
) -> store.Produced:
    start_s = time.monotonic()
    reused, todo = earlier.Reused(files=[]), clips
    if previous:
        reused = earlier.reuse_latents(previous[0], clips, folder)
        todo = earlier.write_left(clips, reused.left, folder)
    num_clips = todo.counts["clips"]
    records = tasks.run_tasks(
        folder,
        [pa.Table.from_pylist(parts) for parts in todo.slices("clips", config.rows_per_shard)],
        functools.partial(EncodeShard, config, todo, model_uri, folder),
        label="encode",
        num_rows=num_clips,
        num_actors=_num_actors(config),
        num_gpus=config.num_gpus,
    )
    elapsed_s = time.monotonic() - start_s
    total = {name: sum(record[name] for record in records) for name in _TOTALS}
    num_latents, num_rejects = total["num_latents"], total["num_rejects"]
    assert num_clips == num_latents + num_rejects, f"{num_clips} clips, {num_latents} latents, {num_rejects} rejects"
    reasons = sum((Counter(record["reasons"]) for record in records), Counter[str]())
    guard.check_rejects(num_rejects, clips.counts["clips"], reasons, config.max_reject_fraction, folder)
    measures = {
        "clips_per_s": num_latents / elapsed_s,
        "frames_per_s": total["num_frames"] / elapsed_s,
        "pixels_per_s": total["num_pixels"] / elapsed_s,
        "decode_s": total["decode_s"],
        "encode_s": total["encode_s"],
        **{f"rejects_{reason}": count for reason, count in sorted(reasons.items())},
    }
    files = {
        table: [record["files"][table] for record in records if table in record["files"]]
        for table in ("latents", "rejects")
    }
    files["latents"] = reused.files + files["latents"]
    counts = {"clips": num_clips + reused.num, "latents": num_latents + reused.num, "rejects": num_rejects}
    assert counts["clips"] == clips.counts["clips"], f"{clips.counts['clips']} clips, {counts['clips']} accounted for"
    return store.Produced(counts=counts, files=files, measures={**measures, "reused": reused.num})


def _num_actors(config: EncodeConfig) -> int:
    num_cpus = cluster.num_cpus()
    by_gpu = int(ray.cluster_resources().get("GPU", 0) / config.num_gpus) if config.num_gpus else None
    return config.num_actors or by_gpu or num_cpus


class EncodeShard:
    """Worker: rows of CLIPS to one LATENTS file and one REJECTS file. Frames never leave it.

    The next group of clips is decoded (in the reader's own process) while the VAE works on the one before.
    """

    def __init__(self, config: EncodeConfig, clips: store.Manifest, model_uri: str, folder: str) -> None:
        self._config = config
        self._clips = clips
        self._folder = folder
        self._device = "cuda" if config.num_gpus else "cpu"
        keep_freed_memory()
        self._vae = VideoVAE.from_pretrained(model_uri, subfolder="vae").eval().to(self._device)
        self._text_encoder = load_text_encoder(model_uri, subfolder="text_encoder", device=self._device)
        self._reader = ClipReader(timeout_s=config.timeout_s)
        self._thread = ThreadPoolExecutor(max_workers=1)

    def __call__(self, parts: pa.Table, attempt: tasks.Attempt) -> tasks.Record:
        """The record of the task; rows of `Manifest.slices` in."""
        table = pa.concat_tables([self._clips.read_slice(**part) for part in parts.to_pylist()])
        rows = [{**row, "position": position} for position, row in enumerate(table.to_pylist())]
        texts = self._text_encoder([row["caption"] for row in rows])
        done: dict[int, guard.Row] = {}
        rejects: dict[int, guard.Row] = {}
        decode_s = encode_s = 0.0
        for group in self._decoded(latents.group_by_shape(rows, self._config.max_pixels_per_batch)):
            decode_s += group.seconds
            start_s = time.monotonic()
            done |= self._encode(group, texts, attempt)
            encode_s += time.monotonic() - start_s
            rejects |= {row["position"]: guard.reject_row(row) for row in group.rejects}
        files = {"latents": self._write("latents", done), "rejects": self._write("rejects", rejects)}
        used = [row for row in rows if row["position"] in done]
        return {
            "files": {name: file for name, file in files.items() if file},
            "num_rows": len(rows),
            "num_latents": len(done),
            "num_rejects": len(rejects),
            "num_frames": sum(row["num_frames"] for row in used),
            "num_pixels": sum(row["num_frames"] * row["height_px"] * row["width_px"] for row in used),
            "decode_s": decode_s,
            "encode_s": encode_s,
            "reasons": Counter(row["reason"] for row in rejects.values()),
        }

    def _encode(self, group: DecodedGroup, texts: Sequence[Tensor], attempt: tasks.Attempt) -> dict[int, guard.Row]:
        """Rows of LATENTS by position; a group that takes its process down is tried clip by clip."""
        if not group.clips:
            return {}
        try:
            with attempt.working_on(f"group {group.rows[0]['position']}"):
                return self._encode_together(group, texts)
        except ClipRejected:
            done: dict[int, guard.Row] = {}
            for alone in group.clip_by_clip():
                row = alone.rows[0]
                try:
                    with attempt.working_on(f"clip {row['position']}"):
                        done |= self._encode_together(alone, texts)
                except ClipRejected as verdict:
                    group.rejects.append(guard.reject(row, "encode", verdict))
            return done

    def _encode_together(self, group: DecodedGroup, texts: Sequence[Tensor]) -> dict[int, guard.Row]:
        videos = latents.encode_videos(self._vae, [clip.video_u8 for clip in group.clips], self._device)
        return {
            row["position"]: latents.latents_row(row, clip, latent, texts[row["position"]], self._config.keep_std)
            for row, clip, latent in zip(group.rows, group.clips, videos, strict=True)
        }

    def _write(self, table: str, rows: dict[int, guard.Row]) -> str | None:
        """One file of rows in the order of their positions; no file for no rows."""
        ordered = [rows[position] for position in sorted(rows)]
        return store.write_shard(self._folder, table, ordered, schema.LATENT_ROWS_PER_GROUP) if ordered else None

    def _decoded(self, groups: list[list[guard.Row]]) -> Iterator[DecodedGroup]:
        """Groups in order, decoded one ahead of the caller."""
        ahead = self._thread.submit(self._decode, groups[0])
        for following in groups[1:]:
            group, ahead = ahead, self._thread.submit(self._decode, following)
            yield group.result()
        yield ahead.result()

    def _decode(self, rows: list[guard.Row]) -> DecodedGroup:
        start_s = time.monotonic()
        group = DecodedGroup()
        for row in rows:
            try:
                group.clips.append(self._read(row))
                group.rows.append(row)
            except ClipRejected as verdict:
                group.rejects.append(guard.reject(row, "decode", verdict))
        group.seconds = time.monotonic() - start_s
        return group

    def _read(self, row: guard.Row) -> Clip:
        shape = VideoShape(row["num_frames"], row["height_px"], row["width_px"])
        try:
            shape.latent(self._vae.config.stride)
        except ValueError as error:
            raise ClipRejected(RejectReason.WRONG_FRAMES, f"does not fit this VAE: {error}") from error
        window = {name: row[name] for name in ("start_s", "end_s", "fps", "height_px", "width_px", "num_frames")}
        return self._reader.read(row["source_uri"], **window)


@dataclasses.dataclass
class DecodedGroup:
    """Clips of one shape beside their rows, the rows that could not be decoded, and the time it took in seconds."""

    rows: list[guard.Row] = dataclasses.field(default_factory=list)
    clips: list[Clip] = dataclasses.field(default_factory=list)
    rejects: list[guard.Row] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def clip_by_clip(self) -> Iterator[DecodedGroup]:
        """A group of each clip."""
        for row, clip in zip(self.rows, self.clips, strict=True):
            yield DecodedGroup(rows=[row], clips=[clip])
