"""Writing small videos with known frames, and damaging them in known ways."""

import io
import struct
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

FPS = 8


def moving(num_frames=17, height=64, width=64):
    """A grey ramp that moves 3 pixels a frame: every frame differs, and tells its number by its brightness."""
    ramp = (np.arange(height)[:, None] + np.arange(width)[None]) / (height + width) * 120
    frames = [ramp + 6 * step for step in range(num_frames)]
    return np.repeat(np.stack(frames)[..., None], 3, axis=3).clip(0, 255).astype(np.uint8)


def encode(
    video_u8, codec="libx264", fmt="mp4", fps=FPS, first=0, rotation=None, pix_fmt="yuv420p", options=None, **more
):
    """A file's bytes. Presentation times are (first + i) / fps, or those in `first`, a list of ticks of 1/1000 s.

    Args:
        more: `mux`, options of the container; other names are attributes of the codec.
    """
    with (  # a file, since some containers write their beginning again at the end
        tempfile.NamedTemporaryFile() as file,
        av.open(file.name, "w", format=fmt, options=more.pop("mux", {})) as container,
    ):
        stream = container.add_stream(codec, rate=fps, options=options or {"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = *video_u8.shape[1:3], pix_fmt
        in_ticks = isinstance(first, list)
        if in_ticks:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for name, value in more.items():
            setattr(stream.codec_context, name, value)
        for step, picture in enumerate(video_u8):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = first[step] if in_ticks else first + step
            frame.time_base = Fraction(1, 1000) if in_ticks else Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        container.close()
        return Path(file.name).read_bytes()


def remux(data, change, fmt="mp4", streams=1):
    """The packets of a file in a new one; `change(number, packet)` alters a packet, drops it (False) or keeps it."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format=fmt) as target:
        stream = source.streams.video[0]
        copies = [target.add_stream_from_template(stream) for _ in range(streams)]
        for number, packet in enumerate(source.demux(stream)):
            if packet.dts is not None and change(number, packet) is not False:
                packet.stream = copies[-1]
                target.mux(packet)
    return buffer.getvalue()


def with_audio(data, fmt="mp4", audio_first=False, seconds=2, codec="aac"):
    """A video's packets beside silence; without `data` the silence alone."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=fmt) as target:
        source = av.open(io.BytesIO(data)) if data else None
        video = source.streams.video[0] if source else None
        copy = target.add_stream_from_template(video) if video and not audio_first else None
        audio = target.add_stream(codec, rate=8000)
        audio.layout = "mono"
        if video and audio_first:
            copy = target.add_stream_from_template(video)
        for step in range(8 * seconds):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, step * 1024
            target.mux(audio.encode(frame))
        target.mux(audio.encode(None))
        for packet in source.demux(video) if source else ():
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    return buffer.getvalue()


def picture_bytes(fmt="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(moving(1)[0]).save(buffer, fmt)
    return buffer.getvalue()


def boxes(data, first=0, stop=None):
    """(name, begin, end) of the MP4 boxes of one level."""
    stop = len(data) if stop is None else stop
    while first + 8 <= stop:
        size, name = struct.unpack_from(">I4s", data, first)
        size = struct.unpack_from(">Q", data, first + 8)[0] if size == 1 else size or stop - first
        yield name, first, first + size
        first += size


def box(data, name):
    """(begin, end) of a box of the file's first level."""
    return next((begin, end) for found, begin, end in boxes(data) if found == name)


def poke(data, name, offset, fmt, *values):
    """Overwrite fields of the first box of that name, `offset` bytes behind its name."""
    data = bytearray(data)
    struct.pack_into(fmt, data, data.index(name) + 4 + offset, *values)
    return bytes(data)


def noise(data, share, seed=0, spare=0):
    """Random bytes in a share of the places, behind the first `spare` ones."""
    rng = np.random.default_rng(seed)
    data = np.frombuffer(data, np.uint8).copy()
    places = spare + rng.choice(len(data) - spare, max(1, int(share * (len(data) - spare))), replace=False)
    data[places] = rng.integers(0, 256, len(places))
    return data.tobytes()
