"""Random access to stored samples, and batches prepared while the step before them runs."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline import store
from pipeline.mixture import Samples
from video_dit.parallel.failpoints import reach
from video_dit.random import keyed_normal, keyed_uniform
from video_dit.shapes import LatentShape, Stride

_LARGE = ("latents", "latents_std", "text")
_INDEX = ["clip_id", "latents_shape", "text_shape", "caption", "fps"]
Key = TypeVar("Key")
Value = TypeVar("Value")


class LatentSample(NamedTuple):
    """One row of LATENTS, as tensors."""

    clip_id: str
    latents: Tensor  # c t h w, float32: the mean of what the VAE says
    text: Tensor  # s d, float32
    std: Tensor | None = None  # c t h w, where it was kept

    def draw(self, *key: int | str) -> Tensor:
        """Latents drawn from what the VAE says, the same for the same key; the mean where no deviation was kept."""
        if self.std is None:
            return self.latents
        return self.latents + self.std * keyed_normal(self.latents.shape, "posterior", *key, self.clip_id)


class BoundedCache(Generic[Key, Value]):
    """The most recently used values, as long as they fit."""

    def __init__(self, max_bytes: int, size_of: Callable[[Value], int]) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._size_of = size_of
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of `key`, made when it is not there."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = make()
        self._values[key] = value
        self.num_bytes += self._size_of(value)
        while self.num_bytes > self.max_bytes and len(self._values) > 1:
            self.num_bytes -= self._size_of(self._values.popitem(last=False)[1])
        return value


class LatentDataset:
    """The LATENTS tables of some manifests, one behind the other, read by row group when a sample is asked for.

    Attributes:
        clip_ids: of each sample, in the tables' order.
        captions: of each sample.
        shapes: latent frames, rows and columns of each sample.
        text_lengths: text tokens of each sample.
        data_sets: number of each sample's manifest.
        fps: the commonest rate of the clips.
    """

    def __init__(self, *manifests: store.Manifest, cache_bytes: int = 1 << 30) -> None:
        self.clip_ids: list[str] = []
        self.captions: list[str] = []
        self.shapes: list[LatentShape] = []
        self.text_lengths: list[int] = []
        self.data_sets: list[int] = []
        self._places: list[tuple[int, int, int]] = []  # file, row group, row
        rates: Counter[float] = Counter()
        names = [(number, store.join(m.uri, name)) for number, m in enumerate(manifests) for name in m.files["latents"]]
        self._files = [_open_parquet(url) for _, url in names]
        self._groups: BoundedCache[tuple[int, int], dict[str, list]] = BoundedCache(cache_bytes, _group_bytes)
        self._lock = threading.Lock()
        for number, file in enumerate(self._files):
            for group in range(file.num_row_groups):
                index = file.read_row_group(group, columns=_INDEX).to_pydict()
                self.clip_ids += index["clip_id"]
                self.captions += index["caption"]
                self.shapes += [LatentShape(*shape[1:]) for shape in index["latents_shape"]]
                self.text_lengths += [shape[0] for shape in index["text_shape"]]
                self.data_sets += [names[number][0]] * len(index["clip_id"])
                self._places += [(number, group, row) for row in range(len(index["clip_id"]))]
                rates.update(index["fps"])
        self.fps = rates.most_common(1)[0][0]

    def __len__(self) -> int:
        return len(self.clip_ids)

    def samples(self, patch: Stride, held_out_share: float = 0.0) -> Samples:
        """For a plan.

        Args:
            patch: of the tokens.
            held_out_share: of the clips, chosen by their ids.
        """
        return Samples(
            num_tokens=np.array([shape.grid(patch).num_tokens for shape in self.shapes], np.int64),
            data_set=np.array(self.data_sets, np.int64),
            is_image=np.array([shape.t == 1 for shape in self.shapes], bool),
            is_held_out=np.array([is_held_out(clip_id, held_out_share) for clip_id in self.clip_ids], bool),
        )

    def __getitem__(self, place: int) -> LatentSample:
        number, group, row = self._places[place]
        with self._lock:
            columns = self._groups.get((number, group), lambda: self._files[number].read_row_group(group).to_pydict())
        return sample_of({name: values[row] for name, values in columns.items()})


def sample_of(row: Mapping[str, Any]) -> LatentSample:
    """A row of LATENTS."""
    shape, std = row["latents_shape"], row.get("latents_std")  # tables of version 1 have none
    return LatentSample(
        row["clip_id"],
        _tensor(row["latents"], shape),
        _tensor(row["text"], row["text_shape"]),
        None if std is None else _tensor(std, shape),
    )


def is_held_out(clip_id: str, share: float) -> bool:
    """Whether a clip is measured, not trained on; a function of its id."""
    return keyed_uniform("held out", clip_id) < share


def _open_parquet(url: str) -> pq.ParquetFile:
    fs, path = store.filesystem(url)
    return pq.ParquetFile(fs.open(path))


def _group_bytes(columns: dict[str, list]) -> int:
    return sum(len(value) for name in _LARGE for value in columns.get(name, ()) if value)


def _tensor(data: bytes, shape: list[int]) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.float16).reshape(shape).astype(np.float32))


def pinned(value: Any) -> Any:
    """The same with tensors in page-locked memory, from which a GPU fetches them while it computes.

    Tensors are looked for in dataclasses, tuples, lists and dicts.
    """
    if isinstance(value, Tensor):
        return value.pin_memory()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: pinned(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, dict):
        return {name: pinned(each) for name, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(pinned, value))
    return type(value)(map(pinned, value)) if isinstance(value, tuple | list) else value


class Timed(NamedTuple, Generic[Value]):
    """A value and how long the consumer waited for it."""

    value: Value
    wait_s: float


def prefetch(values: Iterator[Value], depth: int = 2) -> Iterator[Timed[Value]]:
    """Make the next values in a thread while the consumer works; what the iterator raises is raised here."""
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: tuple[str, object]) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                reach("data_prefetch_full")
                continue
            return True
        return False

    def produce() -> None:
        try:
            for value in values:
                if not put(("value", value)):
                    return
            put(("end", None))
        except BaseException as error:  # carried to the consumer, whatever it is
            put(("error", error))

    threading.Thread(target=produce, daemon=True, name="prefetch").start()
    try:
        while True:
            start_s = time.monotonic()
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield Timed(value, time.monotonic() - start_s)
    finally:
        stopped.set()
