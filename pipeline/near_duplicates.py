"""Near copies across a whole set of clips, by their fingerprints; no process sees more than a part of them.

Two fingerprints that differ in few bits are equal in at least one of the bands that they are cut into (pigeonhole), so
only clips with an equal band are compared: exact, in time that grows with the number of clips, not with its square.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray

from pipeline import cluster, store
from pipeline.stages.fingerprint import BITS_PER_FRAME, NUM_FRAMES

MAX_BITS = 6 * NUM_FRAMES - 1  # with more, bands would be too short to tell clips apart
_ROWS_PER_GROUP = 200_000
_COMPARED_AT_ONCE = 1024

_EDGES = pa.schema([("copy", pa.int64()), ("of", pa.int64()), ("equal", pa.int64())])


def near_duplicates(files: Sequence[str], max_bits: int) -> dict[int, int]:
    """Which clips are near copies of one before them.

    In order of position, a clip is a copy when its fingerprint differs in at most `max_bits` bits from that of an
    earlier clip that is none itself.

    Args:
        files: URLs of Parquet files with `position` and `fingerprint` (null: a copy of nothing).
        max_bits: 0 finds equal fingerprints.

    Returns:
        position of each copy, with that of the first clip that it copies.

    Raises:
        ValueError: max_bits is negative or above MAX_BITS.
    """
    check_bits(max_bits)
    cluster.connect()
    rows = ray.data.from_arrow([pa.table({"file": [file]}) for file in files])
    keyed = rows.map_batches(functools.partial(_bands, max_bits=max_bits), batch_size=None, batch_format="pyarrow")
    keyed = keyed.materialize()
    num_groups = max(1, keyed.count() // _ROWS_PER_GROUP)
    grouped = keyed.map_batches(
        functools.partial(_assign, num_groups=num_groups), batch_size=None, batch_format="pyarrow"
    ).groupby("group", num_partitions=min(num_groups, cluster.num_cpus()))
    edges = grouped.map_groups(functools.partial(_compare, max_bits=max_bits), batch_format="pyarrow")
    tables = [table for table in ray.get(edges.to_arrow_refs()) if table.num_rows]
    return _settle(pa.concat_tables(tables)) if tables else {}


def check_bits(max_bits: int) -> None:
    """Refuse a limit that cannot be held.

    Raises:
        ValueError: it is negative or above MAX_BITS.
    """
    if not 0 <= max_bits <= MAX_BITS:
        raise ValueError(f"near_duplicate_bits={max_bits}: must be in [0, {MAX_BITS}], or None")


def _bands(batch: pa.Table, max_bits: int) -> pa.Table:
    """Rows (band and its bits, position, fingerprint): one for each band of each clip."""
    parts = [store.read_shard("", file, ["position", "fingerprint"]) for file in batch["file"].to_pylist()]
    table = pa.concat_tables(parts)
    table = table.filter(table["fingerprint"].is_valid())
    prints, positions = _words(table["fingerprint"]), table["position"].to_numpy()
    keys = band_keys(prints, max_bits)
    return pa.table(
        {
            "key": keys.ravel(),
            "position": np.repeat(positions, keys.shape[1]),
            "fingerprint": table["fingerprint"].take(pa.array(np.repeat(np.arange(len(prints)), keys.shape[1]))),
        }
    )


def band_keys(prints: NDArray[np.uint64], max_bits: int) -> NDArray[np.uint64]:
    """(n, bands) numbers of band and bits, of fingerprints (n, NUM_FRAMES).

    Of `max_bits` different bits one frame has at most max_bits // NUM_FRAMES, and of its bands, one more than that, one
    has none.
    """
    per_frame = max_bits // NUM_FRAMES + 1
    width = BITS_PER_FRAME // per_frame
    keys = []
    for frame in range(NUM_FRAMES):
        for band in range(per_frame):
            bits = prints[:, frame] >> np.uint64(band * width)
            if width < BITS_PER_FRAME:
                bits = bits & np.uint64((1 << width) - 1)
            keys.append(_mixed(bits, frame * per_frame + band))
    return np.stack(keys, axis=1) if keys else np.empty((0, 0), np.uint64)


def _mixed(bits: NDArray[np.uint64], band: int) -> NDArray[np.uint64]:
    """A hash of band and bits (splitmix64): spreads them over groups. Two that collide are compared for nothing."""
    value = bits + np.uint64((band + 1) * 0x9E3779B97F4A7C15 % (1 << 64))
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _assign(table: pa.Table, num_groups: int) -> pa.Table:
    group = (table["key"].to_numpy() % np.uint64(num_groups)).astype(np.int64)
    return table.append_column("group", pa.array(group))


def _compare(table: pa.Table, max_bits: int) -> pa.Table:
    """Edges between the clips of a group that share a key; equal fingerprints are one clip here."""
    keys, positions, prints = table["key"].to_numpy(), table["position"].to_numpy(), _words(table["fingerprint"])
    order = np.lexsort((positions, keys))
    starts = np.flatnonzero(np.r_[True, np.diff(keys[order]) != 0])
    edges = [
        _edges(positions[members], prints[members], max_bits)
        for members in np.split(order, starts[1:])
        if len(members) > 1
    ]
    found = np.concatenate([np.empty((0, 3), np.int64), *edges])
    return pa.Table.from_arrays([pa.array(column) for column in found.T], schema=_EDGES)


def _edges(positions: NDArray[np.int64], prints: NDArray[np.uint64], max_bits: int) -> NDArray[np.int64]:
    """(m, 3) rows of `_EDGES`. Positions grow."""
    _, first, which = np.unique(prints, axis=0, return_index=True, return_inverse=True)
    equal = first[which] != np.arange(len(prints))
    pairs = [_rows(positions[equal], positions[first[which[equal]]], equal=1)]
    unique = np.sort(first)
    for start in range(0, len(unique), _COMPARED_AT_ONCE):
        some = unique[start : start + _COMPARED_AT_ONCE]
        bits = np.bitwise_count(prints[unique][None] ^ prints[some][:, None]).sum(axis=-1)
        here, there = np.nonzero((bits <= max_bits) & (unique[None] > some[:, None]))
        pairs.append(_rows(positions[unique[there]], positions[some[here]], equal=0))
    return np.concatenate(pairs)


def _rows(copies: NDArray[np.int64], of: NDArray[np.int64], equal: int) -> NDArray[np.int64]:
    return np.stack([copies, of, np.full_like(of, equal)], axis=1)


def _settle(edges: pa.Table) -> dict[int, int]:
    """The copies, of all pairs that are near."""
    pairs = np.unique(np.stack([edges[name].to_numpy() for name in _EDGES.names], axis=1), axis=0)
    copies: dict[int, int] = {}
    for later, earlier, equal in pairs.tolist():  # growing: whatever comes before is settled
        if equal:
            copies[later] = copies.get(earlier, earlier)
        elif later not in copies and earlier not in copies:
            copies[later] = earlier
    return copies


def _words(column: Any) -> NDArray[np.uint64]:
    """(n, NUM_FRAMES) of fingerprints."""
    return np.frombuffer(b"".join(column.to_pylist()), np.uint64).reshape(-1, NUM_FRAMES)
