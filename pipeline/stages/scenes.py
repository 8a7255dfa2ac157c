"""Where one scene ends and the next begins: no clip should hold a cut."""

from __future__ import annotations

import itertools
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
MAX_REPEATS = 3  # of a picture in an animation: on fours
NUM_NEIGHBOURS = 2  # on either side of a frame, that it is compared with

Frame = NDArray[np.uint8]
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
    detector = AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=1, window_width=NUM_NEIGHBOURS)
    times_s: list[float] = []
    cuts = []
    for frame, time_s in _with_neighbours(_moving_or_still(_chunks(row, facts, read))):
        # Counted, not timed: what is compared are frames, whatever their rate.
        number = FrameTimecode(len(times_s), fps=facts.fps)
        times_s.append(time_s)
        cuts += detector.process_frame(number, frame[..., ::-1])
    return {**row, "cuts_s": [times_s[cut.frame_num] for cut in cuts]}


def _moving_or_still(clips: Iterator[Clip]) -> Iterator[tuple[Frame, float]]:
    """Frames and times without the repeats of a slow animation, beside which any motion would look like a cut.

    What repeats more often stands still: then it is shown, or a cut between two pictures had no neighbours.
    """
    last, num_repeats = None, 0
    for clip in clips:
        for frame, time_s in zip(clip.video_u8, clip.times_s.tolist(), strict=True):
            is_repeat = last is not None and cv2.absdiff(frame, last).mean() <= SAME_FRAME
            num_repeats = num_repeats + 1 if is_repeat else 0
            if not 0 < num_repeats <= MAX_REPEATS:
                yield frame, time_s
            last = frame


def _with_neighbours(frames: Iterator[tuple[Frame, float]]) -> Iterator[tuple[Frame, float]]:
    """The frames, with the first and the last repeated: the detector judges those that have neighbours.

    Fast motion in the first two frames may then pass for a cut, which costs these; to miss a cut there costs more.
    """
    last = None
    for frame in frames:
        yield from itertools.repeat(frame, 1 if last else 1 + NUM_NEIGHBOURS)
        last = frame
    if last:
        yield from itertools.repeat(last, NUM_NEIGHBOURS)


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
