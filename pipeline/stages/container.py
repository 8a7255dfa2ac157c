"""Opening media files that nobody vouches for: what may be opened, and which stream of it is the picture."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import PurePosixPath

import av
import fsspec
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.errors import ClipRejected, RejectReason

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".m2ts", ".mpg", ".mpeg", ".flv", ".3gp", ".ogv", ".gif"}
)

# Containers that hold their own data. Playlists (HLS, concat, SDP) make FFmpeg open whatever files or hosts they name.
_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,avi,mpegts,mpeg,flv,ogg,gif,asf,mxf,h264,hevc,ivf,mp3,wav,flac,aac",
}

File = str | io.BytesIO


def suffix(uri: str) -> str:
    """The file's extension, in small letters with its dot."""
    return PurePosixPath(uri).suffix.lower()


def is_image(uri: str) -> bool:
    """Whether the file is a still picture, by its name."""
    return suffix(uri) in IMAGE_SUFFIXES


def open_file(uri: str) -> File:
    """A local file's path, or the whole content of a remote one, for decoders that seek.

    Raises:
        ClipRejected: UNREADABLE, the remote file cannot be fetched.
    """
    if "://" not in uri:
        return uri
    try:
        with fsspec.open(uri) as remote:
            return io.BytesIO(remote.read())
    except OSError as error:
        raise ClipRejected(RejectReason.UNREADABLE, f"{type(error).__name__}: {error}") from error


def rewind(file: File) -> None:
    """Let the next decoder begin at the file's begin."""
    if not isinstance(file, str):
        file.seek(0)


@contextlib.contextmanager
def open_video(file: File) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its best video stream; one decoder thread, since clips are decoded side by side.

    Raises:
        ClipRejected: UNREADABLE, no demuxer knows the file or its data ends in the middle; NOT_VIDEO, it holds no
            moving picture (audio only, cover art).
    """
    rewind(file)
    try:
        with av.open(file, mode="r", options=_OPTIONS) as container:
            stream = _best_stream(container)
            stream.codec_context.thread_count = 1
            yield container, stream
    except av.FFmpegError as error:
        raise ClipRejected(RejectReason.UNREADABLE, f"{type(error).__name__}: {error.strerror}") from error


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
    return stream


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
