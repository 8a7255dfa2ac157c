"""Opening media files that nobody vouches for: what may be opened, and which stream of it is the picture."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

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

_MEMBER = re.compile(r"(?P<tar>.*\.tar)#(?P<offset>\d+)\+(?P<size>\d+)#.+", re.DOTALL)

File = str | BinaryIO
COPY_BYTES = 16 << 20  # fetched at a time of a remote file that is needed whole
RANGE_BYTES = 1 << 20  # of one that is read in parts


def suffix(uri: str) -> str:
    """The file's extension, in small letters with its dot."""
    return PurePosixPath(uri).suffix.lower()


def is_image(uri: str) -> bool:
    """Whether the file is a still picture, by its name."""
    return suffix(uri) in IMAGE_SUFFIXES


def member_uri(tar: str, offset_bytes: int, size_bytes: int, name: str) -> str:
    """How a file that lies in a tar is called: `open_file` reads it in place."""
    return f"{tar}#{offset_bytes}+{size_bytes}#{name}"


class _Slice(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, offset_bytes: int, size_bytes: int) -> None:
        self._file, self._offset, self._size, self._place = file, offset_bytes, size_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._place)
        data = self._file.read(max(0, min(len(buffer), self._size - self._place)))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


@contextlib.contextmanager
def open_file(uri: str, block_bytes: int = RANGE_BYTES) -> Iterator[File]:
    """A local file's path, or a remote file or a tar's member that is read by ranges, as a decoder seeks.

    Args:
        uri: path or fsspec URL.
        block_bytes: of a remote file, fetched at a time; some blocks are kept.

    Raises:
        ClipRejected: UNREADABLE, the remote file cannot be fetched.
    """
    member = _MEMBER.fullmatch(uri)
    if "://" not in uri and not member:
        yield uri
        return
    try:
        fs, path = fsspec.core.url_to_fs(member["tar"] if member else uri)
        with fs.open(path, "rb", block_size=block_bytes, cache_type="blockcache") as remote:
            if member:
                yield io.BufferedReader(_Slice(remote, int(member["offset"]), int(member["size"])))
            else:
                yield remote
    except ClipRejected:
        raise
    except Exception as error:
        if _is_remote_error(error):
            raise ClipRejected(RejectReason.UNREADABLE, f"{type(error).__name__}: {error}") from error
        raise


def _is_remote_error(error: Exception) -> bool:
    """Whether a file system raised it: an OSError, or what an SDK that this module does not know has for that."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in (
        "botocore",
        "aiohttp",
        "google",
        "gcsfs",
    )


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[str]:
    """The path of a local file, or of a temporary copy of a remote one, for readers that need all of it.

    Raises:
        ClipRejected: UNREADABLE, the remote file cannot be fetched.
    """
    with open_file(uri, COPY_BYTES) as file, contextlib.ExitStack() as stack:
        if not isinstance(file, str):
            copy = stack.enter_context(tempfile.NamedTemporaryFile(suffix=suffix(uri)))
            shutil.copyfileobj(file, copy, COPY_BYTES)
            copy.flush()
        yield file if isinstance(file, str) else copy.name


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
