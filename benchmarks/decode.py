"""The clip reader against torchcodec, decord and a plain PyAV loop: CPU time of random clips, and equal pixels.

    python benchmarks/decode.py [--clips 40] [--folder videos]

Random windows of 17 frames of 720p H.264 with a keyframe every 30 and every 250 frames: encoded here, or the MP4 files
of --folder. Each reader takes every clip in turn, each from the file anew, on one thread; prints ratios of CPU time
(above 1: ours needs less) with quartiles, the largest difference of a pixel, and peak memory; writes
results/decode.json and the README's table. torchcodec needs FFmpeg's libraries; without it that row is missing.
"""

import argparse
import importlib.util
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from measure import Ratio, ratio, write_result, write_table

from pipeline.stages.decode import read_clip

NUM_FRAMES, FPS, SIZE = 17, 30, (256, 448)
Reader = Callable[[str, int], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--folder", type=Path, help="MP4 files of a constant rate, instead of synthetic ones")
    parser.add_argument("--memory-of", nargs=2, metavar=("READER", "FILE"), help="only read clips, print the peak")
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(peak_bytes(*arguments.memory_of))
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.folder:
            files = {path.name: str(path) for path in sorted(arguments.folder.glob("*.mp4"))}
        else:
            files = {f"GOP {gop}": write_video(f"{folder}/{gop}.mp4", gop) for gop in (30, 250)}
        figures = {name: measure(file, arguments.clips) for name, file in files.items()}
    if not arguments.folder:
        print(f"wrote {write_result('decode', {'num_clips': arguments.clips, 'files': figures})}")
        write_table("decode table", table(figures))


def write_video(path: str, gop: int, num_frames: int = 20 * FPS, height: int = 720, width: int = 1280) -> str:
    """A textured picture that moves under another, with film grain."""
    rng = np.random.default_rng(0)
    texture = rng.random((height // 8 + 80, width // 8 + 80, 3))
    texture = np.asarray(255 * np.kron(texture, np.ones((8, 8, 1))), np.uint8)
    grain = rng.integers(-4, 5, (height + 16, width + 16, 3))
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "23", "g": str(gop), "sc_threshold": "0", "bf": "3"}
        for step in range(num_frames):
            left, top = rng.integers(0, 16, 2)
            picture = texture[step % 600 : step % 600 + height, step % 600 : step % 600 + width]
            picture = picture + grain[top : top + height, left : left + width]
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def ours(file: str, first: int) -> np.ndarray:
    return read_clip(file, first / FPS, (first + NUM_FRAMES) / FPS, backend="pyav").video_u8


def ours_scaled(file: str, first: int) -> np.ndarray:
    size = {"height_px": SIZE[0], "width_px": SIZE[1]}
    return read_clip(file, first / FPS, (first + NUM_FRAMES) / FPS, backend="pyav", **size).video_u8


def torchcodec(file: str, first: int) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(file, dimension_order="NHWC", num_ffmpeg_threads=1)
    return decoder.get_frames_in_range(first, first + NUM_FRAMES).data.numpy()


def torchcodec_approximate(file: str, first: int) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(file, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate")
    return decoder.get_frames_in_range(first, first + NUM_FRAMES).data.numpy()


def decord(file: str, first: int) -> np.ndarray:
    import decord

    reader = decord.VideoReader(file, ctx=decord.cpu(0), num_threads=1)
    return reader.get_batch(range(first, first + NUM_FRAMES)).asnumpy()


def decord_scaled(file: str, first: int) -> np.ndarray:
    import decord

    reader = decord.VideoReader(file, ctx=decord.cpu(0), num_threads=1, height=SIZE[0], width=SIZE[1])
    return reader.get_batch(range(first, first + NUM_FRAMES)).asnumpy()


def pyav_loop(file: str, first: int) -> np.ndarray:
    frames = []
    with av.open(file) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        container.seek(round(first / FPS / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time > (first - 0.5) / FPS:
                frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) == NUM_FRAMES:
                break
    return np.stack(frames)


READERS: dict[str, Reader] = {
    "ours": ours,
    "decord": decord,
    "PyAV loop": pyav_loop,
    "torchcodec": torchcodec,
    "torchcodec, approximate seek": torchcodec_approximate,
}
SCALED: dict[str, Reader] = {"ours, scaled": ours_scaled, "decord, scaled": decord_scaled}


def measure(file: str, num_clips: int) -> dict[str, object]:
    """Ratios of CPU time, the largest difference from ours and the peak memory of each reader."""
    with av.open(file) as container:
        last = container.streams.video[0].frames - NUM_FRAMES
    has_torchcodec = importlib.util.find_spec("torchcodec") is not None
    names = [name for name in (*READERS, *SCALED) if has_torchcodec or "torchcodec" not in name]
    times: dict[str, list[float]] = {name: [] for name in names}
    off = dict.fromkeys(times, 0)
    rng = random.Random(0)
    for number in range(num_clips):
        first = rng.randint(0, last)
        found = {}
        for name in names if number % 2 else names[::-1]:
            start_s = time.process_time()
            found[name] = (READERS | SCALED)[name](file, first)
            times[name].append(time.process_time() - start_s)
        for name in names:
            mine = found["ours, scaled" if name in SCALED else "ours"]
            off[name] = max(off[name], int(np.abs(found[name].astype(np.int16) - mine).max()))
    figures = {}
    for name in times:
        mine = "ours, scaled" if name in SCALED else "ours"
        command = [sys.executable, __file__, "--memory-of", name, file]
        peak = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        against = ratio(times, mine, name)
        median_ms = 1e3 * float(np.median(times[name]))
        print(f"{Path(file).name:12} {name:30} {median_ms:7.1f} ms of CPU  ours needs less by {against}  "
              f"differs by {off[name]:3}  peak {peak / 1e6:,.0f} MB", flush=True)  # fmt: skip
        figures[name] = {
            "cpu_ms": round(median_ms, 1),
            "ours_needs_less_by": against._asdict(),
            "largest_difference": off[name],
            "peak_bytes": peak,
        }
    return figures


def peak_bytes(name: str, file: str) -> int:
    """Of this process, after ten clips."""
    for number in range(10):
        (READERS | SCALED)[name](file, 17 * number)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def table(figures: dict[str, dict[str, object]]) -> str:
    """The README's table."""
    lines = ["| 17 frames of 720p from | against | CPU time: ours needs less by | largest difference | peak memory |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    for file, readers in figures.items():
        for name, found in readers.items():
            against = str(Ratio(**found["ours_needs_less_by"])) if not name.startswith("ours") else ""
            cells = [file, name, against, str(found["largest_difference"]), f"{found['peak_bytes'] / 1e6:,.0f} MB"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
