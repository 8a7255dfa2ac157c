"""Opening media files that nobody vouches for: what may be opened, and which stream of it is the picture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.errors import ClipRejected, RejectReason
from pipeline.stages.files import File, suffix

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".m2ts", ".mpg", ".mpeg", ".flv", ".3gp", ".ogv", ".gif"}
)

MEDIA_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES

# Containers that hold their own data. Playlists (HLS, concat, SDP) make FFmpeg open whatever files or hosts they name.
_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,avi,mpegts,mpeg,flv,ogg,gif,asf,mxf,h264,hevc,ivf,mp3,wav,flac,aac",
}

_SKIP_ALL = [{"skip_frame": "all"}] * 8  # for each of so many streams, while the file is being opened

# Messages at the level of errors that say nothing about the picture.
_HARMLESS = ("chapter track",)

PQ, HLG = 16, 18  # transfer characteristics of ITU-T H.273: more light than 8 bits of RGB hold


def is_image(uri: str) -> bool:
    """Whether the file is a still picture, by its name."""
    return suffix(uri) in IMAGE_SUFFIXES


@contextlib.contextmanager
def open_video(file: File, quick: bool = False) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its best video stream; one decoder thread, since clips are decoded side by side.

    Args:
        file: what `open_file` gave.
        quick: do not decode the first frames of an MP4 to learn what its index says anyway. Their colours and their
            pixel format stay unknown until a frame is decoded.

    Raises:
        ClipRejected: UNREADABLE, no demuxer knows the file or its data ends in the middle; NOT_VIDEO, it holds no
            moving picture (audio only, cover art); HDR; BAD_TIMES, an AVI with reordered frames.
    """
    if not isinstance(file, str):
        file.seek(0)
    try:
        stream_options: Any = _SKIP_ALL if quick and _is_mp4(file) else None
        with av.open(file, mode="r", options=_OPTIONS, stream_options=stream_options) as container:
            stream = _best_stream(container)
            stream.codec_context.thread_count = 1
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise ClipRejected(RejectReason.UNREADABLE, f"{type(error).__name__}: {error.strerror}") from error


def _is_mp4(file: File) -> bool:
    with Path(file).open("rb") if isinstance(file, str) else contextlib.nullcontext(file) as content:
        begin = content.read(8)
        content.seek(0)
    return begin[4:] == b"ftyp"


def start_s(stream: VideoStream) -> float:
    """Presentation time at which the stream begins."""
    return seconds(stream, stream.start_time or 0)


def seconds(stream: VideoStream, stamp: int) -> float:
    """A stream's timestamp in seconds."""
    assert stream.time_base is not None
    return float(stamp * stream.time_base)


def stamp(stream: VideoStream, time_s: float) -> int:
    """A time as the stream's timestamp."""
    assert stream.time_base is not None
    return round(time_s / stream.time_base)


def _best_stream(container: InputContainer) -> VideoStream:
    stream = container.streams.best("video")
    if stream is None:
        kinds = ", ".join(sorted({other.type for other in container.streams}))
        raise ClipRejected(RejectReason.NOT_VIDEO, f"no video stream, only: {kinds or 'nothing'}")
    assert isinstance(stream, VideoStream)
    if stream.disposition & Disposition.attached_pic:
        raise ClipRejected(RejectReason.NOT_VIDEO, "the only picture is cover art")
    if stream.codec_context is None or not stream.width or not stream.height:
        raise ClipRejected(RejectReason.NOT_VIDEO, "the video stream has no decoder or no size")
    check_range(stream.codec_context.color_trc)
    if container.format.name == "avi" and stream.codec_context.has_b_frames:
        detail = "AVI does not tell when reordered frames (B-frames) are shown: encode the file again"
        raise ClipRejected(RejectReason.BAD_TIMES, detail)
    return stream


def check_range(color_trc: int) -> None:
    """Reject more light than 8 bits of RGB hold.

    Raises:
        ClipRejected: HDR.
    """
    if color_trc in (PQ, HLG):
        name = "PQ" if color_trc == PQ else "HLG"
        raise ClipRejected(RejectReason.HDR, f"transfer {name}: convert the file to standard range (BT.709) first")


@contextlib.contextmanager
def no_concealed_damage() -> Iterator[None]:
    """Reject what FFmpeg mends in silence: lost references, broken blocks, data that ends in the middle.

    Raises:
        ClipRejected: WRONG_FRAMES, FFmpeg reported an error in the body.
    """
    level, skips = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture() as said:
            yield
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skips)
    for severity, name, message in said:
        if severity <= av.logging.ERROR and not any(harmless in message for harmless in _HARMLESS):
            raise ClipRejected(RejectReason.WRONG_FRAMES, f"damaged: {name}: {' '.join(message.split())}")


@contextlib.contextmanager
def open_image(file: File) -> Iterator[Image.Image]:
    """A still picture, turned upright by its EXIF orientation; decoded only when its pixels are asked for.

    Raises:
        ClipRejected: UNREADABLE, not a picture or damaged.
    """
    try:
        with Image.open(file) as image:
            yield image
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ClipRejected(RejectReason.UNREADABLE, f"{type(error).__name__}: {error}") from error


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Rows and columns of a picture as it is looked at, without decoding it."""
    turned = image.getexif().get(ORIENTATION, 1) >= QUARTER_TURNED
    return (image.width, image.height) if turned else (image.height, image.width)


def upright(image: Image.Image) -> Image.Image:
    """The picture as RGB, as it is looked at."""
    return ImageOps.exif_transpose(image).convert("RGB")


ORIENTATION = 0x0112  # EXIF tag
QUARTER_TURNED = 5  # orientations 5..8 swap rows and columns
