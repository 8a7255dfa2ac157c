"""What a file says about itself, without decoding it: size, rate, times, identity."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import ClipRejected, RejectReason
from pipeline.stages import container as media
from pipeline.stages import files
from pipeline.stages.packets import walk_through


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """Facts about one media file.

    Attributes:
        source_id: hash of the file's content.
        codec: the codec's name.
        height_px: rows as displayed, after rotation.
        width_px: columns as displayed, after rotation.
        pixel_aspect: width of a pixel divided by its height, as displayed.
        rotation_deg: counter-clockwise turn that the file asks for; already applied to the sizes.
        fps: mean rate between the first and the last frame; 0 for a still picture.
        num_frames: frames that the file really holds and shows.
        start_s: presentation time of the first frame.
        end_s: presentation time of the last frame plus one period.
    """

    source_id: str
    codec: str
    height_px: int
    width_px: int
    pixel_aspect: float
    rotation_deg: int
    fps: float
    num_frames: int
    start_s: float
    end_s: float


def inspect(uri: str) -> Probe:
    """Read the facts from the container's packets. Headers lie about counts and durations; packets do not.

    Raises:
        ClipRejected: UNREADABLE, NOT_VIDEO, HDR, NO_FRAMES, BAD_TIMES, or WRONG_FRAMES where frames are missing that
            the header announces or FFmpeg reports damage.
    """
    with files.local_copy(uri) as path:
        try:
            with Path(path).open("rb") as content:
                source_id = hashlib.file_digest(content, "sha256").hexdigest()[:16]
        except OSError as error:
            raise ClipRejected(RejectReason.UNREADABLE, f"{type(error).__name__}: {error.strerror}") from error
        return _inspect_image(path, source_id) if media.is_image(uri) else _inspect_video(path, source_id)


def _inspect_image(path: str, source_id: str) -> Probe:
    with media.open_image(path) as image:
        height_px, width_px = media.upright_size(image)
        codec = (image.format or "image").lower()
    return Probe(
        source_id=source_id,
        codec=codec,
        height_px=height_px,
        width_px=width_px,
        pixel_aspect=1.0,
        rotation_deg=0,
        fps=0.0,
        num_frames=1,
        start_s=0.0,
        end_s=0.0,
    )


def _inspect_video(path: str, source_id: str) -> Probe:
    with media.open_video(path) as (container, stream):
        walk = walk_through(container, stream)
        if walk.num_packets < stream.frames:
            missing = f"{walk.num_packets} frames, the header announces {stream.frames}"
            raise ClipRejected(RejectReason.WRONG_FRAMES, missing)
        start_s, last_s = walk.times_s[0], walk.times_s[-1]
        num_frames = len(walk.times_s)
        fps = (num_frames - 1) / (last_s - start_s) if num_frames > 1 else float(stream.average_rate or 1)
        aspect = float(stream.sample_aspect_ratio or 1) or 1.0
        turned = walk.rotation_deg % 180 != 0
        return Probe(
            source_id=source_id,
            codec=stream.codec_context.codec.canonical_name,
            height_px=stream.width if turned else stream.height,
            width_px=stream.height if turned else stream.width,
            pixel_aspect=1 / aspect if turned else aspect,
            rotation_deg=walk.rotation_deg,
            fps=fps,
            num_frames=num_frames,
            start_s=start_s,
            end_s=last_s + 1 / fps,
        )


def probe(
    row: dict[str, Any], *, inspect: Callable[[str], Probe], max_source_pixels_px: int, max_source_duration_s: float
) -> dict[str, Any]:
    """The row with `probe`: the facts about its `source_uri`.

    Args:
        row: a source.
        inspect: `ClipReader.probe`, which runs `inspect` above where it can be killed.
        max_source_pixels_px: largest h * w that will be decoded.
        max_source_duration_s: longest file that will be cut into clips.

    Raises:
        ClipRejected: the file's own fault, TOO_LARGE, or BAD_ROW for a row that its source could not make sense of.
    """
    if row["problem"] is not None:
        raise ClipRejected(RejectReason.BAD_ROW, row["problem"])
    facts = inspect(row["source_uri"])
    if facts.height_px * facts.width_px > max_source_pixels_px:
        size = f"{facts.height_px}x{facts.width_px} px"
        raise ClipRejected(RejectReason.TOO_LARGE, f"{size}: max_source_pixels_px={max_source_pixels_px}")
    duration_s = facts.end_s - facts.start_s
    if duration_s > max_source_duration_s:
        raise ClipRejected(RejectReason.TOO_LARGE, f"{duration_s:.0f} s: max_source_duration_s={max_source_duration_s}")
    return {**row, "probe": facts}
