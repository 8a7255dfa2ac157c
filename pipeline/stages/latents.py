"""From frames and captions to rows of LATENTS: pure functions over one shard's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from pipeline.stages.window import Clip
from video_dit.vae import VideoVAE


def group_by_shape(rows: Sequence[dict[str, Any]], max_pixels_per_batch: int) -> list[list[dict[str, Any]]]:
    """Rows of CLIPS of one shape together, in groups of at most `max_pixels_per_batch` pixels (t * h * w) or one clip.

    Convolutions of a batch are several times faster than of one small clip.
    """
    shapes: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        shapes.setdefault((row["num_frames"], row["height_px"], row["width_px"]), []).append(row)
    groups = []
    for (num_frames, height_px, width_px), members in shapes.items():
        size = max(1, max_pixels_per_batch // (num_frames * height_px * width_px))
        groups += [members[first : first + size] for first in range(0, len(members), size)]
    return groups


class Encoded(NamedTuple):
    """What the VAE says of a clip, on the host: c t h w each."""

    mean: NDArray[np.float16]
    std: NDArray[np.float16]


@torch.inference_mode()
def encode_videos(vae: VideoVAE, videos_u8: Sequence[NDArray[np.uint8]], device: str) -> list[Encoded]:
    """Latents of videos (t, h, w, 3) of one shape."""
    batch = torch.from_numpy(np.stack(videos_u8)).to(device)
    video = rearrange(batch, "b t h w c -> b c t h w").float() / 127.5 - 1
    posterior = vae.encode(video)
    return [Encoded(*pair) for pair in zip(_half(posterior.mean), _half(posterior.std), strict=True)]


def _half(values: Tensor) -> NDArray[np.float16]:
    return values.to("cpu", torch.float16).numpy()


def latents_row(row: dict[str, Any], clip: Clip, encoded: Encoded, text: Tensor, keep_std: bool) -> dict[str, Any]:
    """The row of LATENTS for a row of CLIPS.

    Args:
        row: of CLIPS.
        clip: its frames.
        encoded: its latents.
        text: s d.
        keep_std: whether training may draw from what the VAE says, or has its mean only.

    Raises:
        ValueError: a number is not finite in float16: the model is damaged.
    """
    latents, text_half = encoded.mean, _half(text)
    for name, array in (("latents", latents), ("std of the latents", encoded.std), ("text", text_half)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name} of clip {row['clip_id']} ({row['source_uri']}) are not finite in float16")
    return {
        "clip_id": row["clip_id"],
        "latents": latents.tobytes(),
        "latents_std": encoded.std.tobytes() if keep_std else None,
        "latents_shape": list(latents.shape),
        "text": text_half.tobytes(),
        "text_shape": list(text_half.shape),
        "caption": row["caption"],
        "fps": row["fps"],
        "decode_backend": clip.backend,
        "lineage": row["lineage"],
    }
