"""What a VAE makes of clips: statistics of its latents, and how near its reconstructions are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from pipeline.media import Frames
from video_dit.quality import psnr_db, ssim
from video_dit.vae import VideoVAE

SCORES = ("psnr_db", "ssim")


def to_video(videos_u8: Frames) -> Tensor:
    """b t h w c uint8 -> b c t h w in [-1, 1]."""
    return rearrange(torch.from_numpy(videos_u8).float() / 127.5 - 1, "b t h w c -> b c t h w").contiguous()


@torch.no_grad()
def latent_statistics(vae: VideoVAE, videos_u8: Sequence[Frames]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each raw latent channel over all places of the videos."""
    raw = [vae.encode(video).raw_mean for video in _each(videos_u8)]
    values = torch.cat([rearrange(latents, "1 c t h w -> c (t h w)") for latents in raw], dim=1).double()
    return values.mean(dim=1).tolist(), values.std(dim=1).clamp_min(1e-6).tolist()


@torch.no_grad()
def reconstruction_table(vae: VideoVAE, videos_u8: Sequence[Frames]) -> list[dict[str, Any]]:
    """A row a shape: "frames", "height_px", "width_px", "clips", and the clips' mean "psnr_db" and "ssim"."""
    found: dict[tuple[int, ...], list[tuple[float, float]]] = defaultdict(list)
    for video in _each(videos_u8):
        reconstruction = vae.decode(vae.encode(video).mean)
        found[tuple(video.shape[2:])].append(
            (float(psnr_db(reconstruction, video)), float(ssim(reconstruction, video)))
        )
    return [
        {
            **dict(zip(("frames", "height_px", "width_px"), shape, strict=True)),
            "clips": len(values),
            **dict(zip(SCORES, np.mean(values, axis=0).tolist(), strict=True)),
        }
        for shape, values in sorted(found.items())
    ]


def _each(videos_u8: Sequence[Frames]) -> Iterator[Tensor]:
    for video_u8 in videos_u8:
        yield to_video(video_u8[None])
