"""What a VAE makes of clips: statistics of its latents, and how near its reconstructions are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from pipeline.media import Frames
from video_dit.quality import psnr_db, ssim
from video_dit.vae import VideoVAE

SHAPE = ("frames", "height_px", "width_px")
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
def reconstruction_scores(vae: VideoVAE, videos_u8: Sequence[Frames]) -> list[dict[str, float]]:
    """A row a video: "frames", "height_px", "width_px", and of its reconstruction "psnr_db" and "ssim"."""
    rows = []
    for video in _each(videos_u8):
        reconstruction = vae.decode(vae.encode(video).mean)
        scores = (float(score(reconstruction, video)) for score in (psnr_db, ssim))
        rows.append(dict(zip((*SHAPE, *SCORES), (*video.shape[2:], *scores), strict=True)))
    return rows


def reconstruction_table(rows: Sequence[Mapping[str, float]], most: int = 10) -> dict[str, dict[str, float]]:
    """The number of "clips" and their mean scores of the `most` frequent shapes ("9x32x48"), the rest, and all."""
    by_shape: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    for row in rows:
        by_shape["x".join(f"{row[name]:.0f}" for name in SHAPE)].append(row)
    names = sorted(by_shape, key=lambda name: -len(by_shape[name]))
    table = {name: _means_of(by_shape[name]) for name in names[:most]}
    if rest := names[most:]:
        table[f"{len(rest)} other shapes"] = _means_of([row for name in rest for row in by_shape[name]])
    return {**table, "all": _means_of(rows)}


def _means_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {"clips": len(rows), **{name: float(np.mean([row[name] for row in rows])) for name in SCORES}}


def _each(videos_u8: Sequence[Frames]) -> Iterator[Tensor]:
    for video_u8 in videos_u8:
        yield to_video(video_u8[None])
