"""Files wherever they are: on this machine, behind a URL, in a tar, in a Parquet file; remote ones by ranges."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ClipRejected, RejectReason

_EMBEDDED = re.compile(r"(?P<host>.*\.parquet)#(?P<column>[^#]+)@(?P<row>\d+)#.+", re.DOTALL)
_MEMBER = re.compile(r"(?P<host>.*\.tar)#(?P<offset>\d+)\+(?P<size>\d+)#.+", re.DOTALL)

_SDKS = ("aiohttp", "botocore", "gcsfs", "google")
File = str | BinaryIO
COPY_BYTES = 16 << 20  # fetched at a time of a remote file that is needed whole
RANGE_BYTES = 1 << 20  # of one that is read in parts


def suffix(uri: str) -> str:
    """The file's extension, in small letters with its dot."""
    return PurePosixPath(uri).suffix.lower()


def host_file(uri: str) -> str:
    """The file that is opened for a URI: a tar or a Parquet file for what lies in one, else the URI."""
    inside = _MEMBER.fullmatch(uri) or _EMBEDDED.fullmatch(uri)
    return inside["host"] if inside else uri


def embedded_uri(table: str, column: str, row: int, name: str) -> str:
    """How a file is called whose bytes are a value of a Parquet file, in column `<column>.bytes`."""
    return f"{table}#{column}@{row}#{name}"


def member_uri(tar: str, offset_bytes: int, size_bytes: int, name: str) -> str:
    """How a file that lies in a tar is called: `open_file` reads it in place."""
    return f"{tar}#{offset_bytes}+{size_bytes}#{name}"


class _Slice(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, offset_bytes: int, size_bytes: int) -> None:
        self._file, self._offset, self._size, self._place = file, offset_bytes, size_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._place)
        data = self._file.read(max(0, min(len(buffer), self._size - self._place)))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


@contextlib.contextmanager
def open_file(uri: str, block_bytes: int = RANGE_BYTES) -> Iterator[File]:
    """A local file's path, or a remote file or a tar's member that is read by ranges, as a decoder seeks.

    What is embedded in a Parquet file is read with its row group.

    Args:
        uri: path or fsspec URL.
        block_bytes: of a remote file, fetched at a time; some blocks are kept.

    Raises:
        ClipRejected: UNREADABLE, the remote file cannot be fetched.
    """
    member, embedded = _MEMBER.fullmatch(uri), _EMBEDDED.fullmatch(uri)
    if "://" not in uri and not member and not embedded:
        yield uri
        return
    try:
        if embedded:
            yield io.BytesIO(_embedded_bytes(embedded["host"], embedded["column"], int(embedded["row"])))
            return
        fs, path = fsspec.core.url_to_fs(host_file(uri))
        with fs.open(path, "rb", block_size=block_bytes, cache_type="blockcache") as remote:
            if member:
                yield io.BufferedReader(_Slice(remote, int(member["offset"]), int(member["size"])))
            else:
                yield remote
    except ClipRejected:
        raise
    except Exception as error:
        if _is_remote_error(error):
            raise ClipRejected(RejectReason.UNREADABLE, f"{type(error).__name__}: {error}") from error
        raise


def _embedded_bytes(table: str, column: str, row: int) -> bytes:
    """A value of `<column>.bytes`.

    Raises:
        ClipRejected: UNREADABLE, there is none.
    """
    fs, path = fsspec.core.url_to_fs(table)
    first = 0
    try:
        with fs.open(path, "rb", block_size=COPY_BYTES) as file, pq.ParquetFile(file) as parquet:
            for group in range(parquet.num_row_groups):
                num = parquet.metadata.row_group(group).num_rows
                if row < first + num:
                    values = parquet.read_row_group(group, columns=[f"{column}.bytes"])
                    data = values[column].slice(row - first, 1).combine_chunks().field("bytes")[0].as_py()
                    break
                first += num
            else:
                data = None
    except (pa.ArrowException, KeyError) as error:
        raise ClipRejected(RejectReason.UNREADABLE, f"{table}: {type(error).__name__}: {error}") from error
    if not data:
        raise ClipRejected(RejectReason.UNREADABLE, f"{table}: no bytes in row {row} of column {column}")
    return bytes(data)


def _is_remote_error(error: Exception) -> bool:
    """Whether a file system raised it: an OSError, or what an SDK that this module does not know has for that."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _SDKS


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[str]:
    """The path of a local file, or of a temporary copy of a remote one, for readers that need all of it.

    Raises:
        ClipRejected: UNREADABLE, the remote file cannot be fetched.
    """
    with open_file(uri, COPY_BYTES) as file, contextlib.ExitStack() as stack:
        if not isinstance(file, str):
            copy = stack.enter_context(tempfile.NamedTemporaryFile(suffix=suffix(uri)))
            shutil.copyfileobj(file, copy, COPY_BYTES)
            copy.flush()
        yield file if isinstance(file, str) else copy.name
