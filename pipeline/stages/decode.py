"""The clip reader: frames of any window of any file, exact or refused. Runs where it can be killed: see `reader.py`.

PyAV first: it tells damage. torchcodec, where it is installed, and decord are asked when PyAV does not work on a file;
what they give is checked against the packets' times.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipeline.errors import ClipRejected, RejectReason
from pipeline.stages import container as media
from pipeline.stages import decode_indexed, decode_pyav, files
from pipeline.stages.window import Clip, Window

READERS: dict[str, Callable[[str, Window], Clip]] = {
    "pyav": decode_pyav.read,
    "torchcodec": decode_indexed.read_torchcodec,
    "decord": decode_indexed.read_decord,
}
BACKENDS = ("auto", *READERS)


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
        uri: path or fsspec URL; remote files are read by ranges.
        start_s: presentation time of the first sample.
        end_s: exclusive.
        fps: sampling rate; None takes every frame of the window.
        height_px, width_px: size of the result, both or none; rotation metadata is applied before.
        num_frames: how many frames must come out.
        backend: "pyav", "torchcodec", "decord", or "auto": the first of these that works on the file.

    Raises:
        ClipRejected: the file does not hold undamaged frames for the whole window, or they take too much memory.
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
    else:
        clip = _read_any(uri, window) if backend == "auto" else READERS[backend](uri, window)
    if num_frames is not None and len(clip.video_u8) != num_frames:
        raise ClipRejected(RejectReason.WRONG_FRAMES, f"{len(clip.video_u8)} frames, {num_frames} announced")
    return clip


def _read_any(uri: str, window: Window) -> Clip:
    """The first backend's clip. A verdict on the content is final: who sees no damage where another does, hides it."""
    said: list[str] = []
    for name, read in READERS.items():
        try:
            return read(uri, window)
        except ClipRejected as verdict:
            if verdict.reason != RejectReason.UNREADABLE:
                detail = f"{verdict.detail} ({'; '.join(said)})" if said else verdict.detail
                raise ClipRejected(verdict.reason, detail) from verdict
            said.append(f"{name}: {verdict.detail}")
        except ModuleNotFoundError:
            continue
        except MemoryError:
            raise  # not the file's fault alone: the process is not to be trusted any more
        except Exception as error:  # FFmpeg's wrappers have no one type of error
            said.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    raise ClipRejected(RejectReason.UNREADABLE, "; ".join(said))


def _read_image(uri: str, window: Window) -> Clip:
    with files.open_file(uri) as file, media.open_image(file) as image:
        frame = decode_indexed.resize(np.asarray(media.upright(image)), window.size)
    return Clip(frame[None], np.zeros(1), "image")
