"""Frames of one clip: decord first, PyAV where decord cannot be trusted. Runs where it can be killed: see `reader.py`.

A clip is sampled by presentation time: each sample is the frame that a player shows at that moment. decord 0.6 fails
in silence in known ways, so that its result is checked before it is believed:
    frames that an edit list drops (stream copies)      first timestamp below zero, all pictures shifted
    lost frames, a change of size                       the last good picture again
    AVI without presentation times                      timestamps that do not grow
    some widths below 80 pixels                         4 or 6 channels
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import ClipRejected, RejectReason
from pipeline.stages import container as media

BACKENDS = ("auto", "decord", "pyav")
TIME_TOLERANCE_S = (
    1.3e-3  # Matroska rounds to milliseconds; not round itself, or samples at round times fall on its edge
)
CHUNK_BYTES = 64 << 20  # full-size frames that decord may hold at once

Frame = NDArray[np.uint8]


class Clip(NamedTuple):
    """Decoded frames.

    Attributes:
        video_u8: t h w 3, RGB.
        times_s: (t,) presentation time of each frame in the file; equal neighbours where one frame is sampled twice.
        backend: "decord", "pyav" or "image".
    """

    video_u8: NDArray[np.uint8]
    times_s: NDArray[np.float64]
    backend: str


class Window(NamedTuple):
    """What to sample: times, and the size of the result (None: as it is in the file)."""

    start_s: float
    end_s: float
    fps: float | None
    num_frames: int | None
    size: tuple[int, int] | None  # rows, columns

    def samples_s(self) -> NDArray[np.float64] | None:
        """Times to sample, or None where every frame of the window is asked for."""
        if self.fps is None:
            return None
        num_frames = self.num_frames or max(1, round((self.end_s - self.start_s) * self.fps))
        return self.start_s + np.arange(num_frames) / self.fps


def read_clip(
    uri: str,
    start_s: float,
    end_s: float,
    fps: float | None = None,
    height_px: int | None = None,
    width_px: int | None = None,
    num_frames: int | None = None,
    backend: str = "auto",
) -> Clip:
    """Decode the window [start_s, end_s) of a video, or a still picture as a clip of one frame.

    Args:
        uri: path or fsspec URL.
        start_s: presentation time of the first sample.
        end_s: exclusive.
        fps: sampling rate; None takes every frame of the window.
        height_px, width_px: size of the result, both or none; rotation metadata is applied before.
        num_frames: how many frames must come out.
        backend: "decord", "pyav", or "auto": decord, then PyAV when decord fails or its result does not hold.

    Raises:
        ClipRejected: no backend gives the frames that were asked for.
        ValueError: an unknown backend, or one of height_px and width_px alone.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: must be one of {BACKENDS}")
    if (height_px is None) != (width_px is None):
        raise ValueError(f"height_px={height_px}, width_px={width_px}: give both or none")
    size = None if height_px is None or width_px is None else (height_px, width_px)
    window = Window(start_s, end_s, fps, num_frames, size)
    if media.is_image(uri):
        clip = _read_image(uri, window)
    elif backend == "auto":
        clip = _read_either(uri, window)
    else:
        clip = {"decord": _read_decord, "pyav": _read_pyav}[backend](media.open_file(uri), window)
    if num_frames is not None and len(clip.video_u8) != num_frames:
        raise ClipRejected(RejectReason.WRONG_FRAMES, f"{len(clip.video_u8)} frames, {num_frames} announced")
    return clip


def _read_either(uri: str, window: Window) -> Clip:
    file = media.open_file(uri)
    try:
        return _read_decord(file, window)
    except Exception as error:  # decord has no one type of error, or is not there: PyAV decides
        decord_said = f"{error} ".splitlines()[0]
    try:
        return _read_pyav(file, window)
    except ClipRejected as verdict:
        raise ClipRejected(verdict.reason, f"{verdict.detail} (decord: {decord_said})") from verdict


def _read_image(uri: str, window: Window) -> Clip:
    with media.open_image(media.open_file(uri)) as image:
        frame = np.asarray(media.upright(image))
    return Clip(_resize(frame, window.size)[None], np.zeros(1), "image")


def _resize(frame: Frame, size: tuple[int, int] | None) -> Frame:
    """One frame, h w 3, at `size`: triangle filter over the whole footprint, so that it does not alias."""
    if size is None or frame.shape[:2] == size:
        return frame
    return np.asarray(Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.BILINEAR))


# --- decord ---------------------------------------------------------------------------------------------------------


def _read_decord(file: media.File, window: Window) -> Clip:
    import decord

    with media.open_video(file) as (_, stream):  # FFmpeg 8 with an allow-list looks at the file first
        start_s = media.start_s(stream)
        sides = sorted((stream.height, stream.width))
    media.rewind(file)
    reader = decord.VideoReader(file, ctx=decord.cpu(0), num_threads=1)  # more threads read ahead without limit
    times_s = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)
    if times_s[0] < -TIME_TOLERANCE_S or not np.all(np.diff(times_s) > 0):
        raise ClipRejected(RejectReason.BAD_TIMES, "timestamps before the start, or not growing")
    times_s += start_s  # decord counts from the stream's start
    indices = _choose(times_s, window)
    unique, where = np.unique(indices, return_inverse=True)
    frames = np.stack(list(_decord_frames(reader, unique, sides, window.size)))
    if any(np.array_equal(one, other) for one, other in itertools.pairwise(frames)):
        raise ClipRejected(RejectReason.WRONG_FRAMES, "two frames of the file are equal: lost ones may be repeated")
    return Clip(frames[where], times_s[indices], "decord")


def _choose(times_s: NDArray[np.float64], window: Window) -> NDArray[np.int64]:
    """Indices of the frames to take, from the presentation times of all."""
    samples_s = window.samples_s()
    if samples_s is None:
        inside = (times_s >= window.start_s - TIME_TOLERANCE_S) & (times_s < window.end_s - TIME_TOLERANCE_S)
        indices = np.flatnonzero(inside)
        if not len(indices):
            raise ClipRejected(RejectReason.NO_FRAMES, f"no frame in [{window.start_s}, {window.end_s}) s")
        return indices
    indices = np.searchsorted(times_s, samples_s + TIME_TOLERANCE_S, side="right") - 1
    if indices[0] < 0:
        raise _starts_late(times_s[0], samples_s[0])
    if indices[-1] == len(times_s) - 1:
        _check_reaches(times_s[-1], samples_s[-1], window)
    return indices


def _decord_frames(
    reader: Iterable[Frame], indices: NDArray[np.int64], sides: list[int], size: tuple[int, int] | None
) -> Iterator[Frame]:
    frames_per_chunk = max(1, CHUNK_BYTES // (3 * sides[0] * sides[1]))
    for first in range(0, len(indices), frames_per_chunk):
        chunk = reader.get_batch(indices[first : first + frames_per_chunk]).asnumpy()  # type: ignore[attr-defined]
        if chunk.shape[-1] != 3 or sorted(chunk.shape[1:3]) != sides:
            raise ClipRejected(RejectReason.WRONG_FRAMES, f"frames of shape {chunk.shape[1:]}, sides should be {sides}")
        yield from (_resize(frame, size) for frame in chunk)


# --- PyAV -----------------------------------------------------------------------------------------------------------


class _SeekOvershootError(Exception):
    """The seek landed behind the first sample."""


def _read_pyav(file: media.File, window: Window) -> Clip:
    try:
        with media.open_video(file) as (container, stream):
            return _decode(container, stream, window, seek=window.start_s > media.start_s(stream))
    except _SeekOvershootError:
        with media.open_video(file) as (container, stream):
            return _decode(container, stream, window, seek=False)


def _decode(container: InputContainer, stream: VideoStream, window: Window, seek: bool) -> Clip:
    if seek:
        container.seek(media.stamp(stream, window.start_s), stream=stream)
    samples_s = window.samples_s()
    stored = _in_time_order(container.decode(stream))
    chosen = _inside(stored, window) if samples_s is None else _on_screen(stored, samples_s, window, seek)
    reformatter = VideoReformatter()  # one for the clip: it keeps its conversion tables
    frames, times_s = [], []
    last: av.VideoFrame | None = None
    for frame in chosen:
        if frame is not last:
            picture = _resize(_to_rgb(frame, stream, reformatter), window.size)
        frames.append(picture)
        times_s.append(frame.time)
        last = frame
    if not frames:
        raise ClipRejected(RejectReason.NO_FRAMES, f"no frame in [{window.start_s}, {window.end_s}) s")
    return Clip(np.stack(frames), np.array(times_s), "pyav")


def _in_time_order(frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    before_s = -np.inf
    for frame in frames:
        if frame.time is None or frame.time <= before_s:
            raise ClipRejected(RejectReason.BAD_TIMES, f"a frame at {frame.time} s after one at {before_s:.3f} s")
        before_s = frame.time
        yield frame


def _inside(frames: Iterable[av.VideoFrame], window: Window) -> Iterator[av.VideoFrame]:
    for frame in frames:
        if frame.time >= window.end_s - TIME_TOLERANCE_S:
            return
        if frame.time >= window.start_s - TIME_TOLERANCE_S:
            yield frame


def _on_screen(
    frames: Iterable[av.VideoFrame], samples_s: NDArray[np.float64], window: Window, sought: bool
) -> Iterator[av.VideoFrame]:
    """For each sample, the frame that a player shows at that time."""
    shown: av.VideoFrame | None = None
    num_done = 0
    for frame in frames:
        while num_done < len(samples_s) and samples_s[num_done] < frame.time - TIME_TOLERANCE_S:
            if shown is None:
                raise _SeekOvershootError if sought else _starts_late(frame.time, samples_s[0])
            yield shown
            num_done += 1
        if num_done == len(samples_s):
            return
        shown = frame
    if shown is None:
        no_frame = ClipRejected(RejectReason.NO_FRAMES, "not a single frame can be decoded")
        raise _SeekOvershootError if sought else no_frame
    _check_reaches(shown.time, samples_s[-1], window)
    for _ in range(num_done, len(samples_s)):
        yield shown


def _to_rgb(frame: av.VideoFrame, stream: VideoStream, reformatter: VideoReformatter) -> Frame:
    """8-bit RGB, h w 3, turned as the file says (decord does that by itself)."""
    if frame.is_corrupt or (frame.height, frame.width) != (stream.height, stream.width):
        found = "damaged" if frame.is_corrupt else f"{frame.height}x{frame.width}"
        announced = f"{stream.height}x{stream.width}"
        raise ClipRejected(RejectReason.WRONG_FRAMES, f"the frame at {frame.time:.3f} s is {found}, not {announced}")
    picture = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return np.rot90(picture, round(frame.rotation / 90) % 4)


# --- verdicts both share --------------------------------------------------------------------------------------------


def _starts_late(first_s: float, sample_s: float) -> ClipRejected:
    return ClipRejected(
        RejectReason.WRONG_FRAMES, f"frames begin at {first_s:.3f} s, after the sample at {sample_s:.3f} s"
    )


def _check_reaches(last_s: float, sample_s: float, window: Window) -> None:
    """Reject a stream that ends before the window does."""
    assert window.fps is not None
    if sample_s - last_s > 1 / window.fps + TIME_TOLERANCE_S:
        raise ClipRejected(
            RejectReason.WRONG_FRAMES, f"frames end at {last_s:.3f} s, before the sample at {sample_s:.3f} s"
        )
