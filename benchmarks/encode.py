"""The encode hop through Ray Data against the same work in a bare loop: CPU time, memory, and how it scales.

    python benchmarks/encode.py [--rounds 3] [--parts overhead memory scaling]

overhead: 500 random clips (17 frames of 720p H.264, scaled to 96x160; VAE of width 16) by one worker and by a loop in
one process, which take turns, each in a new process with one thread. Counted is the CPU time of everything that belongs
to the run, decoder, driver and Ray's own services included, from the call of the hop to its end, and from its first
finished task on ("without start").
memory: peak of the driver, of a worker and of a decoder (unique set size) for 500 and for 5,000 small clips.
scaling: rows per second for 1x, 4x and 16x the clips, with one and two workers.

Prints ratios, writes results/encode.json and the README's table.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pyarrow as pa
import torch
from decode import FPS, write_video
from measure import Ratio, ratio, write_result, write_table

from pipeline import media, store
from pipeline.encode import EncodeConfig, EncodeShard, encode
from pipeline.tasks import TaskFolder
from video_dit.text import HashedWordConfig, HashedWordEncoder
from video_dit.vae import VideoVAE, VideoVAEConfig

ROWS_PER_SHARD = 20
KINDS = {"decoder": "decode_child", "worker": "ray::MapWorker"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=["overhead", "memory", "scaling"])
    parser.add_argument("--work", nargs=4, metavar=("HOW", "CLIPS", "MODEL", "STORAGE"), help="only this one run")
    options = parser.parse_args()
    if options.work:
        work(*options.work)
        return
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(folder)
        if "overhead" in options.parts:
            figures["overhead"] = overhead(large_clips(folder, 500), model, folder, options.rounds)
        if "memory" in options.parts:
            figures["memory"] = {
                num: run("2", small_clips(folder, num), model, folder, with_memory=True).peak for num in (500, 5000)
            }
        if "scaling" in options.parts:
            figures["scaling"] = scaling(model, folder)
    print(json.dumps(figures, indent=2))
    file = Path(write_result("encode", {**previous(), **figures}))
    write_table("encode table", table(json.loads(file.read_text())))


def previous() -> dict[str, object]:
    """The parts that an earlier call measured."""
    file = Path(__file__).parent / "results" / "encode.json"
    return json.loads(file.read_text()) if file.exists() else {}


# --- data -----------------------------------------------------------------------------------------------------------


def make_model(folder: str) -> store.Manifest:
    """A published model folder: a VAE of width 16 with random weights, words as text."""

    def produce(uri: str) -> store.Produced:
        torch.manual_seed(0)
        config = VideoVAEConfig(base_dim=16, z_dim=16, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)
        VideoVAE(config).save_pretrained(store.join(uri, "model"))
        HashedWordEncoder(HashedWordConfig(dim=64, position_dim=16)).save_pretrained(store.join(uri, "model"))
        return store.Produced(counts={})

    return store.publish_once(folder, "train_vae", "random", {}, [], produce)


def large_clips(folder: str, num: int) -> store.Manifest:
    """Random windows of a 720p file with a keyframe every 30 frames."""
    file = write_video(f"{folder}/source.mp4", 30)
    rng = random.Random(0)
    starts = [rng.randint(0, 20 * FPS - 17) / FPS for _ in range(num)]
    return clips_of(folder, "large", [(file, start_s) for start_s in starts], 17, (96, 160), FPS)


def small_clips(folder: str, num: int) -> store.Manifest:
    """Files of 9 frames of 64x64, eight of them used again and again."""
    files = []
    for number in range(8):
        video = torch.arange(9 * 64 * 64 * 3).reshape(9, 64, 64, 3).add(number).to(torch.uint8).numpy()
        files.append(f"{folder}/small_{number}.mp4")
        Path(files[-1]).write_bytes(media.encode_mp4(video, 8))
    return clips_of(folder, f"small{num}", [(files[number % 8], 0.0) for number in range(num)], 9, (64, 64), 8)


def clips_of(
    folder: str, name: str, windows: list[tuple[str, float]], num_frames: int, size: tuple[int, int], fps: float
) -> store.Manifest:
    """Published CLIPS of (file, start)."""
    rows = [
        {
            "clip_id": f"{number:016x}",
            "source_uri": file,
            "start_s": start_s,
            "end_s": start_s + num_frames / fps,
            "fps": fps,
            "num_frames": num_frames,
            "height_px": size[0],
            "width_px": size[1],
            "caption": f"clip number {number}",
            "scores": [],
            "lineage": {"source_id": file, "caption_source": "benchmark"},
        }
        for number, (file, start_s) in enumerate(windows)
    ]

    def produce(uri: str) -> store.Produced:
        return store.Produced(counts={"clips": len(rows)}, files={"clips": [store.write_shard(uri, "clips", rows)]})

    return store.publish_once(folder, "curate", name, {}, [], produce)


# --- one run --------------------------------------------------------------------------------------------------------


def work(how: str, clips_uri: str, model_uri: str, storage: str) -> None:
    """In a process of its own: the bare loop ("bare"), or the hop with `how` workers."""
    clips, model = store.Manifest.load(clips_uri), store.Manifest.load(model_uri)
    config = EncodeConfig(rows_per_shard=ROWS_PER_SHARD, num_actors=1 if how == "bare" else int(how))
    weights = store.join(model.uri, "model")
    if how != "bare":
        from pipeline import cluster

        cluster.connect()
        print("begin", flush=True)
        encode(config, clips, model, weights, storage)
    else:
        print("begin", flush=True)
        folder = store.join(storage, "encode", "bare")
        shard, tasks = EncodeShard(config, clips, weights, folder), TaskFolder(folder)
        for task, parts in enumerate(clips.slices("clips", ROWS_PER_SHARD)):
            tasks.finish(task, shard(pa.Table.from_pylist(parts), tasks.attempt(task)))
    print("end", flush=True)
    time.sleep(1)  # to be looked at once more


class Run:
    """CPU time, memory and duration of a family of processes, looked at ten times a second.

    Attributes:
        cpu_s: from "begin" to "end".
        steady_cpu_s, steady_s: from the first finished task on.
        elapsed_s: from "begin" to "end".
        peak: bytes by kind of process, the largest of a kind; empty unless `with_memory`.
    """

    def __init__(self, command: list[str], storage: str, with_memory: bool) -> None:
        self._storage, self._with_memory = Path(storage), with_memory
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        self._seen: dict[int, float] = {}
        self.peak: dict[str, int] = {}
        marks: dict[str, tuple[float, float]] = {}
        thread = threading.Thread(target=self._watch, args=(marks,), daemon=True)
        thread.start()
        while self._process.poll() is None:
            self._look()
            if "first" not in marks and any(self._storage.glob("encode/*/tasks/*.json")):
                marks["first"] = self._now()
            time.sleep(0.1)
        thread.join()
        assert self._process.returncode == 0, command
        begin, first, end = marks["begin"], marks["first"], marks["end"]
        self.cpu_s, self.elapsed_s = end[0] - begin[0], end[1] - begin[1]
        self.steady_cpu_s, self.steady_s = end[0] - first[0], end[1] - first[1]

    def _watch(self, marks: dict[str, tuple[float, float]]) -> None:
        for line in self._process.stdout:
            if line.strip() in ("begin", "end"):
                time.sleep(0.3)  # until all have been looked at
                marks[line.strip()] = self._now()

    def _now(self) -> tuple[float, float]:
        return sum(self._seen.values()), time.monotonic()

    def _look(self) -> None:
        try:
            driver = psutil.Process(self._process.pid)
            family = [driver, *driver.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in family:
            try:
                times = process.cpu_times()
                self._seen[process.pid] = times.user + times.system
                if self._with_memory:
                    self._look_at_memory(process, process == driver)
            except psutil.Error:
                continue

    def _look_at_memory(self, process: psutil.Process, is_driver: bool) -> None:
        """Costs those that are looked at some time: the system walks through all of their pages."""
        name = " ".join(process.cmdline())
        kind = next((kind for kind, part in KINDS.items() if part in name), "driver" if is_driver else "")
        if kind:
            self.peak[kind] = max(self.peak.get(kind, 0), process.memory_full_info().uss)


def run(how: str, clips: store.Manifest, model: store.Manifest, folder: str, with_memory: bool = False) -> Run:
    """`work` in a new process."""
    with tempfile.TemporaryDirectory(dir=folder) as storage:
        return Run([sys.executable, __file__, "--work", how, clips.uri, model.uri, storage], storage, with_memory)


# --- parts ----------------------------------------------------------------------------------------------------------


def overhead(clips: store.Manifest, model: store.Manifest, folder: str, rounds: int) -> dict[str, object]:
    """CPU time through Ray Data as a multiple of the bare loop's."""
    times: dict[str, list[float]] = {"bare": [], "ray": [], "bare steady": [], "ray steady": []}
    for number in range(rounds):
        for name, how in (("bare", "bare"), ("ray", "1"))[:: 1 if number % 2 else -1]:
            found = run(how, clips, model, folder)
            times[name].append(found.cpu_s)
            times[f"{name} steady"].append(found.steady_cpu_s)
            print(f"{name:5} {found.cpu_s:6.1f} s of CPU, {found.steady_cpu_s:6.1f} s without start", flush=True)
    return {
        "num_clips": clips.counts["clips"],
        "cpu_s": {name: [round(value, 1) for value in values] for name, values in times.items()},
        "ray_over_bare": ratio(times, "bare", "ray")._asdict(),
        "ray_over_bare_without_start": ratio(times, "bare steady", "ray steady")._asdict(),
    }


def scaling(model: store.Manifest, folder: str) -> list[dict[str, object]]:
    """Clips per second, with start and without."""
    rows = []
    for num, workers in [(125, 1), (500, 1), (2000, 1), (125, 2), (500, 2), (2000, 2)]:
        found = run(str(workers), small_clips(folder, num), model, folder)
        steady = (num - ROWS_PER_SHARD) / found.steady_s
        rows.append({"clips": num, "workers": workers, "per_s": num / found.elapsed_s, "per_s_without_start": steady})
        print(rows[-1], flush=True)
    return rows


def table(figures: dict[str, dict]) -> str:
    """The README's table."""
    lines = ["| encode through Ray Data | |", "| --- | ---: |"]
    if "overhead" in figures:
        found = figures["overhead"]
        for name, key in (("", "ray_over_bare"), (", without the workers' start", "ray_over_bare_without_start")):
            text = f"CPU time of {found['num_clips']} clips of 720p over a bare loop's{name}"
            lines.append(f"| {text} | {Ratio(**found[key])} |")
    if "memory" in figures:
        for kind in ("driver", "worker", "decoder"):
            few, many = (figures["memory"][num][kind] / 1e6 for num in ("500", "5000"))
            lines.append(f"| peak memory of a {kind}, 500 / 5,000 clips | {few:,.0f} / {many:,.0f} MB |")
    for row in figures.get("scaling", []):
        text = f"{row['clips']:,} small clips, {row['workers']} worker{'s' * (row['workers'] > 1)}"
        lines.append(f"| {text} | {row['per_s_without_start']:.1f} clips/s, {row['per_s']:.1f} with start |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
