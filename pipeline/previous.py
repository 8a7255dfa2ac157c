"""What an earlier result has already: a hop that is given one does only what is new, and what failed by chance."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import schema, store
from pipeline.errors import ManifestError, RejectReason
from pipeline.source_rows import SourceRow

BY_CHANCE = (
    RejectReason.UNREADABLE,  # a bucket that did not answer
    RejectReason.TIMEOUT,
    RejectReason.CRASHED,
    RejectReason.QUARANTINED,
    RejectReason.CAPTION_FAILED,
)
_ROWS_PER_FILE = 4096


def load(uri: str, verb: str, settings: Mapping[str, Any], ignore: Collection[str]) -> store.Manifest:
    """The earlier result, made with the same settings.

    Args:
        uri: its folder.
        verb: that it must be of.
        settings: of this call.
        ignore: names of settings that may differ.

    Raises:
        ManifestError: it is of another verb, or its rows would come out differently today.
    """
    found = store.Manifest.load(uri)
    if found.verb != verb:
        raise ManifestError(f"previous={uri!r}: is a result of {found.verb}, must be one of {verb}")
    old, new = found.config, store.plain(settings)
    differ = [key for key in sorted({*old, *new} - {*ignore}) if old.get(key) != new.get(key)]
    if differ:
        values = ", ".join(f"{key} was {old.get(key)} and is {new.get(key)}" for key in differ)
        raise ManifestError(f"previous={uri!r}: {values}; take the old values, or leave previous out")
    return found


@dataclasses.dataclass(kw_only=True)
class Reused:
    """Rows of an earlier result, in files of this one.

    Attributes:
        files: their names.
        num: sources or clips that they stand for.
        num_lost: of these, those that gave nothing.
        left: indices of what is still to be done, ascending.
    """

    files: list[str]
    num: int = 0
    num_lost: int = 0
    left: list[int] = dataclasses.field(default_factory=list)


def source_keys(rows: Sequence[SourceRow]) -> list[str]:
    """A hash of each row, which changes with its file, caption and bounds; equal rows are told apart by their order."""
    hashes = [store.content_hash(dataclasses.astuple(row)) for row in rows]
    seen: Counter[str] = Counter()
    keys = []
    for found in hashes:
        keys.append(f"{found}-{seen[found]}" if seen[found] else found)
        seen[found] += 1
    return keys


def reuse_outcomes(previous: store.Manifest, keys: Sequence[str], folder: str, clips_per_source: int) -> Reused:
    """Copy the OUTCOMES of sources that are still there and have not failed by chance, numbered anew.

    Args:
        previous: what `curate` published.
        keys: of the sources now; see `source_keys`.
        folder: of the new result.
        clips_per_source: positions of one source.
    """
    left = {key: index for index, key in enumerate(keys)}
    reused = Reused(files=[])
    for name in previous.files["outcomes"]:
        kept = []
        rows = store.read_shard(previous.uri, name).to_pylist()
        for key, group in itertools.groupby(rows, key=operator.itemgetter("source_key")):
            outcomes = list(group)
            if key not in left or any(row["reject_reason"] in BY_CHANCE for row in outcomes):
                continue
            del left[key]
            first = reused.num * clips_per_source
            kept += [
                {**row, "source_index": reused.num, "position": first + number} for number, row in enumerate(outcomes)
            ]
            reused.num += 1
            reused.num_lost += all(row["reject_reason"] for row in outcomes)
        if kept:
            reused.files.append(store.write_shard(folder, "outcomes", kept))
    reused.left = sorted(left.values())
    return reused


def reuse_latents(previous: store.Manifest, clips: store.Manifest, folder: str) -> Reused:
    """Copy the LATENTS of clips that are still there with the same caption.

    Args:
        previous: what `encode` published, with the same model.
        clips: what is to be encoded.
        folder: of the new result.
    """
    keys = np.concatenate([_keys(clips.uri, name) for name in clips.files["clips"]])
    reused, have = Reused(files=[]), []
    for name in previous.files["latents"]:
        found = _keys(previous.uri, name)
        wanted = np.isin(found, keys)
        if wanted.all():
            store.copy(store.join(previous.uri, name), store.join(folder, name))
            reused.files.append(name)
        elif wanted.any():
            rows = store.read_shard(previous.uri, name).filter(pa.array(wanted)).to_pylist()
            reused.files.append(store.write_shard(folder, "latents", rows, schema.LATENT_ROWS_PER_GROUP))
        reused.num += int(wanted.sum())
        have.append(found[wanted])
    reused.left = np.flatnonzero(~np.isin(keys, np.concatenate([*have, keys[:0]]))).tolist()
    return reused


def _keys(folder: str, name: str) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """64 bits of each row of CLIPS or LATENTS that change with the clip or its caption."""
    table = store.read_shard(folder, name, ["clip_id", "caption"])
    pairs = zip(table["clip_id"].to_pylist(), table["caption"].to_pylist(), strict=True)
    return np.array([int(store.content_hash(pair), 16) for pair in pairs], np.uint64)


def write_left(clips: store.Manifest, left: Sequence[int], folder: str) -> store.Manifest:
    """The clips of these indices as CLIPS in the new folder; a manifest that is not published."""
    files, rows, first, wanted = [], [], 0, np.array(left, np.int64)
    for name in clips.files["clips"]:
        table = store.read_shard(clips.uri, name)
        here = wanted[(wanted >= first) & (wanted < first + table.num_rows)] - first
        rows += table.take(pa.array(here)).to_pylist()
        first += table.num_rows
        while len(rows) >= _ROWS_PER_FILE:
            files.append(store.write_shard(folder, "clips", rows[:_ROWS_PER_FILE]))
            rows = rows[_ROWS_PER_FILE:]
    if rows:
        files.append(store.write_shard(folder, "clips", rows))
    return dataclasses.replace(clips, uri=folder, counts={"clips": len(left)}, files={"clips": files})
