"""Tensors in safetensors files, read one by one by their byte ranges wherever fsspec reaches, and written alike.

A reader holds no tensor but the one it fills, so a model's memory never exceeds its weights by more than a read buffer.
Source of the format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import fsspec
import torch
from torch import Tensor

NAME = "diffusion_pytorch_model"
WEIGHTS = f"{NAME}.safetensors"
INDEX = f"{WEIGHTS}.index.json"
MAX_HEADER_BYTES = 100_000_000
CHUNK_BYTES = 1 << 24

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class StoredTensor(NamedTuple):
    """Where a tensor lies: its file, and its first byte in it."""

    url: str
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorReader:
    """All tensors of a safetensors file, or of a folder with one, or with shards and an index.

    A context manager: it keeps files open.

    Attributes:
        tensors: by name, from the headers alone.

    Raises:
        FileNotFoundError: neither file is there.
        ValueError: a header that does not fit its file, or an index that does not fit its shards.
    """

    def __init__(self, url: str) -> None:
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        try:
            self.tensors = self._read_headers(url.rstrip("/"))
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def read(self, name: str) -> Tensor:
        """A tensor, in the dtype it is stored in."""
        stored = self.tensors[name]
        return self.read_into(name, torch.empty(stored.shape, dtype=stored.dtype))

    def read_into(self, name: str, target: Tensor) -> Tensor:
        """Fill a contiguous tensor of the stored shape; a dtype that differs is converted on the way."""
        stored = self.tensors[name]
        assert target.shape == stored.shape
        assert target.is_contiguous()
        if target.dtype != stored.dtype:
            return target.copy_(self.read(name))
        flat = target.view(-1).view(torch.uint8).numpy().data
        file = self._files[stored.url]
        file.seek(stored.start)
        for start in range(0, len(flat), CHUNK_BYTES):
            part = flat[start : start + CHUNK_BYTES]
            data = file.read(len(part))
            if len(data) != len(part):
                raise ValueError(f"{stored.url}: ends inside tensor {name!r}")
            part[:] = data
        return target

    def _read_headers(self, url: str) -> dict[str, StoredTensor]:
        if url.endswith(".safetensors"):
            return self._read_header(url)
        fs, root = fsspec.core.url_to_fs(url)
        if not fs.exists(f"{root}/{INDEX}"):
            return self._read_header(f"{url}/{WEIGHTS}")
        weight_map = json.loads(fs.cat_file(f"{root}/{INDEX}"))["weight_map"]
        tensors: dict[str, StoredTensor] = {}
        for shard in sorted(set(weight_map.values())):
            tensors.update(self._read_header(f"{url}/{shard}"))
        if set(tensors) != set(weight_map):
            astray = sorted(set(tensors) ^ set(weight_map))
            raise ValueError(f"{url}/{INDEX}: index and shards differ in {', '.join(astray)}")
        return tensors

    def _read_header(self, url: str) -> dict[str, StoredTensor]:
        file = self._files[url] = self._stack.enter_context(fsspec.open(url, "rb"))
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else MAX_HEADER_BYTES
        if length >= MAX_HEADER_BYTES or 8 + length > size:
            raise ValueError(f"{url}: not a safetensors file")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{url}: not a safetensors file") from error
        header.pop("__metadata__", None)
        return {name: _stored(url, name, entry, 8 + length, size) for name, entry in header.items()}


def _stored(url: str, name: str, entry: Mapping[str, Any], data_start: int, file_bytes: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{url}: tensor {name!r} of dtype {entry['dtype']}, known: {', '.join(DTYPES)}")
    dtype, shape, (start, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if end - start != math.prod(shape) * dtype.itemsize or data_start + end > file_bytes:
        raise ValueError(f"{url}: tensor {name!r} does not fit its bytes {start}..{end}; is the file cut short?")
    return StoredTensor(url, data_start + start, dtype, shape)


def write_tensors(
    url: str,
    tensors: Mapping[str, Tensor],
    max_shard_bytes: int,
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Write tensors one by one as one file, or as numbered shards with an index if larger than `max_shard_bytes`.

    A folder that held more shards before keeps the rest, unread: the index tells which ones count.

    Args:
        url: of the folder.
        tensors: by name.
        max_shard_bytes: of the tensors in one file.
        read: gives the values of a tensor where `tensors` has them on the meta device.
    """
    fs, root = fsspec.core.url_to_fs(url)
    fs.makedirs(root, exist_ok=True)
    shards = list(_shards(tensors, max_shard_bytes))
    if len(shards) == 1:
        _write_file(fs, f"{root}/{WEIGHTS}", shards[0], read)
        if fs.exists(f"{root}/{INDEX}"):
            fs.rm_file(f"{root}/{INDEX}")
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"{NAME}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(fs, f"{root}/{file}", shard, read)
        weight_map.update(dict.fromkeys(shard, file))
    total_bytes = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    fs.pipe_file(f"{root}/{INDEX}", (json.dumps(index, indent=2) + "\n").encode())


def _write_file(
    fs: fsspec.AbstractFileSystem, path: str, shard: Mapping[str, Tensor], read: Callable[[str], Tensor] | None
) -> None:
    names = sorted(shard, key=lambda name: -shard[name].itemsize)  # so that every tensor is aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + shard[name].nbytes
        dtype, shape = DTYPE_NAMES[shard[name].dtype], list(shard[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with fs.open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name in names:
            value = (shard[name] if read is None else read(name)).detach().cpu().contiguous()
            flat = value.view(-1).view(torch.uint8).numpy().data
            for start in range(0, len(flat), CHUNK_BYTES):
                file.write(flat[start : start + CHUNK_BYTES])


def _shards(tensors: Mapping[str, Tensor], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    num_bytes = 0
    for name, value in tensors.items():
        if shard and num_bytes + value.nbytes > max_bytes:
            yield shard
            shard, num_bytes = {}, 0
        shard[name] = value
        num_bytes += value.nbytes
    yield shard
