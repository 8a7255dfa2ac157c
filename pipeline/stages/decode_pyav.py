"""Frames of one clip by PyAV: the packets tell the times, so that only what must be decoded is decoded.

One pass over the packets from the keyframe before the window to its end tells every presentation time, and so which
frames will be taken. Then the same packets are decoded: those that no other frame needs and nobody asked for are
skipped, frames in between are never converted, and nothing behind the last one taken is touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from pipeline.errors import ClipRejected, RejectReason
from pipeline.stages import container as media
from pipeline.stages import files
from pipeline.stages.packets import from_keyframe, in_order, presentation
from pipeline.stages.window import Clip, Video, Window, empty_video

PLANES_OF_8_BITS = {
    name: name for name in ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "nv12")
} | {f"yuv{chroma}p{depth}le": f"yuv{chroma}p" for chroma in (420, 422, 444) for depth in (10, 12)}
SKIPPING_CODECS = frozenset({"h264", "hevc"})  # others look at `skip_frame` once for all packets, or not at all
REORDER_S = 0.5  # a packet's decoding time may be this much later than its presentation time in odd files


def read(uri: str, window: Window) -> Clip:
    """Frames of a window of a video.

    Raises:
        ClipRejected: the file cannot be opened, or does not hold undamaged frames for the whole window.
    """
    with files.open_file(uri) as file:
        clip = _read_from(file, window, seek=True)
        if clip is None:  # the file's index is wrong: from the begin
            clip = _read_from(file, window, seek=False)
        assert clip is not None
        return clip


def _read_from(file: files.File, window: Window, seek: bool) -> Clip | None:
    """The clip, or None where the seek landed behind the window's first frame."""
    with media.open_video(file, quick=True) as (container, stream), media.no_concealed_damage():
        seek = seek and window.start_s > media.start_s(stream)
        if seek:
            container.seek(media.stamp(stream, window.start_s), stream=stream)
        packets = _packets_of(container, stream, window)
        stamps = in_order([presentation(packet) for packet in packets if not packet.is_discard])
        times_s = np.array([media.seconds(stream, stamp) for stamp in stamps])
        if seek and not (len(times_s) and times_s[0] <= window.start_s):
            return None
        indices = window.choose(times_s)
        return Clip(_decode(packets, stream, stamps, indices, window), times_s[indices], "pyav")


def _packets_of(container: InputContainer, stream: VideoStream, window: Window) -> list[Packet]:
    """From a keyframe on, until no later one can be in the window."""
    stop_s = window.last_s + REORDER_S
    packets = []
    for packet in from_keyframe(container.demux(stream)):
        packets.append(packet)
        if packet.dts is not None and media.seconds(stream, packet.dts) > stop_s:
            break
    return packets


def _decode(
    packets: Sequence[Packet], stream: VideoStream, stamps: list[int], indices: NDArray[np.int64], window: Window
) -> Video:
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(stamps[index], []).append(place)
    last = max(number for number, packet in enumerate(packets) if presentation(packet) in places)
    picture = _Picture(stream, window)
    video_u8: Video | None = None
    num_found = 0
    can_skip = stream.codec_context.codec.canonical_name in SKIPPING_CODECS
    for packet in [*packets[: last + 1], None]:
        wanted = packet is None or presentation(packet) in places
        stream.codec_context.skip_frame = "DEFAULT" if wanted or not can_skip else "NONREF"
        for frame in stream.codec_context.decode(packet):
            where = places.pop(frame.pts, None) if frame.pts is not None else None
            if where is None:
                continue
            if video_u8 is None:
                video_u8 = empty_video(len(indices), *picture.size(frame))
            picture.write(frame, video_u8[where[0]])
            video_u8[where[1:]] = video_u8[where[0]]
            num_found += 1
    if places or video_u8 is None:
        lost = f"{len(places)} of {len(places) + num_found} frames cannot be decoded"
        raise ClipRejected(RejectReason.WRONG_FRAMES, lost)
    return video_u8


class _Picture:
    """From a decoder's frame to 8-bit RGB at the window's size, turned as the file says."""

    def __init__(self, stream: VideoStream, window: Window) -> None:
        self._stored = (stream.height, stream.width)
        self._size = window.size
        self._scaler, self._converter = VideoReformatter(), VideoReformatter()  # they keep their tables for the clip

    def size(self, frame: av.VideoFrame) -> tuple[int, int]:
        """Rows and columns of the result."""
        rows, columns = self._stored
        return self._size or ((columns, rows) if _quarter_turns(frame) % 2 else (rows, columns))

    def write(self, frame: av.VideoFrame, into: Video) -> None:
        if frame.is_corrupt or (frame.height, frame.width) != self._stored:
            found = "damaged" if frame.is_corrupt else f"{frame.height}x{frame.width} px"
            announced = f"{self._stored[0]}x{self._stored[1]} px"
            raise ClipRejected(
                RejectReason.WRONG_FRAMES, f"the frame at {frame.time:.3f} s is {found}, not {announced}"
            )
        media.check_range(frame.color_trc)
        turns = _quarter_turns(frame)
        rows, columns = into.shape[:2] if turns % 2 == 0 else into.shape[1::-1]
        plane = self._to_rgb(frame, rows, columns).planes[0]
        lines = np.frombuffer(memoryview(plane), np.uint8).reshape(rows, plane.line_size)
        into[:] = np.rot90(lines[:, : 3 * columns].reshape(rows, columns, 3), turns)

    def _to_rgb(self, frame: av.VideoFrame, rows: int, columns: int) -> av.VideoFrame:
        same = {"interpolation": Interpolation.BILINEAR, "threads": 1}
        planes = PLANES_OF_8_BITS.get(frame.format.name)
        if planes is not None:
            # Scaled and converted in one step, swscale takes three times as long and darkens by a level or more; and
            # 10 bits converted in one step have other colours at edges than the same picture in 8 bits.
            frame = self._scaler.reformat(frame, columns, rows, planes, **same)
        return self._converter.reformat(frame, columns, rows, "rgb24", **same)


def _quarter_turns(frame: av.VideoFrame) -> int:
    return round(frame.rotation / 90) % 4
