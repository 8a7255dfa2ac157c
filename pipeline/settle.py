"""From what became of each source to CLIPS and REJECTS: copies are found across the whole set."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline import near_duplicates, schema, store
from pipeline.errors import ClipRejected, RejectReason
from pipeline.stages import guard


@dataclasses.dataclass(kw_only=True)
class Settled:
    """Shards that were written, and what is in them.

    Attributes:
        files: shard names by table.
        reasons: rejects by reason.
        num_sources: with at least one row, clip or reject.
        num_clips: rows of CLIPS.
        num_frames: of all clips together.
    """

    files: dict[str, list[str]] = dataclasses.field(default_factory=lambda: {"clips": [], "rejects": []})
    reasons: Counter[str] = dataclasses.field(default_factory=Counter)
    num_sources: int = 0
    num_clips: int = 0
    num_frames: int = 0


def settle(folder: str, parts: Sequence[str], rows_per_shard: int, near_duplicate_bits: int | None) -> Settled:
    """Write CLIPS and REJECTS of OUTCOMES.

    Args:
        folder: of the result.
        parts: files of OUTCOMES, in the order of their rows.
        rows_per_shard: of CLIPS and REJECTS.
        near_duplicate_bits: of clips whose fingerprints differ in at most so many bits, the first is kept; None looks
            for exact copies only.
    """
    near = {}
    if near_duplicate_bits is not None:
        near = near_duplicates.near_duplicates([store.join(folder, part) for part in parts], near_duplicate_bits)
    copies = _Copies(_exact_copies(folder, parts), near)
    settled, source = Settled(), -1
    waiting: dict[str, list[guard.Row]] = {"clips": [], "rejects": []}
    for row in _rows(folder, parts):
        settled.num_sources += row["source_index"] != source
        source = row["source_index"]
        row = copies.judge(row)
        if row["reject_reason"] is None:
            settled.num_clips += 1
            settled.num_frames += row["num_frames"]
            waiting["clips"].append({name: row[name] for name in schema.CLIPS.names})
        else:
            settled.reasons[row["reject_reason"]] += 1
            waiting["rejects"].append(guard.reject_row(row))
        for table, rows in waiting.items():
            if len(rows) == rows_per_shard:
                settled.files[table].append(store.write_shard(folder, table, rows))
                rows.clear()
    for table, rows in waiting.items():
        if rows:
            settled.files[table].append(store.write_shard(folder, table, rows))
    return settled


def _rows(folder: str, parts: Sequence[str]) -> Iterator[guard.Row]:
    for part in parts:
        yield from store.read_shard(folder, part).to_pylist()


class _Copies:
    """Verdicts on copies, for rows in their order.

    Args:
        exact, near: position of a copy to the position of the clip that is kept, which comes before it.
    """

    def __init__(self, exact: dict[int, int], near: dict[int, int]) -> None:
        self._exact, self._near = exact, near
        self._originals = {*exact.values(), *near.values()}
        self._names: dict[int, str] = {}

    def judge(self, row: guard.Row) -> guard.Row:
        """The row, rejected where it is a copy."""
        position, name = row["position"], f"{row['source_uri']} at {row['start_s']} s"
        if position in self._originals:
            self._names[position] = name
        if position in self._exact:
            detail = f"{name}: the same frames as {self._names[self._exact[position]]}"
            return guard.reject(row, "dedupe", ClipRejected(RejectReason.DUPLICATE, detail))
        if position in self._near:
            detail = f"{name}: nearly the same as {self._names[self._near[position]]}"
            return guard.reject(row, "dedupe", ClipRejected(RejectReason.NEAR_DUPLICATE, detail))
        return row


def _exact_copies(folder: str, parts: Sequence[str]) -> dict[int, int]:
    """Positions of clips whose id came before, with the position of the first."""
    ids, positions = [], []
    for part in parts:
        table = store.read_shard(folder, part, ["position", "clip_id", "reject_reason"])
        clips = table.filter(table["reject_reason"].is_null())
        ids.append(np.array([int(clip_id, 16) for clip_id in clips["clip_id"].to_pylist()], np.uint64))
        positions.append(clips["position"].to_numpy())
    every_id, every_position = np.concatenate(ids), np.concatenate(positions)
    _, first, which = np.unique(every_id, return_index=True, return_inverse=True)
    (later,) = np.nonzero(first[which] != np.arange(len(every_id)))
    return dict(zip(every_position[later].tolist(), every_position[first[which[later]]].tolist(), strict=True))
