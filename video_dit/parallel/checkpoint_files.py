"""How torch.distributed.checkpoint reaches a checkpoint's files: on any fsspec URL, hashed as they are written.

Files are named by the attempt that wrote them, so two attempts at one step never write to one file; which of them count
is said by a manifest (see `checkpoint`). Only tensors are stored, and the index is unpickled with an allow-list.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import fsspec
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from video_dit.parallel.failpoints import reach

CHUNK_BYTES = 1 << 22
_INDEX = "index"
_CHECKPOINT = "torch.distributed.checkpoint"
_PARTS = (
    "Metadata",
    "MetadataIndex",
    "TensorStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "_MEM_FORMAT_ENCODING",
)
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
_ALLOWED = {
    *((f"{_CHECKPOINT}.metadata", name) for name in _PARTS),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    *(("torch", name) for name in (*_DTYPES, "Size")),
    ("torch.serialization", "_get_layout"),
}


class Written(NamedTuple):
    """A file as it was written."""

    num_bytes: int
    sha256: str


class _HashedStream(io.RawIOBase):
    """Writes to another stream and hashes what it writes."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._hash, self._num_bytes = stream, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._stream.write(data)
        self._num_bytes += memoryview(data).nbytes
        reach("mid_shard_write")
        return memoryview(data).nbytes

    def tell(self) -> int:
        return self._num_bytes

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return int(self._stream.fileno())

    def sync(self) -> None:
        """Until a loss of power would not lose what was written."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def written(self) -> Written:
        """So far."""
        return Written(self._num_bytes, self._hash.hexdigest())


class CheckpointFiles(FileSystemBase):
    """The files of one checkpoint's folder; paths are their names in it.

    Attributes:
        written: what this process wrote, by name.
    """

    def __init__(self, folder: str) -> None:
        self.fs, self.root = fsspec.url_to_fs(folder)
        self.written: dict[str, Written] = {}

    def path(self, name: str | os.PathLike[str]) -> str:
        """On the file system."""
        return f"{self.root.rstrip('/')}/{os.fspath(name)}"

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """Open a file; one that is written is hashed."""
        with self.fs.open(self.path(path), mode) as stream:
            if mode != "wb":
                yield stream
                return
            hashed = _HashedStream(stream)
            yield hashed
            self.written[os.fspath(path)] = hashed.written()

    def sync_folder(self) -> None:
        """The same for the names of files, on a local file system."""
        folder = os.open(self.root, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def sha256(self, name: str) -> str:
        """Of a file's content now."""
        found = hashlib.sha256()
        with self.fs.open(self.path(name), "rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                found.update(chunk)
        return found.hexdigest()

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        """Names have no folder."""
        del path
        return suffix

    def init_path(self, path: str | os.PathLike[str]) -> str:
        """The folder's name is not needed."""
        return os.fspath(path)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """A file that this process wrote."""
        self.fs.mv(self.path(path), self.path(new_path))
        self.written[os.fspath(new_path)] = self.written.pop(os.fspath(path))

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """The folder itself."""
        del path
        self.fs.makedirs(self.root, exist_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any URL."""
        return bool(checkpoint_id)

    def exists(self, path: str | os.PathLike[str]) -> bool:
        """Whether the file is there."""
        return bool(self.fs.exists(self.path(path)))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        """Delete a file."""
        self.fs.rm_file(self.path(path))


class ShardWriter(FileSystemWriter):
    """Writes a process's shard, and on rank 0 the index, under names of one attempt."""

    def __init__(self, files: CheckpointFiles, attempt: str) -> None:
        super().__init__("", overwrite=True)
        self.fs, self._attempt = files, attempt  # type: ignore[assignment]

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        """Names of the shards begin with the attempt."""
        plans = super().prepare_global_plan(plans)
        for plan in plans:
            plan.storage_data.prefix = f"{self._attempt}-{plan.storage_data.prefix.strip('_')}-"
        return plans

    def finish(self, metadata: Metadata, results: Any) -> None:
        """Write the index."""
        reach("before_metadata")
        super().finish(metadata, results)

    def storage_meta(self) -> StorageMeta | None:
        """Nothing: it would tell paths of this machine."""
        return None

    def _get_metadata_path(self, rank: int | None = None) -> Any:
        return index_name(self._attempt)


class ShardReader(FileSystemReader):
    """Reads what `ShardWriter` wrote."""

    def __init__(self, files: CheckpointFiles, attempt: str) -> None:
        super().__init__("")
        self.fs, self._attempt = files, attempt  # type: ignore[assignment]

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index."""
        with self.fs.create_stream(index_name(self._attempt), "rb") as stream:
            metadata: Metadata = _IndexUnpickler(stream).load()
        metadata.storage_meta = StorageMeta()
        return metadata


def index_name(attempt: str) -> str:
    """Of the file that says where each tensor is."""
    return f"{attempt}-{_INDEX}"


class _IndexUnpickler(pickle.Unpickler):
    """Makes what an index is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a checkpoint's index may not hold {module}.{name}")
