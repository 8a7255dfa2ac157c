"""Frames of one clip by decoders that count frames: torchcodec and decord. What they give is checked.

decord 0.6 fails in silence in known ways:
    frames that an edit list drops (stream copies)      all pictures shifted
    lost frames, a change of size                       the last good picture again
    AVI without presentation times                      timestamps that do not grow
    some widths below 80 pixels                         4 or 6 channels
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import ClipRejected, RejectReason
from pipeline.stages import container as media
from pipeline.stages import files
from pipeline.stages.packets import walk_through
from pipeline.stages.window import TIME_TOLERANCE_S, Clip, Times, Video, Window, empty_video

CHUNK_BYTES = 64 << 20  # full-size frames that are held at once

Indices = NDArray[np.int64]
Chunk = tuple[Times, Video]  # presentation times, frames
Decoder = Callable[[str, float, Iterator[Indices]], Iterator[Chunk]]


def read_torchcodec(uri: str, window: Window) -> Clip:
    """Frames of a window of a video.

    Raises:
        ClipRejected: the file cannot be opened, or the frames are not those that its packets announce.
        ModuleNotFoundError: torchcodec is not installed.
    """
    return _read(uri, window, "torchcodec", _torchcodec)


def read_decord(uri: str, window: Window) -> Clip:
    """As `read_torchcodec`, with decord.

    Raises:
        ClipRejected: as there.
        ModuleNotFoundError: decord is not installed.
    """
    return _read(uri, window, "decord", _decord)


def _torchcodec(path: str, start_s: float, chunks: Iterator[Indices]) -> Iterator[Chunk]:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
    for chunk in chunks:
        batch = decoder.get_frames_at(chunk.tolist())
        yield batch.pts_seconds.numpy(), batch.data.numpy()


def _decord(path: str, start_s: float, chunks: Iterator[Indices]) -> Iterator[Chunk]:
    import decord

    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)  # more threads read ahead without limit
    for chunk in chunks:
        times_s = reader.get_frame_timestamp(chunk)[:, 0].astype(np.float64)  # from the stream's start
        yield start_s + times_s, reader.get_batch(chunk).asnumpy()


def _read(uri: str, window: Window, backend: str, decoder: Decoder) -> Clip:
    with files.local_copy(uri) as path:
        with media.open_video(path) as (container, stream):  # the allow-list of formats, which the others do not have
            walk = walk_through(container, stream)
            times_s, start_s = np.array(walk.times_s), media.start_s(stream)
            shape = (stream.width, stream.height) if walk.rotation_deg % 180 else (stream.height, stream.width)
        indices = window.choose(times_s)
        unique, where = np.unique(indices, return_inverse=True)
        frames_per_chunk = max(1, CHUNK_BYTES // (3 * shape[0] * shape[1]))
        chunks = (unique[first : first + frames_per_chunk] for first in range(0, len(unique), frames_per_chunk))
        video_u8 = empty_video(len(unique), *(window.size or shape))
        num_done = 0
        for found_s, frames in decoder(path, start_s, chunks):
            stop = num_done + len(frames)
            _check(frames, shape, found_s, times_s[unique[num_done:stop]])
            for place, frame in enumerate(frames, start=num_done):
                video_u8[place] = resize(frame, window.size)
            num_done = stop
    if any(np.array_equal(one, other) for one, other in itertools.pairwise(video_u8)):
        raise ClipRejected(RejectReason.WRONG_FRAMES, "two frames of the file are equal: lost ones may be repeated")
    return Clip(video_u8[where] if len(unique) < len(where) else video_u8, times_s[indices], backend)


def _check(frames: Video, shape: tuple[int, int], found_s: Times, announced_s: Times) -> None:
    if frames.shape[1:] != (*shape, 3):
        raise ClipRejected(RejectReason.WRONG_FRAMES, f"frames of shape {frames.shape[1:]}, not {(*shape, 3)}")
    if not np.allclose(found_s, announced_s, rtol=0, atol=TIME_TOLERANCE_S):
        off_s = np.abs(found_s - announced_s).max()
        raise ClipRejected(RejectReason.WRONG_FRAMES, f"frames are up to {off_s:.3f} s from where their packets are")


def resize(frame: NDArray[np.uint8], size: tuple[int, int] | None) -> NDArray[np.uint8]:
    """One frame, h w 3, at `size`: triangle filter over the whole footprint, so that it does not alias."""
    if size is None or frame.shape[:2] == size:
        return frame
    return np.asarray(Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.BILINEAR))
