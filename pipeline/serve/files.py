"""A finished job's files: written whole below a folder that names the job and the claim, read in ranges."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, BinaryIO

from pipeline import media, store

CHUNK_BYTES = 2**18


class Variant(StrEnum):
    """What a job leaves."""

    VIDEO = "video"
    THUMBNAIL = "thumbnail"
    SPRITESHEET = "spritesheet"


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One file: its URL, kind, size and hex SHA-256."""

    url: str
    content_type: str
    size_bytes: int
    sha256: str


def job_folder(storage: str, job_id: str) -> str:
    """Where all attempts of a job write. `job_id` is a row's, never a client's."""
    return store.join(storage, "videos", job_id)


def write_files(
    folder: str, name: str, video_u8: media.Frames, fps: float, metadata: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Write all variants and, beside them, `<name>.json` with what made them.

    Args:
        folder: the job's folder.
        name: of this claim; another claim of the same job has another.
        video_u8: t h w 3.
        fps: frames per second of the video file.
        metadata: JSON-able; the files' hashes are added.

    Returns:
        `StoredFile` as a dict, by variant.
    """
    contents = {
        Variant.VIDEO: ("mp4", "video/mp4", media.encode_mp4(video_u8, fps)),
        Variant.THUMBNAIL: ("thumbnail.png", "image/png", media.encode_png(video_u8[len(video_u8) // 2])),
        Variant.SPRITESHEET: ("sheet.png", "image/png", media.encode_png(media.contact_sheet([video_u8], [""]))),
    }
    files = {}
    for variant, (ending, content_type, data) in contents.items():
        url = store.join(folder, f"{name}.{ending}")
        store.write_bytes(url, data)
        sha256 = hashlib.sha256(data).hexdigest()
        files[str(variant)] = asdict(
            StoredFile(url=url, content_type=content_type, size_bytes=len(data), sha256=sha256)
        )
    store.write_json(store.join(folder, f"{name}.json"), {**metadata, "files": files})
    return files


def remove(folder: str) -> None:
    """Remove all of a job's files. A folder that is not there is no error."""
    fs, path = store.filesystem(folder)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def remove_claim(folder: str, name: str) -> None:
    """Remove the files of one claim."""
    _remove_where(folder, lambda file: file.startswith(f"{name}."))


def remove_other_claims(folder: str, name: str) -> None:
    """Remove the files of all claims but one."""
    _remove_where(folder, lambda file: not file.startswith(f"{name}."))


def _remove_where(folder: str, chosen: Callable[[str], bool]) -> None:
    fs, path = store.filesystem(folder)
    fs.invalidate_cache(path)  # other processes write here too
    for file in fs.ls(path, detail=False) if fs.exists(path) else []:
        if chosen(file.rsplit("/", 1)[-1]):
            fs.rm_file(file)


def open_file(file: StoredFile) -> BinaryIO:
    """The file, to read from.

    Raises:
        FileNotFoundError: it was removed.
    """
    fs, path = store.filesystem(file.url)
    opened: BinaryIO = fs.open(path, "rb")
    return opened


def parse_range(header: str | None, size_bytes: int) -> tuple[int, int] | None:
    """The one byte range `[start, stop)` that a Range header asks for; None: send everything (RFC 9110, 14.2).

    Raises:
        ValueError: the range begins behind the end.
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", (header or "").strip())
    if match is None or match.groups() == ("", ""):
        return None  # absent, another unit, or several ranges: the whole file is a valid answer
    first, last = match.groups()
    if not first:
        start, stop = max(0, size_bytes - int(last)), size_bytes
    else:
        start, stop = int(first), min(size_bytes, int(last) + 1 if last else size_bytes)
        if last and int(last) < start:
            return None  # malformed
    if start >= size_bytes:
        raise ValueError(f"range {header!r} begins behind the end of {size_bytes} bytes")
    return start, stop


def read_chunks(opened: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    """Bytes `[start, stop)`, chunk by chunk; closes the file."""
    with opened:
        opened.seek(start)
        while start < stop and (chunk := opened.read(min(CHUNK_BYTES, stop - start))):
            start += len(chunk)
            yield chunk
