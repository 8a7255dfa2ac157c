"""What the user has: a folder of videos and pictures with captions beside them, or a manifest with a row for each."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from pipeline import store
from pipeline.errors import SourceError
from pipeline.stages.container import IMAGE_SUFFIXES, VIDEO_SUFFIXES, suffix

MEDIA_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES
MANIFEST_SUFFIXES = (".jsonl", ".csv", ".parquet")
PATH_COLUMNS = ("video", "path", "file", "video_path", "uri")
CAPTION_COLUMNS = ("caption", "text", "prompt", "cap")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceRow:
    """One file that may become clips.

    Attributes:
        source_uri: absolute path or URL; for a manifest row that names no file, the manifest and the row's number.
        caption: as given, or None.
        caption_source: "sidecar", "manifest" or None.
        start_s: first moment to use, or None for the file's start.
        end_s: exclusive, or None for the file's end.
        version: size and time (or tag) of the file, so that a changed file is another source.
        problem: why the row cannot be used, or None.
    """

    source_uri: str
    caption: str | None = None
    caption_source: str | None = None
    start_s: float | None = None
    end_s: float | None = None
    version: str = ""
    problem: str | None = None


def list_sources(url: str) -> list[SourceRow]:
    """All sources of a folder (recursive), a manifest (.jsonl, .csv, .parquet) or one media file, in a fixed order.

    Captions stand beside a file as `<stem>.txt` or `<stem>.json` (key caption or text), or in a manifest's column.
    Names that begin with a dot are left out.

    Raises:
        SourceError: the URL is not there, holds nothing usable, or lacks a column.
    """
    url = store.absolute(url)
    try:
        fs, path = store.filesystem(url)
        found = fs.exists(path)
    except (ValueError, ImportError) as error:
        raise SourceError(f"source {url!r} cannot be opened: {error}") from error
    if not found:
        raise SourceError(
            f"source {url!r} is not there: give a folder of videos, or a .jsonl, .csv or .parquet manifest"
        )
    if suffix(url) in MANIFEST_SUFFIXES and fs.isfile(path):
        rows = [_manifest_row(url, number, row) for number, row in enumerate(_read_manifest(url), start=1)]
        if not rows:
            raise SourceError(f"manifest {url!r} has no rows")
        return rows
    return _folder_rows(url)


def source_hash(rows: list[SourceRow]) -> str:
    """A hash that changes when a file, a caption or a bound changes."""
    return store.content_hash([dataclasses.astuple(row) for row in rows])


# --- folders --------------------------------------------------------------------------------------------------------


def _folder_rows(url: str) -> list[SourceRow]:
    fs, path = store.filesystem(url)
    files: dict[str, Mapping[str, Any]] = fs.find(path, detail=True) if fs.isdir(path) else {path: fs.info(path)}
    seen = {name: info for name, info in files.items() if not PurePosixPath(name).name.startswith(".")}
    media = sorted(name for name in seen if suffix(name) in MEDIA_SUFFIXES)
    if not media:
        kinds = sorted({suffix(name) or PurePosixPath(name).name for name in seen})[:10]
        known = " ".join(sorted(MEDIA_SUFFIXES))
        raise SourceError(f"source {url!r} holds no video or picture ({known}); found: {' '.join(kinds) or 'nothing'}")
    is_local = "://" not in url
    rows = []
    for name in media:
        uri = name if is_local else fs.unstrip_protocol(name)
        caption, problem = _sidecar(uri, name, files)
        rows.append(
            SourceRow(
                source_uri=uri,
                caption=caption,
                caption_source=None if caption is None else "sidecar",
                version=_version(seen[name]),
                problem=problem,
            )
        )
    return rows


def _sidecar(uri: str, name: str, files: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The caption beside a file, and what is wrong with it."""
    stem = len(suffix(name))
    if name[:-stem] + ".txt" in files:
        return store.read_bytes(uri[:-stem] + ".txt").decode(errors="replace").strip() or None, None
    if name[:-stem] + ".json" not in files:
        return None, None
    try:
        fields = store.read_json(uri[:-stem] + ".json")
    except ValueError as error:
        return None, f"its sidecar .json cannot be read: {error}"
    if not isinstance(fields, dict):
        return None, f"its sidecar .json holds a {type(fields).__name__}, not an object"
    text = fields.get("caption", fields.get("text"))
    return (text.strip() or None, None) if isinstance(text, str) else (None, None)


def _version(info: Mapping[str, Any]) -> str:
    stamp = next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if key in info), "")
    return f"{info.get('size')} {stamp}"


# --- manifests ------------------------------------------------------------------------------------------------------


def _read_manifest(url: str) -> Iterator[dict[str, Any]]:
    """Rows as dicts; a line of JSON that is no object has the key `problem` alone.

    Raises:
        SourceError: no column names the file, or the manifest cannot be read.
    """
    data = store.read_bytes(url)
    try:
        if suffix(url) == ".parquet":
            rows = pq.read_table(io.BytesIO(data)).to_pylist()
        elif suffix(url) == ".csv":
            rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))))
        else:
            rows = [_json_object(line) for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except (ValueError, OSError, csv.Error) as error:
        raise SourceError(f"manifest {url!r} cannot be read: {error}") from error
    columns = list(dict.fromkeys(str(name) for row in rows for name in row))
    if rows and not set(PATH_COLUMNS) & set(columns):
        raise SourceError(f"manifest {url!r} needs one of the columns {PATH_COLUMNS} for the file; it has {columns}")
    return iter(rows)


def _json_object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        return {"problem": f"not JSON: {error}"}
    return row if isinstance(row, dict) else {"problem": f"a {type(row).__name__}, not an object"}


def _manifest_row(url: str, number: int, row: dict[str, Any]) -> SourceRow:
    path = _first(row, PATH_COLUMNS)
    place = f"{url}#{number}"
    if not isinstance(path, str) or not path.strip():
        return SourceRow(source_uri=place, problem=row.get("problem", f"row {number} names no file"))
    uri = path if "://" in path or PurePosixPath(path).is_absolute() else store.join(url.rsplit("/", 1)[0], path)
    caption = _first(row, CAPTION_COLUMNS)
    if isinstance(caption, list):  # several captions of one clip (Open-Sora-Plan): the first
        caption = next(iter(caption), None)
    try:
        start_s, end_s = (_seconds(row.get(name)) for name in ("start_s", "end_s"))
    except ValueError as error:
        return SourceRow(source_uri=uri, problem=f"row {number}: start_s or end_s: {error}")
    text = str(caption).strip() if caption is not None else ""
    return SourceRow(
        source_uri=uri,
        caption=text or None,
        caption_source="manifest" if text else None,
        start_s=start_s,
        end_s=end_s,
        version=_version_of(uri),
    )


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def _seconds(value: Any) -> float | None:
    return None if value in (None, "") else float(value)


def _version_of(uri: str) -> str:
    try:
        fs, path = store.filesystem(uri)
        return _version(fs.info(path))
    except (OSError, ValueError, ImportError):
        return "unreadable"  # the probe says why, as a reject
