"""Samples that are decoded and encoded while training runs, by Ray Data, in the plan's order; nothing is stored."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from pipeline import schema, store
from pipeline.feed import LatentSample, is_held_out, prefetch, sample_of
from pipeline.heap import keep_freed_memory
from pipeline.mixture import Samples
from pipeline.stages import latents
from pipeline.stages.reader import ClipReader
from video_dit import weights
from video_dit.shapes import LatentShape, Stride, VideoShape
from video_dit.text import load_text_encoder
from video_dit.vae import VideoVAE, VideoVAEConfig

WINDOW = 4096  # samples that one data set of Ray's is made for
CLIPS_PER_BLOCK = 8
AHEAD = 64  # samples that wait for the training


class ClipEncoder:
    """Rows of CLIPS to rows of LATENTS, one by one: what becomes of a clip does not depend on its neighbours.

    Args:
        encoder: model folder with `vae/` and `text_encoder/`.
        keep_std: see `EncodeConfig`.
    """

    def __init__(self, encoder: str, keep_std: bool) -> None:
        keep_freed_memory()
        device = "cuda" if ray.is_initialized() and ray.get_gpu_ids() else "cpu"
        self._vae = VideoVAE.from_pretrained(encoder, subfolder="vae").eval().to(device)
        self._text = load_text_encoder(encoder, subfolder="text_encoder", device=device)
        self._reader, self._device, self._keep_std = ClipReader(), device, keep_std

    def __call__(self, table: pa.Table) -> pa.Table:
        """Raises ClipRejected for a clip that cannot be decoded: it was there when the clips were curated."""
        return schema.to_table([self._encode(row) for row in table.to_pylist()], schema.LATENTS)

    def _encode(self, row: dict[str, Any]) -> dict[str, Any]:
        window = {name: row[name] for name in ("start_s", "end_s", "fps", "height_px", "width_px", "num_frames")}
        clip = self._reader.read(row["source_uri"], **window)
        (encoded,) = latents.encode_videos(self._vae, [clip.video_u8], self._device)
        (text,) = self._text([row["caption"]])
        return latents.latents_row(row, clip, encoded, text, self._keep_std)


class OnlineDataset:
    """Takes the place of a `LatentDataset` that was never written.

    Samples come in the order that `begin` was told; without it, each is encoded when it is asked for.

    Args:
        encoder: model folder that encodes.
        manifests: CLIPS, one or several data sets.
        num_actors: processes that encode for this one; the cluster must have CPUs (or GPUs) for them besides those of
            the training's workers.
        num_gpus: of each.
    """

    def __init__(
        self,
        encoder: str,
        *manifests: store.Manifest,
        num_actors: int = 1,
        num_gpus: float = 0.0,
        keep_std: bool = False,
    ) -> None:
        self._encoder, self._keep_std, self._num_actors, self._num_gpus = encoder, keep_std, num_actors, num_gpus
        tables = [manifest.read("clips") for manifest in manifests]
        self._clips = pa.concat_tables(tables)
        self.data_sets = [number for number, table in enumerate(tables) for _ in range(table.num_rows)]
        self.clip_ids: list[str] = self._clips["clip_id"].to_pylist()
        self.captions: list[str] = self._clips["caption"].to_pylist()
        stride = weights.read_config(VideoVAEConfig, encoder, "vae").stride
        sides = zip(*(self._clips[name].to_pylist() for name in ("num_frames", "height_px", "width_px")), strict=True)
        self.shapes: list[LatentShape] = [VideoShape(*side).latent(stride) for side in sides]
        self.text_lengths = [len(caption.split()) + 1 for caption in self.captions]  # about
        self.fps = Counter(self._clips["fps"].to_pylist()).most_common(1)[0][0]
        self._coming: Iterator[tuple[int, LatentSample]] | None = None
        self._own: ClipEncoder | None = None

    def __len__(self) -> int:
        return len(self.clip_ids)

    def samples(self, patch: Stride, held_out_share: float = 0.0) -> Samples:
        """For a plan; see `LatentDataset.samples`."""
        return Samples(
            num_tokens=np.array([shape.grid(patch).num_tokens for shape in self.shapes], np.int64),
            data_set=np.array(self.data_sets, np.int64),
            is_image=np.array([shape.t == 1 for shape in self.shapes], bool),
            is_held_out=np.array([is_held_out(clip_id, held_out_share) for clip_id in self.clip_ids], bool),
        )

    def begin(self, places: Iterator[int]) -> None:
        """Encode ahead of the training, which will ask for these places in this order."""
        self._coming = (timed.value for timed in prefetch(self._stream(places), depth=AHEAD))

    def __getitem__(self, place: int) -> LatentSample:
        if self._coming is None:
            self._own = self._own or ClipEncoder(self._encoder, self._keep_std)
            return sample_of(self._own(self._clips.take([place])).to_pylist()[0])
        found, sample = next(self._coming)
        assert found == place, f"sample {place} was asked for, {found} was to come"
        return sample

    def _stream(self, places: Iterator[int]) -> Iterator[tuple[int, LatentSample]]:
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        while window := list(itertools.islice(places, WINDOW)):
            encoded = self._encode(window)
            for place, row in zip(window, encoded.iter_rows(), strict=True):
                yield place, sample_of(row)

    def _encode(self, places: Sequence[int]) -> ray.data.Dataset:
        blocks = [
            self._clips.take(places[first : first + CLIPS_PER_BLOCK])
            for first in range(0, len(places), CLIPS_PER_BLOCK)
        ]
        return ray.data.from_arrow(blocks).map_batches(
            ClipEncoder,
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(self._num_actors, len(blocks))),
            num_cpus=1,
            num_gpus=self._num_gpus or None,
            fn_constructor_args=(self._encoder, self._keep_std),
        )
