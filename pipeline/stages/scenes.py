"""Where one scene ends and the next begins: no clip should hold a cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector

from pipeline.errors import ClipRejected, RejectReason
from pipeline.stages.probe import Probe
from pipeline.stages.window import Clip

SHORT_SIDE_PX = 72  # a cut is seen in a thumbnail
SAME_FRAME = 0.3  # mean difference, of 255
CHUNK_BYTES = 64 << 20  # frames in memory at a time


def find_cuts(row: dict[str, Any], *, read: Callable[..., Clip], threshold: float | None) -> dict[str, Any]:
    """The row with `cuts_s`: presentation times of the frames that begin a new scene, growing.

    Cuts are frames that differ from the one before `threshold` times as much as their neighbours do (PySceneDetect's
    AdaptiveDetector: fast motion alone is no cut). Dissolves are not found.

    Args:
        row: has `probe`, and start_s, end_s (or None) that bound the part of the file to use.
        read: `ClipReader.read`.
        threshold: None finds no cuts, and does not look at the file.

    Raises:
        ClipRejected: the file cannot be decoded.
    """
    facts: Probe = row["probe"]
    if threshold is None or not facts.fps:
        return {**row, "cuts_s": []}
    detector = AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=1)
    times_s: list[float] = []
    cuts = []
    for frame, time_s in _changes(_chunks(row, facts, read)):
        # Counted, not timed: what is compared are frames, whatever their rate.
        number = FrameTimecode(len(times_s), fps=facts.fps)
        times_s.append(time_s)
        cuts += detector.process_frame(number, frame[..., ::-1])
    return {**row, "cuts_s": [times_s[cut.frame_num] for cut in cuts]}


def _changes(clips: Iterator[Clip]) -> Iterator[tuple[NDArray[np.uint8], float]]:
    """Frames and times without repeated frames: beside those, any motion of a slow animation would look like a cut."""
    last = None
    for clip in clips:
        for frame, time_s in zip(clip.video_u8, clip.times_s.tolist(), strict=True):
            if last is None or cv2.absdiff(frame, last).mean() > SAME_FRAME:
                yield frame, time_s
            last = frame


def _chunks(row: dict[str, Any], facts: Probe, read: Callable[..., Clip]) -> Iterator[Clip]:
    """Small frames of the whole part, in stretches of bounded memory."""
    scale = min(1.0, SHORT_SIDE_PX / min(facts.height_px, facts.width_px))
    height, width = (max(16, round(side * scale)) for side in (facts.height_px, facts.width_px))
    length_s = max(1.0, CHUNK_BYTES / (3 * height * width * facts.fps))
    start_s = facts.start_s if row["start_s"] is None else max(row["start_s"], facts.start_s)
    end_s = facts.end_s if row["end_s"] is None else min(row["end_s"], facts.end_s)
    for number in range(math.ceil((end_s - start_s) / length_s)):
        first_s = start_s + number * length_s
        try:
            yield read(row["source_uri"], first_s, min(first_s + length_s, end_s), height_px=height, width_px=width)
        except ClipRejected as verdict:
            if verdict.reason != RejectReason.NO_FRAMES:  # one frame may stand still for longer than a chunk
                raise
