"""Clips of any resolution, aspect and duration, and images, as one packed sequence of tokens (NaViT, arXiv 2307.06304).

Samples lie one behind the other without padding. Each latent frame has its own timestep, so a frame given as a
condition (timestep 0) stays clean; modulation is computed once per frame and gathered by its tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from video_dit.attention import Segments
from video_dit.shapes import LatentShape, Stride, TokenGrid

WAN_PATCH = Stride(1, 2, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Samples packed into one sequence.

    Attributes:
        tokens: n (c pt ph pw), the patches of all samples.
        timesteps: f, in [0, 1000], one for each frame of tokens of each sample.
        text: s d, the samples' text tokens.
        frame_of_token: n, row of `timesteps` that each token belongs to.
        grids: token grid of each sample, in packed order.
        text_lengths: text tokens of each sample, in packed order.
        images: m c, the samples' image tokens, for models that take them; else None.
        image_lengths: image tokens of each sample, in packed order; () without images.
        order: place of each packed sample in the caller's list.
        patch: latent frames, rows and columns in one token.
        self_segments: which tokens see which tokens.
        cross_segments: which tokens see which text.
        image_segments: which tokens see which images; None without images.
        first_token: place of `tokens[0]` in the whole pack; see `shard`.
    """

    tokens: Tensor
    timesteps: Tensor
    text: Tensor
    frame_of_token: Tensor
    grids: tuple[TokenGrid, ...]
    text_lengths: tuple[int, ...]
    order: tuple[int, ...]
    patch: Stride
    self_segments: Segments
    cross_segments: Segments
    images: Tensor | None = None
    image_lengths: tuple[int, ...] = ()
    image_segments: Segments | None = None
    first_token: int = 0

    @property
    def num_tokens(self) -> int:
        """Video tokens held here: those of the pack, or of one of its shards."""
        return self.tokens.shape[0]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample, in packed order."""
        return [grid.num_tokens for grid in self.grids]

    def per_token(self, values: Tensor) -> Tensor:
        """Values of the samples, b ... in the order of the caller's list, for each token of a whole pack: n ..."""
        return values[list(self.order)].repeat_interleave(torch.tensor(self.lengths, device=values.device), dim=0)

    @property
    def has_equal_frames(self) -> bool:
        """Whether all frames have equally many tokens, and all of them are here."""
        is_whole = self.num_tokens == sum(self.lengths)
        return is_whole and len({grid.h * grid.w for grid in self.grids}) == 1

    @property
    def places(self) -> slice:
        """Where these tokens are in the whole pack."""
        return slice(self.first_token, self.first_token + self.num_tokens)

    def shard(self, rank: int, size: int) -> PackedBatch:
        """One of `size` runs of neighbouring tokens, for context parallelism; nearly equal, see `shard_lengths`.

        Timesteps, texts and the segments of self-attention stay those of the whole pack. The model's prediction is that
        of the run's tokens, so put other texts in and packs together before, and unpack what all runs give together.

        Raises:
            ValueError: a pack of one token.
        """
        if self.num_tokens < min(size, 2):
            raise ValueError(
                "a pack of one token cannot be shared: a run that has all tokens is taken for a whole pack"
            )
        lengths = shard_lengths(self.num_tokens, size)
        start = sum(lengths[:rank])
        stop = start + lengths[rank]
        return dataclasses.replace(
            self,
            tokens=self.tokens[start:stop],
            frame_of_token=self.frame_of_token[start:stop],
            cross_segments=self.cross_segments.of_queries(start, stop),
            image_segments=self.image_segments and self.image_segments.of_queries(start, stop),
            first_token=start,
        )

    def replace(self, *, tokens: Tensor, timesteps: Tensor) -> PackedBatch:
        """The same samples at another noise level; shapes as before."""
        return dataclasses.replace(self, tokens=tokens, timesteps=timesteps)

    def with_texts(self, texts: Sequence[Tensor]) -> PackedBatch:
        """The same samples, in the same places, with other texts (in the order of the caller's list)."""
        packed_texts = [texts[place] for place in self.order]
        text_lengths = tuple(text.shape[0] for text in packed_texts)
        return dataclasses.replace(
            self,
            text=torch.cat(packed_texts).to(self.text),
            text_lengths=text_lengths,
            cross_segments=Segments.of(self.lengths, text_lengths),
        )

    def select(self, chosen: Sequence[int]) -> PackedBatch:
        """Some samples of a whole pack, by their places in it."""
        samples = self.samples()
        orders = [self.order[place] for place in chosen]
        return _join([samples[place] for place in chosen], [sorted(orders).index(n) for n in orders], self.patch)

    def samples(self) -> list[Sample]:
        """What a whole pack is made of, in its order."""
        nothing = [None] * len(self.grids)
        return [
            Sample(*parts)
            for parts in zip(
                self.tokens.split(self.lengths),
                self.timesteps.split([grid.t for grid in self.grids]),
                self.text.split(list(self.text_lengths)),
                self.grids,
                nothing if self.images is None else self.images.split(list(self.image_lengths)),
                strict=True,
            )
        ]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same pack on another device."""
        names = ["tokens", "timesteps", "text", "frame_of_token", *(["images"] if self.image_lengths else [])]
        is_async = torch.device(device).type == "cuda"  # from pinned memory; from other memory it waits by itself
        moved = {name: getattr(self, name).to(device, non_blocking=is_async) for name in names}
        return dataclasses.replace(self, **moved)

    def unpack(self, tokens: Tensor) -> list[Tensor]:
        """Tokens n (c pt ph pw) back to latents (c, t, h, w), in the order they were given to `pack`."""
        latents: list[Tensor] = [tokens] * len(self.grids)
        parts = tokens.split(self.lengths)
        for place, part, grid in zip(self.order, parts, self.grids, strict=True):
            latents[place] = unpatchify(part, grid, self.patch)
        return latents


def shard_lengths(num_tokens: int, size: int) -> list[int]:
    """Lengths of `size` runs that cover the tokens in order; the first ones are longer by one if they do not divide."""
    return [num_tokens // size + (rank < num_tokens % size) for rank in range(size)]


def patchify(latents: Tensor, patch: Stride) -> Tensor:
    """c t h w -> n (c pt ph pw), tokens in t h w order."""
    pt, ph, pw = patch
    return rearrange(latents, "c (t pt) (h ph) (w pw) -> (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)


def unpatchify(tokens: Tensor, grid: TokenGrid, patch: Stride) -> Tensor:
    """n (c pt ph pw) -> c t h w."""
    (t, h, w), (pt, ph, pw) = grid, patch
    return rearrange(tokens, "(t h w) (c pt ph pw) -> c (t pt) (h ph) (w pw)", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)


def pack(
    latents: Sequence[Tensor],
    timesteps: Sequence[float | Tensor],
    texts: Sequence[Tensor],
    patch: Stride = WAN_PATCH,
    images: Sequence[Tensor] | None = None,
) -> PackedBatch:
    """Pack samples into one sequence.

    Args:
        latents: (c, t, h, w) each, any sizes, the same c.
        timesteps: in [0, 1000]; a number, or one for each frame of tokens, (t / patch.t,).
        texts: (s, d) each, s >= 1.
        patch: latent frames, rows and columns in one token.
        images: (m, c) each, m >= 1: vectors of the images that condition a sample; None for models without.

    Raises:
        ValueError: nothing to pack, lists of different lengths, or a side that is not a multiple of the patch.
    """
    _check_counts(len(latents), len(timesteps), len(texts), None if images is None else len(images))
    grids = [LatentShape(*sample.shape[1:]).grid(patch) for sample in latents]
    contexts = [texts, images or texts]
    # Equal lengths side by side, so that attention runs them as one batch.
    order = sorted(range(len(latents)), key=lambda i: (grids[i].num_tokens, *(c[i].shape[0] for c in contexts)))
    device = latents[0].device
    samples = [
        Sample(
            tokens=patchify(latents[i], patch),
            timesteps=_frame_timesteps(timesteps[i], grids[i], device),
            text=texts[i],
            grid=grids[i],
            images=None if images is None else images[i],
        )
        for i in order
    ]
    return _join(samples, order, patch)


class Sample(NamedTuple):
    """One sample of a pack: tokens n (c pt ph pw), timesteps t, text s d, grid, perhaps images m c."""

    tokens: Tensor
    timesteps: Tensor
    text: Tensor
    grid: TokenGrid
    images: Tensor | None


def _join(samples: Sequence[Sample], order: Sequence[int], patch: Stride) -> PackedBatch:
    tokens, timesteps, texts, grids, images = zip(*samples, strict=True)
    lengths = [grid.num_tokens for grid in grids]
    text_lengths = tuple(text.shape[0] for text in texts)
    image_lengths = () if images[0] is None else tuple(image.shape[0] for image in images)
    tokens_per_frame = torch.tensor([grid.h * grid.w for grid in grids for _ in range(grid.t)])
    return PackedBatch(
        tokens=torch.cat(tokens),
        timesteps=torch.cat(timesteps),
        text=torch.cat(texts),
        frame_of_token=torch.repeat_interleave(tokens_per_frame).to(tokens[0].device),
        grids=grids,
        text_lengths=text_lengths,
        order=tuple(order),
        patch=patch,
        self_segments=Segments.of(lengths, lengths),
        cross_segments=Segments.of(lengths, text_lengths),
        images=torch.cat(images) if image_lengths else None,
        image_lengths=image_lengths,
        image_segments=Segments.of(lengths, image_lengths) if image_lengths else None,
    )


def _check_counts(latents: int, timesteps: int, texts: int, images: int | None) -> None:
    if not latents:
        raise ValueError("pack needs at least one sample")
    if not latents == timesteps == texts:
        raise ValueError(f"{latents} latents, {timesteps} timesteps and {texts} texts: give as many of each")
    if images not in (None, latents):
        raise ValueError(f"{latents} latents and {images} images: give as many of each, or None")


def _frame_timesteps(timestep: float | Tensor, grid: TokenGrid, device: torch.device) -> Tensor:
    values = torch.as_tensor(timestep, dtype=torch.float32, device=device)
    if values.ndim and values.shape != (grid.t,):
        raise ValueError(f"timesteps of shape {tuple(values.shape)} for a sample of {grid.t} frames of tokens")
    return values.expand(grid.t)


def concatenate(first: PackedBatch, second: PackedBatch) -> PackedBatch:
    """Two packs as one, the samples of the second behind those of the first.

    Raises:
        ValueError: only one of them has images.
    """
    if (first.images is None) != (second.images is None):
        raise ValueError("one pack has images and the other has none")
    order = [*first.order, *(place + len(first.grids) for place in second.order)]
    return _join([*first.samples(), *second.samples()], order, first.patch)
