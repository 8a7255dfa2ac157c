"""Manifests: a table with a row for each file, in the layouts that video datasets come in."""

from __future__ import annotations

import ast
import csv
import io
import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import store
from pipeline.errors import SourceError
from pipeline.source_rows import Layout, SourceConfig, SourceRow, version_of
from pipeline.stages.files import embedded_uri, suffix

MANIFEST_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
METADATA = ("metadata.csv", "metadata.jsonl")  # of a folder, as the datasets library has them
LISTS = ("videos.txt", "prompts.txt")  # a file a line, and its caption on the same line of the other

Row = Mapping[str, Any]


def manifest_rows(url: str, config: SourceConfig) -> list[SourceRow]:
    """All rows of a manifest, in its order; rows that cannot be used have a problem.

    Raises:
        SourceError: the manifest cannot be read, has no rows, or no column names the file.
    """
    try:
        rows = _read(url)
    except (ValueError, OSError, csv.Error, pa.ArrowException) as error:
        raise SourceError(f"manifest {url!r} cannot be read: {error}") from error
    if not rows:
        raise SourceError(f"manifest {url!r} has no rows")
    layout = config.columns()
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    if not set(layout.path) & set(names):
        fix = "give path_column, or another layout"
        raise SourceError(
            f"manifest {url!r} needs one of the columns {layout.path} for the file; it has {names}: {fix}"
        )
    folder = config.media_folder or url.rsplit("/", 1)[0]
    return [one for number, row in enumerate(rows, 1) for one in _source_rows(url, folder, number, row, layout)]


def list_rows(folder: str, config: SourceConfig) -> list[SourceRow]:
    """The rows of a folder with `videos.txt` and `prompts.txt`.

    Raises:
        SourceError: the two have different numbers of lines.
    """
    videos, prompts = (store.read_bytes(store.join(folder, name)).decode("utf-8-sig").splitlines() for name in LISTS)
    if len(videos) != len(prompts):
        counts = f"{LISTS[0]} has {len(videos)} lines, {LISTS[1]} {len(prompts)}"
        raise SourceError(f"source {folder!r}: {counts}: there must be a caption for every file")
    rows = [{"video": video, "caption": prompt} for video, prompt in zip(videos, prompts, strict=True)]
    layout, url = SourceConfig().columns(), store.join(folder, LISTS[0])
    media_folder = config.media_folder or folder
    return [one for number, row in enumerate(rows, 1) for one in _source_rows(url, media_folder, number, row, layout)]


def _read(url: str) -> list[Row]:
    """Rows as dicts; a line of JSON that is no object has the key `problem` alone."""
    if suffix(url) == ".parquet":
        return _parquet_rows(url)
    data = store.read_bytes(url)
    text = data.decode("utf-8-sig")
    if suffix(url) == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    if suffix(url) == ".jsonl":
        return [_json_object(line) for line in text.splitlines() if line.strip()]
    rows = json.loads(text)
    if not isinstance(rows, list):
        raise ValueError(f"it holds a {type(rows).__name__}, not a list of objects")
    return [_object(row) for row in rows]


def _parquet_rows(url: str) -> list[Row]:
    """Rows of a Parquet file. Files whose bytes it holds (struct of bytes and path, as the datasets library writes
    videos and images) are not read: their column has a URI instead.
    """
    fs, path = store.filesystem(url)
    rows: list[Row] = []
    with fs.open(path) as file, pq.ParquetFile(file) as parquet:
        fields = {field.name: field.type for field in parquet.schema_arrow}
        files = [name for name, kind in fields.items() if _is_file(kind)]
        columns = [f"{name}.path" if name in files else name for name in fields]
        for group in range(parquet.num_row_groups):
            for row in parquet.read_row_group(group, columns=columns).to_pylist():
                named = {name: _embedded(parquet, group, url, len(rows), name, row[name]) for name in files}
                rows.append({**row, **named})
    return rows


def _is_file(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}


def _embedded(parquet: pq.ParquetFile, group: int, url: str, row: int, column: str, value: Row | None) -> str | None:
    """The path of a file that is elsewhere, or the URI of one that is here."""
    found = parquet.metadata.row_group(group)
    chunks = [found.column(i) for i in range(found.num_columns)]
    (held,) = [chunk.statistics for chunk in chunks if chunk.path_in_schema == f"{column}.bytes"]
    path = value["path"] if value else None
    if held is not None and held.null_count == found.num_rows:
        return path
    name = path or ("picture.png" if "image" in column else "video.mp4")
    return embedded_uri(url, column, row, PurePosixPath(name).name)


def _json_object(line: str) -> Row:
    try:
        return _object(json.loads(line))
    except ValueError as error:
        return {"problem": f"not JSON: {error}"}


def _object(row: Any) -> Row:
    return row if isinstance(row, dict) else {"problem": f"a {type(row).__name__}, not an object"}


def _source_rows(url: str, folder: str, number: int, row: Row, layout: Layout) -> list[SourceRow]:
    path = _first(row, layout.path)
    if not isinstance(path, str) or not path.strip():
        problem = row.get("problem", f"row {number} names no file")
        return [SourceRow(source_uri=f"{url}#{number}", problem=problem)]
    path = path.strip() + layout.path_suffix
    uri = path if "://" in path or PurePosixPath(path).is_absolute() else store.join(folder, path)
    captions = _first(row, layout.caption)
    try:
        if layout.many:
            parts = _parts(captions, _first(row, layout.start_s))
        else:
            times_s = (_seconds(_first(row, layout.start_s)), _seconds(_first(row, layout.end_s)))
            parts = [(next(iter(captions), None) if isinstance(captions, list) else captions, *times_s)]
    except (ValueError, TypeError, SyntaxError) as error:
        return [SourceRow(source_uri=uri, problem=f"row {number}: start_s or end_s: {error}")]
    version = version_of(uri)
    rows = []
    for caption, start_s, end_s in parts:
        text = str(caption).strip() if caption is not None else ""
        origin = "manifest" if text else None
        rows.append(
            SourceRow(
                source_uri=uri,
                caption=text or None,
                caption_source=origin,
                start_s=start_s,
                end_s=end_s,
                version=version,
            )
        )
    return rows


def _parts(captions: Any, times: Any) -> list[tuple[Any, float | None, float | None]]:
    """Several clips of one file, from lists that may be written out as text."""
    captions, times = (ast.literal_eval(value) if isinstance(value, str) else value for value in (captions, times))
    if not isinstance(captions, list) or not isinstance(times, list) or len(captions) != len(times) or not times:
        raise ValueError("captions and timestamps are not lists of equal length")
    return [(caption, _seconds(start), _seconds(end)) for caption, (start, end) in zip(captions, times, strict=True)]


def _first(row: Row, names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def _seconds(value: Any) -> float | None:
    """Of a number, or of h:mm:ss."""
    if value in (None, ""):
        return None
    parts = [float(part) for part in str(value).split(":")]
    return sum(part * 60**place for place, part in enumerate(reversed(parts)))
