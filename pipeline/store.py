"""Where results live: URIs through fsspec, content hashes, and folders that exist whole or not at all.

A hop writes under `<storage>/<verb>/<name>-<hash>` and publishes by one atomic `manifest.json`. The hash covers what
decides the result (verb, config, parents, schema and code version), so the same call is a lookup the second time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import __version__, schema
from pipeline.errors import ManifestError

MANIFEST = "manifest.json"
_END_BYTES = 1 << 20


def absolute(url: str) -> str:
    """The URL with a scheme, or the absolute local path, so that it means the same in every process and folder."""
    return url if "://" in url else str(Path(url).expanduser().absolute())


def join(url: str, *parts: str) -> str:
    """`url/part/...`, with one slash between."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec filesystem of a URL and the path inside it."""
    fs, path = fsspec.core.url_to_fs(url)
    return fs, path


def local_path(url: str, what: str) -> Path:
    """The local path of `url`.

    Raises:
        ValueError: the URL is not on this machine's file system; `what` names the thing that needs it.
    """
    fs, path = filesystem(url)
    if "file" not in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
        raise ValueError(f"{what} needs a local or shared folder, got {url!r}: pass a path")
    return Path(path)


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = filesystem(url)
    return bool(fs.exists(path))


def read_bytes(url: str) -> bytes:
    """A file's content."""
    fs, path = filesystem(url)
    return bytes(fs.cat_file(path))


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file: a reader sees the old content or the new, never a part."""
    fs, path = filesystem(url)
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    if fs.protocol == "file" or "file" in fs.protocol:
        temporary = f"{path}.{os.getpid()}.tmp"
        with Path(temporary).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    else:
        fs.pipe_file(path, data)  # object stores publish a whole object at once


def copy(url: str, to_url: str) -> None:
    """Copy a file, whole or not at all, within one file system."""
    fs, path = filesystem(url)
    to_fs, to_path = filesystem(to_url)
    if fs.protocol == to_fs.protocol and "file" not in fs.protocol:
        to_fs.cp_file(path, to_path)  # on the server's side
    else:
        write_bytes(to_url, read_bytes(url))


def read_json(url: str) -> Any:
    """A JSON file's value."""
    return json.loads(read_bytes(url))


def write_json(url: str, value: Any) -> None:
    """Write JSON whole, keys in the given order."""
    write_bytes(url, (json.dumps(value, indent=2) + "\n").encode())


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as it will be read again: lists for tuples."""
    return dict(json.loads(json.dumps(dict(config))))


def content_hash(value: Any, length: int = 16) -> str:
    """Hex SHA-256 of bytes, or of a JSON-able value whatever the order of its keys."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:length]


def write_shard(folder: str, table: str, rows: list[dict[str, Any]], rows_per_group: int = 64) -> str:
    """Write rows of a table of `pipeline.schema` as one Parquet file named by its content; returns the name.

    The same rows give the same name, so a task that is run twice writes one file.
    """
    data = schema.to_table(rows, schema.TABLES[table])
    sink = pa.BufferOutputStream()
    pq.write_table(data, sink, row_group_size=rows_per_group, compression="zstd")
    content = sink.getvalue().to_pybytes()
    name = f"{table}/{content_hash(content)}.parquet"
    write_bytes(join(folder, name), content)
    return name


def read_shard(folder: str, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """One Parquet file of a folder, whole."""
    fs, path = filesystem(join(folder, name))
    with fs.open(path) as file:
        return pq.read_table(file, columns=list(columns) if columns else None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Produced:
    """What a hop made.

    Attributes:
        counts: rows by kind, for the manifest ("clips", "rejects", ...).
        files: shard names by table, relative to the folder.
        measures: rates and other figures for `report.json`.
    """

    counts: dict[str, int]
    files: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    measures: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """One published result: what it is, what it came from and where its files are."""

    uri: str
    verb: str
    name: str
    hash: str
    parents: list[dict[str, str]]
    counts: dict[str, int]
    files: dict[str, list[str]]
    code_version: str
    config: dict[str, Any]

    @classmethod
    def load(cls, uri: str) -> Manifest:
        """Read a published folder's manifest.

        Raises:
            ManifestError: nothing was published there.
        """
        try:
            fields = read_json(join(uri, MANIFEST))
        except FileNotFoundError:
            raise ManifestError(
                f"{uri!r} holds no {MANIFEST}: give a folder that a job printed as its result"
            ) from None
        return cls(**{**fields, "uri": absolute(uri)})

    @classmethod
    def of_folder(cls, uri: str) -> Manifest:
        """A folder that no hop published, such as a model from elsewhere, to be named as a parent.

        Its hash tells the names and sizes of its files, and how each of them begins and ends.
        """
        fs, root = filesystem(absolute(uri))
        files = []
        for path in sorted(fs.find(root)):
            size = fs.size(path)
            ends = [fs.cat_file(path, start, start + _END_BYTES) for start in (0, max(0, size - _END_BYTES))]
            files.append([path[len(root) :], size, *map(content_hash, ends)])
        if not files:
            raise ManifestError(f"{uri!r} holds no files")
        name = root.rstrip("/").rsplit("/", 1)[-1]
        nothing: dict[str, Any] = {"parents": [], "counts": {}, "files": {}, "config": {}}
        digest = content_hash(files, length=12)
        return cls(uri=absolute(uri), verb="folder", name=name, hash=digest, code_version=__version__, **nothing)

    def read(self, table: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A whole table, shards in the manifest's order (rows sorted by the hop that wrote them)."""
        parts = [read_shard(self.uri, name, columns) for name in self.files.get(table, [])]
        if parts:
            return pa.concat_tables(parts)
        empty = schema.TABLES[table].empty_table()
        return empty.select(list(columns)) if columns else empty

    def slices(self, table: str, size: int) -> list[list[dict[str, Any]]]:
        """A table in parts of `size` rows (the last may be shorter), each a list of arguments of `read_slice`."""
        parts: list[list[dict[str, Any]]] = []
        room = 0
        for name in self.files.get(table, []):
            fs, path = filesystem(join(self.uri, name))
            with fs.open(path) as file:
                num_rows, first = pq.read_metadata(file).num_rows, 0
            while first < num_rows:
                if not room:
                    parts.append([])
                    room = size
                num = min(room, num_rows - first)
                parts[-1].append({"name": name, "first": first, "num": num})
                first, room = first + num, room - num
        return parts

    def read_slice(self, name: str, first: int, num: int) -> pa.Table:
        """Rows of one file; the row groups that hold them are read."""
        fs, path = filesystem(join(self.uri, name))
        with fs.open(path) as file, pq.ParquetFile(file) as parquet:
            starts = [0]
            for group in range(parquet.num_row_groups):
                starts.append(starts[-1] + parquet.metadata.row_group(group).num_rows)
            groups = [g for g in range(parquet.num_row_groups) if starts[g] < first + num and first < starts[g + 1]]
            return parquet.read_row_groups(groups).slice(first - starts[groups[0]], num)


def publish_once(
    storage: str,
    verb: str,
    name: str,
    config: Mapping[str, Any],
    parents: Sequence[Manifest],
    produce: Callable[[str], Produced],
) -> Manifest:
    """Run `produce(folder)` and publish what it made, or return what the same call published before.

    Args:
        storage: root URL of all results.
        verb: the hop, which is also its folder.
        name: a word for people, part of the folder's name.
        config: all that decides the result beside the parents; JSON-able.
        parents: the published inputs.
        produce: writes files below the folder it is given and says what it made.
    """
    settings = plain(config)
    identity = {
        "verb": verb,
        "config": settings,
        "parents": [parent.hash for parent in parents],
        "schema_version": schema.SCHEMA_VERSION,
        "code_version": __version__,
    }
    digest = content_hash(identity, length=12)
    uri = join(absolute(storage), verb, f"{name}-{digest}")
    if exists(join(uri, MANIFEST)):
        return Manifest.load(uri)
    start_s = time.monotonic()
    produced = produce(uri)
    manifest = Manifest(
        uri=uri,
        verb=verb,
        name=name,
        hash=digest,
        parents=[{"uri": parent.uri, "hash": parent.hash} for parent in parents],
        counts=produced.counts,
        files=produced.files,
        code_version=__version__,
        config=settings,
    )
    write_report(uri, {**produced.counts, **produced.measures}, time.monotonic() - start_s)
    write_json(join(uri, MANIFEST), dataclasses.asdict(manifest))
    return manifest


def write_report(uri: str, measures: Mapping[str, float], elapsed_s: float) -> None:
    """Write `report.json`: what was done, how long it took and this process's peak memory."""
    peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = {**measures, "elapsed_s": round(elapsed_s, 3), "driver_peak_memory_bytes": peak_bytes}
    write_json(join(uri, "report.json"), report)
