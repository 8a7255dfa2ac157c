"""What a published result holds, in figures: read shard by shard, so that memory does not grow with the table."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import store
from pipeline.errors import ManifestError

NUM_BINS = 24
EXAMPLES_PER_REASON = 5

Values = dict[str, NDArray[np.float64]]
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Histogram:
    """How often a figure lies between two edges.

    Attributes:
        name: of the figure, with its unit.
        low, high: the smallest and the largest value.
        edges: one more than counts.
        counts: by bin; the last one has its upper edge inside.
        mean: of all values.
    """

    name: str
    low: float
    high: float
    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    mean: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A result in figures.

    Attributes:
        manifest: of the result.
        measures: its report.json: rates and times.
        sizes: rows by height x width, the commonest first.
        caption_sources: rows by where their caption comes from.
        histograms: of every figure that the rows have.
        reasons: rejects by reason, the commonest first.
        examples: a few rows of REJECTS for each reason.
        lineage: this result and what it came from, up to the source; each {"verb", "name", "hash", "uri"}.
    """

    manifest: store.Manifest
    measures: Mapping[str, float]
    sizes: list[tuple[str, int]]
    caption_sources: list[tuple[str, int]]
    histograms: list[Histogram]
    reasons: list[tuple[str, int]]
    examples: Mapping[str, list[Row]]
    lineage: list[Mapping[str, str]]

    @property
    def num_rows(self) -> int:
        """Rows that went in."""
        return next(iter(self.manifest.counts.values()), 0)


def make_report(manifest: store.Manifest) -> Report:
    """The figures of what `curate` or `encode` published; of other results, counts and lineage."""
    table = kept_table(manifest)
    sizes: Counter[str] = Counter()
    captions: Counter[str] = Counter()
    for part in shards(manifest, table, _COLUMNS.get(table, ())):
        captions.update(pc.struct_field(part["lineage"], "caption_source").to_pylist())
        if table == "clips":
            pairs = zip(part["height_px"].to_pylist(), part["width_px"].to_pylist(), strict=True)
            sizes.update(f"{height} x {width}" for height, width in pairs)
        else:
            sizes.update(" x ".join(map(str, shape[1:])) for shape in part["latents_shape"].to_pylist())
    reasons: Counter[str] = Counter()
    examples: dict[str, list[Row]] = {}
    for part in shards(manifest, "rejects"):
        for row in part.to_pylist():
            reasons[row["reason"]] += 1
            if reasons[row["reason"]] <= EXAMPLES_PER_REASON:
                examples.setdefault(row["reason"], []).append(row)
    report = store.join(manifest.uri, "report.json")
    return Report(
        manifest=manifest,
        measures=store.read_json(report) if store.exists(report) else {},
        sizes=sizes.most_common(12),
        caption_sources=captions.most_common(),
        histograms=_histograms(manifest, table),
        reasons=reasons.most_common(),
        examples=examples,
        lineage=list(_lineage(manifest)),
    )


def kept_table(manifest: store.Manifest) -> str:
    """The table that a reader of the result wants: "clips", "latents" or none ("")."""
    return next((name for name in ("latents", "clips") if name in manifest.files), "")


def shards(manifest: store.Manifest, table: str, columns: Sequence[str] = ()) -> Iterator[pa.Table]:
    """The files of a table, one after another, perhaps some of their columns."""
    for name in manifest.files.get(table, []):
        yield store.read_shard(manifest.uri, name, columns or None)


def spread(manifest: store.Manifest, table: str, num: int, columns: Sequence[str] = ()) -> list[Row]:
    """`num` rows, evenly spaced over a table; all, if it has no more."""
    parts = manifest.slices(table, 1 << 62)
    places = [(part["name"], row) for slices in parts for part in slices for row in (part["first"], part["num"])]
    sizes = [size for _, size in places[1::2]]
    total = sum(sizes)
    wanted = np.unique(np.linspace(0, total - 1, min(num, total)).round().astype(int)) if total else np.empty(0, int)
    rows, first = [], 0
    for name, size in zip([name for name, _ in places[::2]], sizes, strict=True):
        here = wanted[(wanted >= first) & (wanted < first + size)] - first
        if len(here):
            rows += store.read_shard(manifest.uri, name, columns or None).take(pa.array(here)).to_pylist()
        first += size
    return rows


# --- histograms -----------------------------------------------------------------------------------------------------

_COLUMNS = {
    "clips": ("start_s", "end_s", "fps", "num_frames", "height_px", "width_px", "caption", "scores", "lineage"),
    "latents": ("latents_shape", "text_shape", "fps", "caption", "lineage"),
}


def _histograms(manifest: store.Manifest, table: str) -> list[Histogram]:
    """Two passes: ranges, then counts."""
    if not table:
        return []
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    for values in _values(manifest, table):
        for name, found in values.items():
            low[name] = min(low.get(name, np.inf), found.min())
            high[name] = max(high.get(name, -np.inf), found.max())
    edges = {name: _edges(low[name], high[name]) for name in low}
    counts = {name: np.zeros(len(edges[name]) - 1, np.int64) for name in low}
    sums = dict.fromkeys(low, 0.0)
    for values in _values(manifest, table):
        for name, found in values.items():
            counts[name] += np.histogram(found, edges[name])[0]
            sums[name] += found.sum()
    means = {name: sums[name] / counts[name].sum() for name in low}
    return [Histogram(name, low[name], high[name], edges[name], counts[name], means[name]) for name in low]


def _edges(low: float, high: float) -> NDArray[np.float64]:
    """Bins that hold both; whole numbers that are few have one each."""
    if low == int(low) and high == int(high) and high - low < NUM_BINS:
        return np.arange(low, high + 2) - 0.5
    return np.linspace(low, high, NUM_BINS + 1)


def _values(manifest: store.Manifest, table: str) -> Iterator[Values]:
    for part in shards(manifest, table, _COLUMNS[table]):
        values = _clip_values(part) if table == "clips" else _latent_values(part)
        values["caption, words"] = np.array([len(text.split()) for text in part["caption"].to_pylist()], float)
        yield {name: found for name, found in values.items() if len(found)}


def _clip_values(part: pa.Table) -> Values:
    def column(name: str) -> NDArray[np.float64]:
        return np.asarray(part[name].to_numpy(), float)

    values = {
        "duration, s": column("end_s") - column("start_s"),
        "frames": column("num_frames"),
        "rate, fps": column("fps"),
        "width / height": column("width_px") / column("height_px"),
        "pixels of a frame": column("width_px") * column("height_px"),
    }
    scores = part["scores"].combine_chunks()
    names, figures = scores.keys, scores.items
    for name in sorted(pc.unique(names).to_pylist()):
        values[name] = np.asarray(figures.filter(pc.equal(names, name)).to_numpy(zero_copy_only=False), float)
    return values


def _latent_values(part: pa.Table) -> Values:
    shapes = np.array(part["latents_shape"].to_pylist(), float).reshape(-1, 4)
    return {
        "latent frames": shapes[:, 1],
        "latent positions (t h w)": shapes[:, 1:].prod(axis=1),
        "text, tokens": np.array([shape[0] for shape in part["text_shape"].to_pylist()], float),
    }


def _lineage(manifest: store.Manifest) -> Iterator[Mapping[str, str]]:
    """The result, then what it came from, each once."""
    waiting, seen = [manifest], set()
    while waiting:
        found = waiting.pop(0)
        if found.uri in seen:
            continue
        seen.add(found.uri)
        yield {"verb": found.verb, "name": found.name, "hash": found.hash, "uri": found.uri}
        if found.verb == "curate":
            source = {"hash": found.config["source_hash"], "uri": found.config["source"]}
            yield {"verb": "source", "name": found.name, **source}
        for parent in found.parents:
            try:
                waiting.append(store.Manifest.load(parent["uri"]))
            except ManifestError:  # moved or deleted: its hash is all that is known
                yield {"verb": "gone", "name": "", **parent}
