"""What the user has: a folder of videos and pictures with captions beside them, or a manifest with a row for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from pipeline import manifests, store, tars
from pipeline.errors import SourceError
from pipeline.sidecars import CAPTIONS
from pipeline.source_rows import SourceConfig, SourceRow, version, version_of
from pipeline.stages.container import MEDIA_SUFFIXES
from pipeline.stages.files import suffix


def list_sources(url: str, config: SourceConfig | None = None) -> list[SourceRow]:
    """All sources of a folder (recursive), a manifest (.jsonl, .json, .csv, .parquet) or one file, in a fixed order.

    Captions stand beside a file as `<stem>.txt` or `<stem>.json` (key caption or text), in a manifest's column, or in a
    folder's `prompts.txt`, line by line with its `videos.txt`. WebDataset shards (.tar), alone or in a folder, are read
    in place, and so are datasets of the Hub (`hf://datasets/user/name`, or their Parquet files); a folder's
    `metadata.csv` or `.jsonl` is a manifest of what it names. Names that begin with a dot are left out.

    Raises:
        SourceError: the URL is not there, holds nothing usable, or lacks a column.
    """
    config = config or SourceConfig()
    url = store.absolute(url)
    try:
        fs, path = store.filesystem(url)
        found = fs.exists(path)
    except Exception as error:  # each file system has its own
        raise SourceError(f"source {url!r} cannot be opened: {type(error).__name__}: {error}{_hint(url)}") from error
    if not found:
        kinds = ", ".join(manifests.MANIFEST_SUFFIXES)
        raise SourceError(f"source {url!r} is not there: give a folder of videos, or a manifest ({kinds})")
    if suffix(url) in manifests.MANIFEST_SUFFIXES and fs.isfile(path):
        rows = manifests.manifest_rows(url, config)
    elif all(fs.isfile(store.join(path, name)) for name in manifests.LISTS):
        rows = manifests.list_rows(url, config)
    else:
        rows = _folder_rows(url, config)
    wanted = [row for row in rows if config.wants(row.source_uri)]
    if not wanted:
        filters = f"include={config.include}, exclude={config.exclude}"
        raise SourceError(
            f"source {url!r}: {filters} leave none of its {len(rows)} files, such as {rows[0].source_uri!r}"
        )
    return wanted


def _hint(url: str) -> str:
    """What a bucket needs."""
    if url.startswith("s3://"):
        return "; s3 needs pip install 'kinoray[s3]' and AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (AWS_ENDPOINT_URL)"
    if url.startswith(("gs://", "gcs://")):
        return "; gs needs pip install 'kinoray[gs]' and GOOGLE_APPLICATION_CREDENTIALS"
    return ""


def source_hash(rows: list[SourceRow]) -> str:
    """A hash that changes when a file, a caption or a bound changes."""
    return store.content_hash([dataclasses.astuple(row) for row in rows])


# --- folders --------------------------------------------------------------------------------------------------------


def _folder_rows(url: str, config: SourceConfig) -> list[SourceRow]:
    fs, path = store.filesystem(url)
    files: dict[str, Mapping[str, Any]] = fs.find(path, detail=True) if fs.isdir(path) else {path: fs.info(path)}
    seen = {name: info for name, info in files.items() if not PurePosixPath(name).name.startswith(".")}
    rows: list[SourceRow] = []
    for name in sorted(seen):
        uri = name if "://" not in url else fs.unstrip_protocol(name)
        if suffix(name) == ".parquet" or PurePosixPath(name).name in manifests.METADATA:
            rows += _manifest_in_folder(uri, config)
        elif suffix(name) == ".tar":
            rows += tars.tar_rows(uri)
        elif suffix(name) in MEDIA_SUFFIXES:
            rows.append(_file_row(uri, name, files))
    listed = {row.source_uri for row in rows if row.caption_source == "manifest"}
    rows = [row for row in rows if row.source_uri not in listed or row.caption_source == "manifest"]
    if not rows and any(suffix(name) == ".arrow" for name in seen):
        raise SourceError(
            f"source {url!r} was written by save_to_disk: run load_from_disk({url!r}).to_parquet('data.parquet')"
        )
    if not rows:
        kinds = sorted({suffix(name) or PurePosixPath(name).name for name in seen})[:10]
        known = " ".join((".tar", *sorted(MEDIA_SUFFIXES)))
        raise SourceError(f"source {url!r} holds no video or picture ({known}); found: {' '.join(kinds) or 'nothing'}")
    return rows


def _manifest_in_folder(uri: str, config: SourceConfig) -> list[SourceRow]:
    """The rows of a manifest among other files; one that cannot be read is a row with a problem."""
    try:
        return manifests.manifest_rows(uri, config)
    except SourceError as error:
        return [SourceRow(source_uri=uri, version=version_of(uri), problem=str(error))]


def _file_row(uri: str, name: str, files: Mapping[str, Any]) -> SourceRow:
    caption, problem = _sidecar(uri, name, files)
    return SourceRow(
        source_uri=uri,
        caption=caption,
        caption_source=None if caption is None else "sidecar",
        version=version(files[name]),
        problem=problem,
    )


def _sidecar(uri: str, name: str, files: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The caption beside a file, and what is wrong with it."""
    stem = len(suffix(name))
    for ending, read in CAPTIONS.items():
        if name[:-stem] + ending in files:
            return read(store.read_bytes(uri[:-stem] + ending))
    return None, None
