"""Verb "evaluate_video": the toy world's exact score, on attribute combinations that training never saw."""

from __future__ import annotations

import dataclasses
import functools
import time

from pipeline import media, store, toy, toy_checker
from pipeline.generate import GenerateConfig, generate, write_contact_sheet
from pipeline.train import Model
from video_dit.generator import GenerationRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is scored.

    Attributes:
        num_prompts: held-out combinations to generate.
        seed: of their choice.
        generate: steps, guidance and batches.
    """

    num_prompts: int = 200
    seed: int = 0
    generate: GenerateConfig = dataclasses.field(default_factory=GenerateConfig)

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise ValueError(f"num_prompts={self.num_prompts}: must be at least 1")


def evaluate_video(config: EvaluateConfig, model: Model, storage: str) -> store.Manifest:
    """Generate held-out prompts and let the checker measure them; publishes `scores.json`, videos and a contact sheet.

    The table has the share of right videos by attribute ("motion" attributes over videos only) and for all attributes
    of a video together.
    """
    identity = {**dataclasses.asdict(config), "model": model.uri}
    return store.publish_once(
        storage, "evaluate_video", model.name, identity, model.parents, functools.partial(_produce, config, model.uri)
    )


def read_scores(evaluation: store.Manifest) -> dict[str, float]:
    """The share of right videos by attribute."""
    scores: dict[str, float] = store.read_json(store.join(evaluation.uri, "scores.json"))["scores"]
    return scores


def toy_requests(config: GenerateConfig, num: int, seed: int) -> list[GenerationRequest]:
    """Requests for held-out combinations, in shapes their motion fits in."""
    prompts = toy.evaluation_prompts(num, seed)
    return [config.request(number, p.caption, *p.shape) for number, p in enumerate(prompts)]


def judge(video_u8: media.Frames, request: GenerationRequest) -> dict[str, bool]:
    """Which attributes of the prompt the video shows."""
    return toy_checker.score(video_u8, request.prompt)


def _produce(config: EvaluateConfig, model_uri: str, folder: str) -> store.Produced:
    start_s = time.monotonic()
    requests = toy_requests(config.generate, config.num_prompts, config.seed)
    videos = generate(config.generate, requests, model_uri, folder, judge)
    scores = toy_checker.score_table([video.verdict for video in videos])
    rows = [{"prompt": video.request.prompt, "file": video.file, **video.verdict} for video in videos]
    store.write_json(store.join(folder, "scores.json"), {"scores": scores, "videos": rows})
    write_contact_sheet(videos, folder)
    measures = {f"score_{name}": value for name, value in scores.items()}
    measures["videos_per_s"] = len(videos) / (time.monotonic() - start_s)
    return store.Produced(counts={"videos": len(videos)}, measures=measures)
