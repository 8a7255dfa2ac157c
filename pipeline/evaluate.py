"""Verb "evaluate_video": the toy world's exact score, on attribute combinations that training never saw."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline import media, store, toy, toy_checker
from pipeline.generate import GenerateConfig, Make, generate, write_contact_sheet
from pipeline.models import Model, open_model
from pipeline.train_classifier import caption_labels
from video_dit import weights
from video_dit.classifier import LatentClassifier, LatentClassifierConfig, sample_classes
from video_dit.generator import GenerationRequest, Generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is scored.

    Attributes:
        num_prompts: held-out combinations to generate.
        seed: of their choice.
        generate: steps, guidance and batches.
        classifier: folder of a classifier's run or of a classifier: the model is told nothing then, and led to what the
            prompts ask for by the classifier alone.
        classifier_scale: of the classifier's gradient; 0 is the model that is told nothing and not led.
    """

    num_prompts: int = 200
    seed: int = 0
    generate: GenerateConfig = dataclasses.field(default_factory=GenerateConfig)
    classifier: str | None = None
    classifier_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise ValueError(f"num_prompts={self.num_prompts}: must be at least 1")
        if self.classifier_scale < 0:
            raise ValueError(f"classifier_scale={self.classifier_scale}: must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LedByClassifier:
    """Makes videos of what toy prompts state, by a model that is told nothing: see `pipeline.generate.Make`."""

    classifier_uri: str
    scale: float

    def __call__(self, generator: Generator, requests: Sequence[GenerationRequest]) -> list[Tensor]:
        """The classifier is loaded once a process."""
        classifier = _load_classifier(self.classifier_uri, next(generator.dit.parameters()).device)
        labels = caption_labels(classifier.config, [request.prompt for request in requests])
        return sample_classes(generator, classifier, requests, labels, self.scale)


@functools.lru_cache(maxsize=1)
def _load_classifier(uri: str, device: torch.device) -> LatentClassifier:
    return LatentClassifier.from_pretrained(uri).to(device)


def evaluate_video(config: EvaluateConfig, model: Model, storage: str) -> store.Manifest:
    """Generate held-out prompts and let the checker measure them; publishes `scores.json`, videos and a contact sheet.

    The table has the share of right videos by attribute ("motion" attributes over videos only) and for all attributes
    of a video together.

    Raises:
        ManifestError: nothing where the config names a classifier.
        FileNotFoundError: a model there that is no classifier.
    """
    identity = {**dataclasses.asdict(config), "model": model.uri}
    make: Make | None = None
    parents = model.parents
    if config.classifier is not None:
        classifier = open_model(config.classifier)
        weights.read_config(LatentClassifierConfig, classifier.uri, "classifier")  # fails here if it is none
        make = LedByClassifier(classifier_uri=classifier.uri, scale=config.classifier_scale)
        parents = [*parents, *classifier.parents]
    produce = functools.partial(_produce, config, model.uri, make)
    return store.publish_once(storage, "evaluate_video", model.name, identity, parents, produce)


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


def _produce(config: EvaluateConfig, model_uri: str, make: Make | None, folder: str) -> store.Produced:
    start_s = time.monotonic()
    requests = toy_requests(config.generate, config.num_prompts, config.seed)
    videos = generate(config.generate, requests, model_uri, folder, judge, make)
    scores = toy_checker.score_table([video.verdict for video in videos])
    rows = [{"prompt": video.request.prompt, "file": video.file, **video.verdict} for video in videos]
    store.write_json(store.join(folder, "scores.json"), {"scores": scores, "videos": rows})
    write_contact_sheet(videos, folder)
    measures = {f"score_{name}": value for name, value in scores.items()}
    measures["videos_per_s"] = len(videos) / (time.monotonic() - start_s)
    return store.Produced(counts={"videos": len(videos)}, measures=measures)
