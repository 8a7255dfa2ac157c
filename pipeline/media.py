"""Frames to files that people can open: MP4, PNG, GIF, contact sheet. All take uint8 RGB, `t h w c`."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Frames = NDArray[np.uint8]


def encode_mp4(video_u8: Frames, fps: float, crf: int = 14) -> bytes:
    """H.264 MP4 with the index in front, so that it plays while it loads.

    Args:
        video_u8: t h w 3, even height and width (4:2:0 chroma).
        fps: frames per second.
        crf: x264's constant rate factor; lower is better, 14 is visually lossless.

    Raises:
        ValueError: odd sides or no frame.
    """
    num_frames, height_px, width_px, _ = video_u8.shape
    if not num_frames or height_px % 2 or width_px % 2:
        raise ValueError(f"video of {num_frames} frames, {height_px}x{width_px}: H.264 needs a frame and even sides")
    with tempfile.TemporaryDirectory() as folder:  # moving the index to the front reads the file again
        path = Path(folder) / "video.mp4"
        with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
            stream.height, stream.width, stream.pix_fmt = height_px, width_px, "yuv420p"
            # mbtree looks at memory that x264 never wrote, for small frames: the same video gave two files
            stream.options = {"crf": str(crf), "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}
            for picture in video_u8:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
            container.mux(stream.encode(None))
        return path.read_bytes()


def decode_frames(data: bytes) -> Frames:
    """All frames of a video or picture file as they stand, t h w 3; for our own files, not for strangers'."""
    with av.open(io.BytesIO(data), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24").astype(np.uint8) for frame in container.decode(video=0)])


def encode_png(picture_u8: Frames) -> bytes:
    """One frame, h w 3, as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture_u8).save(buffer, "PNG")
    return buffer.getvalue()


def encode_gif(video_u8: Frames, fps: float) -> bytes:
    """An endless GIF, for viewers that only know pictures (TensorBoard)."""
    pictures = [Image.fromarray(frame) for frame in video_u8]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, "GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0, disposal=2
    )
    return buffer.getvalue()


def contact_sheet(
    videos_u8: Sequence[Frames], captions: Sequence[str], num_columns: int = 6, cell_px: int = 112, margin_px: int = 6
) -> Frames:
    """One row a video: its caption above, `num_columns` frames from first to last below, scaled to whole pixels.

    Returns:
        h w 3 uint8.
    """
    text_px = 14
    sizes = [_fitted(video_u8.shape[1:3], cell_px) for video_u8 in videos_u8]
    width_px = num_columns * (cell_px + margin_px) + margin_px
    height_px = margin_px + sum(text_px + height + margin_px for height, _ in sizes)
    sheet, top_px = Image.new("RGB", (width_px, height_px), "white"), margin_px
    draw = ImageDraw.Draw(sheet)
    for video_u8, caption, (height, width) in zip(videos_u8, captions, sizes, strict=True):
        draw.text((margin_px, top_px), caption, fill="black")
        steps = np.linspace(0, len(video_u8) - 1, min(num_columns, len(video_u8))).round().astype(int)
        for column, step in enumerate(steps):
            picture = Image.fromarray(video_u8[step]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (margin_px + column * (cell_px + margin_px), top_px + text_px))
        top_px += text_px + height + margin_px
    return np.asarray(sheet)


def _fitted(size_px: Sequence[int], most_px: int) -> tuple[int, int]:
    """Height and width, scaled to have `most_px` on the longer side."""
    scale = most_px / max(size_px)
    return round(size_px[0] * scale), round(size_px[1] * scale)
