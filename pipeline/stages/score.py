"""Figures of a clip's frames that filters and reports go by."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.stages.window import Clip, Video

LUMA_BT709 = (0.2126, 0.7152, 0.0722)
FLOW_SHORT_SIDE_PX = 96


def score(
    row: dict[str, Any], *, read: Callable[..., Clip], fingerprint: Callable[[Video], bytes | None] | None = None
) -> dict[str, Any]:
    """The row with `scores` of its clip, at the size that it will be trained at; see `measure`.

    Args:
        row: a window with its size.
        read: `ClipReader.read`.
        fingerprint: of the frames, kept as `fingerprint`; None keeps none.

    Raises:
        ClipRejected: the clip cannot be decoded.
    """
    window = {name: row[name] for name in ("start_s", "end_s", "fps", "height_px", "width_px", "num_frames")}
    video = read(row["source_uri"], **window).video_u8
    seen = fingerprint(video) if fingerprint else None
    return {**row, "scores": list(measure(video, row["fps"]).items()), "fingerprint": seen}


def measure(video_u8: Video, fps: float) -> dict[str, float]:
    """Scores of frames t h w 3.

    Returns:
        luma: mean, 0 to 1 (BT.709 weights of the coded values).
        contrast: standard deviation of luma in a frame, mean over frames.
        sharpness: variance of the Laplacian of luma in 0..255, median over three frames (Pech-Pacheco et al. 2000); it
            grows with detail and falls with blur, and with the clip's size.
        motion: mean length of the optical flow (DIS: Kroeger et al. 2016), in shorter sides a second; 0 for a frozen
            video. Not for a single frame.
    """
    luma = luma_of(video_u8)
    three = luma[[0, len(luma) // 2, len(luma) - 1]]
    scores = {
        "luma": float(luma.mean()) / 255,
        "contrast": float(luma.std(axis=(1, 2)).mean()) / 255,
        "sharpness": float(np.median([cv2.Laplacian(frame, cv2.CV_32F).var() for frame in three])),
    }
    if len(luma) > 1:
        scores["motion"] = _motion(luma) * fps
    return scores


def luma_of(pictures_u8: Video) -> NDArray[np.float32]:
    """Luma (... h w), 0 to 255, of pictures (... h w 3)."""
    return pictures_u8.astype(np.float32) @ np.array(LUMA_BT709, np.float32)


def _motion(luma: NDArray[np.float32]) -> float:
    """Mean flow from frame to frame, in shorter sides."""
    height, width = luma.shape[1:]
    scale = min(1.0, FLOW_SHORT_SIDE_PX / min(height, width))
    size = (round(width * scale), round(height * scale))
    frames = [cv2.resize(frame, size, interpolation=cv2.INTER_AREA).astype(np.uint8) for frame in luma]
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    lengths = []
    for first, second in itertools.pairwise(frames):
        flow = search.calc(first, second, None)  # type: ignore[call-overload] # no flow to begin with
        lengths.append(np.linalg.norm(flow, axis=-1).mean())
    return float(np.mean(lengths)) / min(size)
