"""What is asked of a clip reader, which frames of a file answer it, and what comes back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ClipRejected, RejectReason

# Matroska rounds to milliseconds; not round itself, or samples at round times would fall on its edge.
TIME_TOLERANCE_S = 1.3e-3
MAX_CLIP_BYTES = 2 << 30  # 65 s of 480p24, 10 s of 1080p30: no training clip is larger

Video = NDArray[np.uint8]
Times = NDArray[np.float64]


class Clip(NamedTuple):
    """Decoded frames.

    Attributes:
        video_u8: t h w 3, RGB.
        times_s: (t,) presentation time of each frame in the file; equal neighbours where one frame is sampled twice.
        backend: "pyav", "torchcodec", "decord" or "image".
    """

    video_u8: Video
    times_s: Times
    backend: str


class Window(NamedTuple):
    """What to sample: times, and the size of the result (None: as it is in the file).

    A clip is sampled by presentation time: each sample is the frame that a player shows at that moment.
    """

    start_s: float
    end_s: float
    fps: float | None
    num_frames: int | None
    size: tuple[int, int] | None  # rows, columns

    def choose(self, times_s: Times) -> NDArray[np.int64]:
        """Indices of the frames to take, one for each sample.

        Args:
            times_s: (n,) presentation times, growing: all that the file shows, or a stretch that holds the window.

        Raises:
            ClipRejected: NO_FRAMES, none lies in the window; WRONG_FRAMES, the frames begin after the window does or
                end before it.
        """
        if not len(times_s):
            raise ClipRejected(RejectReason.NO_FRAMES, "not a single frame can be decoded")
        tolerance_s = (
            min(TIME_TOLERANCE_S, 0.4 * float(np.median(np.diff(times_s)))) if len(times_s) > 1 else TIME_TOLERANCE_S
        )
        if self.fps is None:
            return self._all_inside(times_s, tolerance_s)
        samples_s = self.start_s + np.arange(self._num_samples) / self.fps
        indices = np.searchsorted(times_s, samples_s + tolerance_s, side="right") - 1
        if indices[0] < 0:
            found = f"frames begin at {times_s[0]:.3f} s, after the sample at {samples_s[0]:.3f} s"
            raise ClipRejected(RejectReason.WRONG_FRAMES, found)
        if samples_s[-1] - times_s[-1] > 1 / self.fps + tolerance_s:
            found = f"frames end at {times_s[-1]:.3f} s, before the sample at {samples_s[-1]:.3f} s"
            raise ClipRejected(RejectReason.WRONG_FRAMES, found)
        return indices

    def _all_inside(self, times_s: Times, tolerance_s: float) -> NDArray[np.int64]:
        inside = (times_s >= self.start_s - tolerance_s) & (times_s < self.end_s - tolerance_s)
        indices = np.flatnonzero(inside)
        if not len(indices):
            raise ClipRejected(RejectReason.NO_FRAMES, f"no frame in [{self.start_s}, {self.end_s}) s")
        return indices

    @property
    def last_s(self) -> float:
        """No frame that begins after this time is asked for."""
        return self.end_s if self.fps is None else self.start_s + (self._num_samples - 1) / self.fps

    @property
    def _num_samples(self) -> int:
        assert self.fps is not None
        return self.num_frames or max(1, round((self.end_s - self.start_s) * self.fps))


def empty_video(num_frames: int, height_px: int, width_px: int) -> Video:
    """Memory for a clip, t h w 3.

    Raises:
        ClipRejected: TOO_LARGE, above MAX_CLIP_BYTES.
    """
    num_bytes = 3 * num_frames * height_px * width_px
    if num_bytes > MAX_CLIP_BYTES:
        clip = f"{num_frames} frames of {height_px}x{width_px} px are {num_bytes:,} bytes"
        raise ClipRejected(RejectReason.TOO_LARGE, f"{clip}, the limit is {MAX_CLIP_BYTES:,}: ask for less")
    return np.empty((num_frames, height_px, width_px, 3), np.uint8)
