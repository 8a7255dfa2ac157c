"""Verb "sample_video": prompts to MP4 files and a contact sheet, in packed batches on the cluster."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
import ray.data
from torch import Tensor

from pipeline import media, store
from pipeline.heap import keep_freed_memory
from pipeline.models import Model
from pipeline.request_files import from_json, to_json
from video_dit.diffusion.guidance import GuidanceOptions
from video_dit.generator import GenerationRequest, Generator, Limits, read_limits
from video_dit.long_videos import check_windows, long_videos

Judge = Callable[[media.Frames, GenerationRequest], dict[str, bool]]
Make = Callable[[Generator, Sequence[GenerationRequest]], Sequence[Tensor]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How videos are made from requests. Resources do not change the result.

    Attributes:
        num_steps: denoising steps; None is the model's own number.
        guidance_scale: classifier-free guidance; 1 is none, None the model's own scale.
        guidance: its refinements.
        seed: of the first video; the next ones count up.
        sampler: "euler", "heun", "dpmpp_2m", "unipc", "ddim" or "ddpm".
        cache_threshold: change up to which most of the model is not run in a step: faster, not exact; 0.1 is a start.
        window_frames: most frames that are made at once; longer videos are made in windows that go on from each other.
            None makes every video whole.
        overlap_frames: frames that a window goes on from.
        requests_per_batch: videos in one packed forward pass.
        num_actors: processes with a copy of the model; None is one a CPU, or one a GPU.
        gpus_per_actor: 0 runs on the CPU.
    """

    num_steps: int | None = None
    guidance_scale: float | None = None
    guidance: GuidanceOptions = dataclasses.field(default_factory=GuidanceOptions)
    seed: int = 0
    sampler: str = "euler"
    cache_threshold: float = 0.0
    window_frames: int | None = None
    overlap_frames: int = 9
    requests_per_batch: int = 16
    num_actors: int | None = None
    gpus_per_actor: float = 0

    def __post_init__(self) -> None:
        if self.requests_per_batch < 1:
            raise ValueError(f"requests_per_batch={self.requests_per_batch}: must be at least 1")

    def request(self, number: int, prompt: str, num_frames: int, height_px: int, width_px: int) -> GenerationRequest:
        """The number-th video's request."""
        return GenerationRequest(
            prompt=prompt,
            num_frames=num_frames,
            height_px=height_px,
            width_px=width_px,
            num_steps=self.num_steps,
            guidance_scale=self.guidance_scale,
            guidance=self.guidance,
            seed=self.seed + number,
            sampler=self.sampler,
            cache_threshold=self.cache_threshold,
        )

    def complete(self, requests: Sequence[GenerationRequest], limits: Limits) -> list[GenerationRequest]:
        """The requests with the model's own settings where they name none.

        Raises:
            ValueError: for what the model cannot make, naming field, value and fix.
        """
        if self.window_frames is not None:
            check_windows(self.window_frames, self.overlap_frames, limits.stride.t)
        return [limits.complete(request) for request in requests]

    def make(self, generator: Generator, requests: Sequence[GenerationRequest]) -> list[Tensor]:
        """The videos of one batch, in windows if there are any."""
        if self.window_frames is None:
            return generator(requests)
        return long_videos(generator, requests, self.window_frames, self.overlap_frames)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedVideo:
    """A finished video: what was asked, where it lies, and what a judge said of it."""

    request: GenerationRequest
    file: str
    verdict: dict[str, bool]


def sample_video(
    config: GenerateConfig,
    requests: Sequence[GenerationRequest],
    model: Model,
    storage: str,
) -> store.Manifest:
    """Make videos; publishes `videos/NNN.mp4` with a JSON file of settings beside each, and `contact_sheet.png`.

    Frames that requests give are kept in `frames/`, named by their content.

    Args:
        config: resources and batches.
        requests: prompts and sizes.
        model: what makes them.
        storage: root of all results.

    Raises:
        ValueError: a request that the model cannot make.
    """
    windows = {"window_frames": config.window_frames, "overlap_frames": config.overlap_frames}
    identity = {"requests": [to_json(request)[0] for request in requests], "model": model.uri, **windows}

    def produce(folder: str) -> store.Produced:
        start_s = time.monotonic()
        videos = generate(config, requests, model.uri, folder)
        write_contact_sheet(videos, folder)
        frames = sum(request.num_frames for request in requests)
        elapsed_s = time.monotonic() - start_s
        measures = {"videos_per_s": len(videos) / elapsed_s, "frames_per_s": frames / elapsed_s}
        return store.Produced(counts={"videos": len(videos)}, measures=measures)

    return store.publish_once(storage, "sample_video", model.name, identity, model.parents, produce)


def generate(
    config: GenerateConfig,
    requests: Sequence[GenerationRequest],
    model_uri: str,
    folder: str,
    judge: Judge | None = None,
    make: Make | None = None,
) -> list[GeneratedVideo]:
    """Make videos on the cluster, files below `folder`/videos, in the order of the requests.

    Args:
        config: resources and batches.
        requests: prompts and sizes.
        model_uri: what makes them.
        folder: for the files.
        judge: what is said of each video; picklable, as is `make`.
        make: (generator, requests) -> videos, of one batch; None makes what the requests say, as `config.make` does.
    """
    requests = config.complete(requests, read_limits(model_uri))
    in_order = sorted(range(len(requests)), key=lambda n: requests[n].shape)  # equal shapes share attention batches
    rows = [{"number": n, "request": json.dumps(_write_frames(requests[n], folder))} for n in in_order]
    resources = ray.cluster_resources()
    num_gpus = resources.get("GPU", 0) / config.gpus_per_actor if config.gpus_per_actor else 0
    num_batches = -(-len(rows) // config.requests_per_batch)
    num_actors = config.num_actors or int(num_gpus or resources["CPU"])
    results = ray.data.from_items(rows, override_num_blocks=num_batches).map_batches(
        GenerateBatch,
        batch_size=config.requests_per_batch,
        compute=ray.data.ActorPoolStrategy(size=min(num_actors, num_batches)),
        num_cpus=1,
        num_gpus=config.gpus_per_actor or None,
        fn_constructor_args=(model_uri, folder, judge, make or config.make),
    )
    made = {row["number"]: row for row in results.take_all()}
    assert len(made) == len(requests), f"{len(requests)} requests, {len(made)} videos"
    return [
        GeneratedVideo(request=request, file=made[number]["file"], verdict=json.loads(made[number]["verdict"]))
        for number, request in enumerate(requests)
    ]


def _write_frames(request: GenerationRequest, folder: str) -> dict[str, Any]:
    """The request's fields; the files they name are in the folder."""
    fields, files = to_json(request)
    for name, data in files.items():
        if not store.exists(store.join(folder, name)):
            store.write_bytes(store.join(folder, name), data)
    return fields


class GenerateBatch:
    """Makes and writes the videos of a batch of rows; one copy of the model a process."""

    def __init__(self, model_uri: str, folder: str, judge: Judge | None, make: Make) -> None:
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        keep_freed_memory()
        self.generator = Generator.from_pretrained(model_uri, device)
        self.folder, self.judge, self.make = folder, judge, make

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """number, request -> number, file, verdict."""
        fields = [json.loads(request) for request in batch["request"]]
        requests = [from_json(values, self._read) for values in fields]
        videos = [video.numpy() for video in self.make(self.generator, requests)]
        files, verdicts = [], []
        for number, values, request, video_u8 in zip(batch["number"], fields, requests, videos, strict=True):
            files.append(self._write(int(number), values, video_u8))
            verdicts.append(json.dumps(self.judge(video_u8, request) if self.judge else {}))
        return {"number": batch["number"].tolist(), "file": files, "verdict": verdicts}

    def _read(self, name: str) -> bytes:
        return store.read_bytes(store.join(self.folder, name))

    def _write(self, number: int, fields: dict[str, Any], video_u8: media.Frames) -> str:
        stem = f"videos/{number:03d}"
        is_image = len(video_u8) == 1
        data = media.encode_png(video_u8[0]) if is_image else media.encode_mp4(video_u8, self.generator.fps)
        file = f"{stem}.{'png' if is_image else 'mp4'}"
        store.write_bytes(store.join(self.folder, file), data)
        store.write_json(store.join(self.folder, f"{stem}.json"), fields)
        return file


def write_contact_sheet(videos: Sequence[GeneratedVideo], folder: str, most: int = 12) -> None:
    """Write `contact_sheet.png`: a row a video, its prompt above."""
    shown = videos[:most]
    frames = [media.decode_frames(store.read_bytes(store.join(folder, video.file))) for video in shown]
    sheet = media.contact_sheet(frames, [_label(video) for video in shown])
    store.write_bytes(store.join(folder, "contact_sheet.png"), media.encode_png(sheet))


def _label(video: GeneratedVideo) -> str:
    wrong = [name for name, is_right in video.verdict.items() if not is_right and name != "all"]
    return video.request.prompt + (f"   [wrong: {', '.join(wrong)}]" if wrong else "")
