"""What a video stream's packets tell without being decoded: the number and the times of its frames."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from pipeline.errors import ClipRejected, RejectReason
from pipeline.stages import container as media


def presentation(packet: Packet) -> int | None:
    """When the packet's frame is shown, in the stream's unit; None where the file does not tell."""
    if packet.pts is None and not packet.stream.codec_context.has_b_frames:
        return packet.dts  # frames are shown as they are decoded
    return packet.pts


def from_keyframe(packets: Iterable[Packet]) -> Iterator[Packet]:
    """The packets that can be decoded: from the first keyframe on, without those that are shown before it.

    A stream that was cut, or sought in, begins with packets that need frames from before.
    """
    first: int | None = None
    started = False
    for packet in packets:
        if not packet.size:
            continue  # the demuxer's end mark
        if not started and packet.is_keyframe:
            started, first = True, presentation(packet)
        stamp = presentation(packet)
        if started and (first is None or stamp is None or stamp >= first):
            yield packet


class Walk(NamedTuple):
    """All packets of a stream.

    Attributes:
        num_packets: also of frames that are decoded and not shown.
        times_s: presentation times of the frames that are shown, growing.
        rotation_deg: counter-clockwise turn that the file asks for, a multiple of 90.
    """

    num_packets: int
    times_s: list[float]
    rotation_deg: int


def walk_through(container: InputContainer, stream: VideoStream) -> Walk:
    """Read all packets; decode up to the first frame, with which FFmpeg tells the rotation.

    Raises:
        ClipRejected: NO_FRAMES, BAD_TIMES, or WRONG_FRAMES where FFmpeg reports damage.
    """
    num_packets, stamps, rotation_deg = 0, [], None
    with media.no_concealed_damage():
        for packet in from_keyframe(container.demux(stream)):
            if rotation_deg is None:
                rotation_deg = next((round(frame.rotation / 90) * 90 for frame in packet.decode()), None)
            num_packets += 1
            if not packet.is_discard:
                stamps.append(presentation(packet))
        if rotation_deg is None:
            flushed = stream.codec_context.decode(None)
            rotation_deg = next((round(frame.rotation / 90) * 90 for frame in flushed), None)
    if not stamps or rotation_deg is None:
        raise ClipRejected(RejectReason.NO_FRAMES, "not a single frame can be decoded")
    return Walk(num_packets, [media.seconds(stream, stamp) for stamp in in_order(stamps)], rotation_deg)


def in_order(stamps: list[int | None]) -> list[int]:
    """Presentation times, growing.

    Raises:
        ClipRejected: BAD_TIMES, some are missing or equal.
    """
    known = sorted({stamp for stamp in stamps if stamp is not None})
    if len(known) < len(stamps):
        raise ClipRejected(RejectReason.BAD_TIMES, f"{len(stamps)} frames have {len(known)} presentation times")
    return known
