"""Given frames on their way through sampling: pixels to latents, what noise level they are held at, pixels put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from video_dit.diffusion.held import LONE_SIGMA, REMADE_SIGMA
from video_dit.requests import Condition, GenerationRequest
from video_dit.vae import VideoVAE

ENCODED_PIXELS = 1 << 20  # of a video, at a time: some gigabytes of activations


class Given(NamedTuple):
    """Latents of a request's given frames, c t h w, zero elsewhere, and held levels, 1 t h w; see `diffusion.held`."""

    latents: Tensor
    held_to: Tensor


def has_lone_frames(request: GenerationRequest, stride: int) -> bool:
    """Whether a request gives one frame of a group of `stride` that are one latent frame."""
    return any(_is_lone(condition, stride) for condition in request.conditions)


def _is_lone(condition: Condition, stride: int) -> bool:
    return condition.start > 0 and len(condition.frames) == 1 and stride > 1


def given_latents(vae: VideoVAE, request: GenerationRequest, made_u8: Tensor | None = None) -> Given:
    """Encode what a request gives; its conditions fit the model's groups of frames (`Limits.check`).

    Args:
        vae: the model's.
        request: with its conditions.
        made_u8: the request's video as it was made first, t h w 3, which tells the frames beside a lone one; without
            it, they are taken to be like that.
    """
    stride = vae.config.stride
    shape = request.shape.latent(stride)
    latents = torch.zeros(vae.config.z_dim, *shape, device=_device(vae))
    held_to = torch.full((1, *shape), torch.inf, device=_device(vae))
    made = None if made_u8 is None else encode_frames(vae, made_u8)
    for condition in request.conditions:
        places = condition.latent_frames(stride.t)
        among, is_lone = slice(places.start, places.stop), _is_lone(condition, stride.t)
        latents[:, among] = made[:, among] if is_lone and made is not None else _encode_at(vae, condition)
        held_to[:, among] = 0.0 if not is_lone else LONE_SIGMA if made is None else REMADE_SIGMA
    return Given(latents, held_to)


def _encode_at(vae: VideoVAE, condition: Condition) -> Tensor:
    """Latents c t h w of frames anywhere in a video.

    The first latent of a clip describes one frame, the later ones a group each. So groups are encoded behind a copy of
    their first frame, whose latent is dropped; a single frame stands for its whole group.
    """
    frames = condition.frames
    if condition.start == 0:
        return encode_frames(vae, frames)
    group = frames.expand(vae.config.stride.t, -1, -1, -1) if len(frames) == 1 else frames
    return encode_frames(vae, torch.cat([group[:1], group]))[:, 1:]


def encode_frames(vae: VideoVAE, video_u8: Tensor) -> Tensor:
    """Latents c t h w, float32, of 1 + stride.t * k frames, uint8 t h w 3; in memory that does not grow with time."""
    dtype = next(vae.parameters()).dtype
    video = rearrange(video_u8, "t h w c -> 1 c t h w")
    chunks = (chunk.to(_device(vae)).to(dtype) / 127.5 - 1 for chunk in _chunks(video, vae.config.stride.t))
    return torch.cat(list(vae.encode_stream(chunks)), dim=2)[0].float()


def _chunks(video: Tensor, stride: int) -> Iterator[Tensor]:
    """b c t h w in runs of about ENCODED_PIXELS; the first is one frame longer than a multiple of the stride."""
    step = max(1, ENCODED_PIXELS // (stride * video.shape[3] * video.shape[4])) * stride
    yield video[:, :, : 1 + step]
    if video.shape[2] > 1 + step:
        yield from video[:, :, 1 + step :].split(step, dim=2)


def put_back(video_u8: Tensor, conditions: Sequence[Condition]) -> Tensor:
    """The video, t h w 3, with the frames that were given exactly as they were, in place."""
    for condition in conditions:
        video_u8[condition.start : condition.stop] = condition.frames
    return video_u8


def _device(vae: VideoVAE) -> torch.device:
    return next(vae.parameters()).device
