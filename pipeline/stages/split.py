"""From files to clips: windows in time, and the size that each is decoded to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pipeline import store
from pipeline.errors import ClipRejected, RejectReason
from pipeline.stages.probe import Probe
from pipeline.stages.window import TIME_TOLERANCE_S

FRAME_TOLERANCE = 0.01  # of a period: a duration that is rounded up gains no frame
SAME_RATE = 0.99  # a file this close to the asked rate has that rate


def split(
    row: dict[str, Any],
    *,
    fps: float,
    max_frames: int,
    min_frames: int,
    stride_frames: int,
    hop_frames: int | None = None,
) -> list[dict[str, Any]]:
    """Cut a probed row into windows of 1 + k * stride_frames frames, each a row with start_s, end_s, fps, num_frames.

    A file slower than `fps` is sampled at its own rate: a repeated frame would teach that things stand still. What is
    left after the last full window of a scene becomes a shorter one, or is dropped when it holds fewer than
    `min_frames`.

    Args:
        row: has `probe`, start_s, end_s (or None) that bound the part of the file to use, and perhaps `cuts_s`, which
            no window crosses.
        fps: rate to sample at; also written for a still picture, which is a window of one frame.
        max_frames: longest window.
        min_frames: shortest window.
        stride_frames: the model's temporal stride.
        hop_frames: from one window's start to the next one's; None is back to back. Of overlapping windows only the
            first of a scene may be shorter.

    Raises:
        ClipRejected: TOO_SHORT, or BAD_TIMES for bounds that are not a part of the file.
    """
    facts: Probe = row["probe"]
    if not facts.fps:
        return [{**row, "start_s": 0.0, "end_s": 1 / fps, "fps": fps, "num_frames": 1}]
    start_s, end_s = _bounds(facts, row["start_s"], row["end_s"])
    rate_fps = fps if facts.fps >= fps * SAME_RATE else facts.fps
    clips, longest = [], 0
    for scene_s, scene_end_s in _scenes(start_s, end_s, row.get("cuts_s", ())):
        num_frames = math.ceil((scene_end_s - scene_s) * rate_fps - FRAME_TOLERANCE)  # samples before the end
        longest = max(longest, num_frames)
        for first, length in _windows(num_frames, max_frames, min_frames, stride_frames, hop_frames):
            first_s, last_s = (round(scene_s + number / rate_fps, 6) for number in (first, first + length))
            clips.append({**row, "start_s": first_s, "end_s": last_s, "fps": rate_fps, "num_frames": length})
    if not clips:
        detail = f"{longest} frames at {rate_fps:.3f} fps in the longest scene: min_frames={min_frames}"
        raise ClipRejected(RejectReason.TOO_SHORT, detail)
    return clips


def _scenes(start_s: float, end_s: float, cuts_s: Sequence[float]) -> list[tuple[float, float]]:
    """Start and end of each scene; a sample just before a cut would show the frame behind it."""
    inside = [cut_s for cut_s in cuts_s if start_s < cut_s < end_s]
    ends = [cut_s - 2 * TIME_TOLERANCE_S for cut_s in inside]
    return list(zip([start_s, *inside], [*ends, end_s], strict=True))


def _bounds(facts: Probe, start_s: float | None, end_s: float | None) -> tuple[float, float]:
    first_s = facts.start_s if start_s is None else max(start_s, facts.start_s)
    last_s = facts.end_s if end_s is None else min(end_s, facts.end_s)
    if first_s >= last_s:
        asked, there = f"[{start_s}, {end_s})", f"[{facts.start_s:.3f}, {facts.end_s:.3f})"
        raise ClipRejected(RejectReason.BAD_TIMES, f"nothing of {asked} s lies in the file's {there} s")
    return first_s, last_s


def _windows(
    num_frames: int, max_frames: int, min_frames: int, stride: int, hop: int | None = None
) -> list[tuple[int, int]]:
    """(first frame, length) of each window."""
    windows = []
    for first in range(0, num_frames, hop or max_frames):
        left = min(max_frames, num_frames - first)
        length = 1 + (left - 1) // stride * stride
        if length >= (min_frames if hop is None or not first else max_frames):
            windows.append((first, length))
    return windows


def resize(row: dict[str, Any], *, max_side_px: int, max_pixels_px: int, stride_px: int) -> dict[str, Any]:
    """The row with height_px and width_px: what the clip is decoded to. See `choose_size`."""
    facts: Probe = row["probe"]
    width_px = facts.width_px * facts.pixel_aspect
    size = choose_size(facts.height_px, width_px, max_side_px, max_pixels_px, stride_px)
    return {**row, "height_px": size[0], "width_px": size[1]}


def choose_size(
    height_px: int, width_px: float, max_side_px: int, max_pixels_px: int, stride_px: int
) -> tuple[int, int]:
    """The size on the model's grid that shows a picture with the least distortion; never enlarged, never cropped.

    A size that is on the grid and within the limits stays as it is. Else: the picture is scaled into the limits, and of
    the grid sizes that fit into it and keep at least half of its pixels, the one of nearest aspect is taken, of two the
    larger.

    Args:
        height_px: rows as displayed.
        width_px: columns as displayed, in units of rows (pixels need not be square).
        max_side_px: limit of both sides.
        max_pixels_px: limit of h * w.
        stride_px: both sides become multiples of this.

    Returns:
        rows, columns.

    Raises:
        ClipRejected: TOO_SMALL, a side has less than one stride.
    """
    scale = min(1.0, max_side_px / max(height_px, width_px), math.sqrt(max_pixels_px / (height_px * width_px)))
    height, width = height_px * scale, width_px * scale
    rows, columns = (range(stride_px, math.floor(side + 1e-6) + 1, stride_px) for side in (height, width))
    if not rows or not columns:
        detail = f"{height_px}x{width_px:.0f} px, {height:.0f}x{width:.0f} within the limits: stride_px={stride_px}"
        raise ClipRejected(RejectReason.TOO_SMALL, detail)
    sizes = [(h, w) for h in rows for w in columns if 2 * h * w >= height * width] or [(rows[-1], columns[-1])]
    return min(
        sizes, key=lambda size: (round(abs(math.log(size[1] / size[0] * height / width)), 9), -size[0] * size[1])
    )


def identify(row: dict[str, Any]) -> dict[str, Any]:
    """The row with clip_id: a hash of the source's content, the window and the size."""
    facts: Probe = row["probe"]
    window = [row[name] for name in ("start_s", "end_s", "num_frames", "height_px", "width_px")]
    return {**row, "clip_id": store.content_hash([facts.source_id, round(row["fps"], 6), *window])}
