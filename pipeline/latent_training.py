"""What trainings of a transformer on LATENTS share: the data, batches, measures, the model folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline import store
from pipeline.errors import ManifestError
from pipeline.feed import LatentDataset
from pipeline.measures import held_out_losses, is_toy_world, toy_scores
from pipeline.media import Frames
from pipeline.models import Model
from pipeline.online import OnlineDataset
from pipeline.plan import Pack, PlanConfig
from video_dit import weights
from video_dit.diffusion.losses import DiffusionConfig
from video_dit.flops import TRAINING_FACTOR, forward_flops
from video_dit.generator import GenerationRequest, Generator, SamplingConfig, save_pipeline_parts
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.parallel.apply import Precision
from video_dit.text import load_text_encoder
from video_dit.training import OptimizerConfig
from video_dit.vae import VideoVAE

NUM_SHOWN = 4  # videos in TensorBoard each time


def encoder_folder(latents: Sequence[store.Manifest]) -> str:
    """The model folder whose VAE and text encoder made the latents.

    Raises:
        ManifestError: not all were made with the same.
    """
    first, *others = ((manifest.parents[1]["hash"], manifest.config["model"]) for manifest in latents)
    for manifest, other in zip(latents[1:], others, strict=True):
        if other != first:
            raise ManifestError(f"{manifest.uri}: made with another VAE than {latents[0].uri}; encode both with one")
    return store.join(latents[0].parents[1]["uri"], latents[0].config["model"])


def latents_of(model: Model) -> list[store.Manifest]:
    """What a model was trained on.

    Raises:
        ManifestError: it is not a finished run of `train_video`.
    """
    run = model.run
    if run is None or run.verb != "train_video":
        found = "no run is known" if run is None else f"{run.uri} is a run of {run.verb}"
        raise ManifestError(f"{model.uri}: {found}: give the folder of a finished run of train_video as --model")
    if run.config["online_actors"]:
        raise ManifestError(f"{run.uri} kept no latents (video.online_actors): encode its clips, and train on them")
    return [store.Manifest.load(parent["uri"]) for parent in run.parents[: run.config["num_data_sets"]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentTask:
    """What trainings of a transformer on LATENTS share; see `pipeline.trainee.Task`."""

    latents_uris: tuple[str, ...]  # of CLIPS where they are encoded while training runs
    dit: VideoDiTConfig
    diffusion: DiffusionConfig
    plan: PlanConfig
    optimizer: OptimizerConfig
    num_steps: int
    guidance_scale: float
    precision: Precision = "fp32"
    held_out_share: float = 0.0
    num_validation_prompts: int = 0
    encoder_uri: str | None = None  # of clips that are encoded while training runs
    online_actors: int = 0
    online_gpus: float = 0.0


class LatentTrainee:
    """What trainings of a transformer on LATENTS share; see `pipeline.trainee.Trainee`."""

    def __init__(self, task: LatentTask) -> None:
        manifests = [store.Manifest.load(uri) for uri in task.latents_uris]
        self.task = task
        self.data: LatentDataset | OnlineDataset
        if task.encoder_uri is not None:
            self.encoder_folder = task.encoder_uri
            self.data = OnlineDataset(
                task.encoder_uri, *manifests, num_actors=task.online_actors, num_gpus=task.online_gpus
            )
        else:
            self.encoder_folder = encoder_folder(manifests)
            self.data = LatentDataset(*manifests)
        self.text = load_text_encoder(self.encoder_folder)
        self.samples = self.data.samples(task.dit.patch, task.held_out_share)
        self.empty_text = self.text([""])[0]

    def begin(self, places: Iterator[int]) -> None:
        """Clips begin to be encoded, where they are encoded while training runs."""
        if isinstance(self.data, OnlineDataset):
            self.data.begin(places)

    def num_elements(self, step: int, pack: Pack) -> float:
        """Tokens of the pack."""
        return float(self.samples.num_tokens[list(pack)].sum())

    def sample_ids(self, pack: Pack) -> tuple[str, ...]:
        """Clip ids."""
        return tuple(self.data.clip_ids[place] for place in pack)

    def flops(self, pack: Pack) -> float:
        """Of the transformer, forward and backward."""
        lengths = self.samples.num_tokens[list(pack)].tolist()
        texts = [self.data.text_lengths[place] for place in pack]
        return TRAINING_FACTOR * forward_flops(self.task.dit, lengths, texts)

    def measure(self, folder: str) -> dict[str, float]:
        """The loss of the held-out clips, in all and by noise level; in the toy world, the share of right videos."""
        generator = Generator.from_pretrained(folder, _device())
        figures = held_out_losses(
            generator.dit, self.data, self.samples, self.empty_text, self.task.diffusion, self.task.plan
        )
        if self.task.num_validation_prompts and is_toy_world(self.data.captions):
            figures |= toy_scores(generator, self.task.num_validation_prompts)
        return figures

    def batch_of(self, step: int, pack: Pack) -> dict[str, Any]:
        """What batches are made of: latents, texts, the empty text, and keys (seed, step, clip) for random numbers."""
        samples = [self.data[place] for place in pack]
        return {
            "latents": [sample.draw(self.task.plan.seed, step) for sample in samples],
            "texts": [sample.text for sample in samples],
            "empty_text": self.empty_text,
            "keys": [(self.task.plan.seed, step, sample.clip_id) for sample in samples],
        }

    def export(self, folder: str, averaged: dict[str, Tensor]) -> dict[str, float]:
        """A whole model folder: transformer, VAE, text encoder and schedule."""
        self.export_transformer(folder, averaged)
        VideoVAE.from_pretrained(self.encoder_folder).save_pretrained(folder)
        sampling = SamplingConfig(
            schedule=self.task.diffusion.schedule,
            target=self.task.diffusion.target,
            fps=self.data.fps,
            num_steps=self.task.num_steps,
            guidance_scale=self.task.guidance_scale,
        )
        save_pipeline_parts(folder, self.text, sampling)
        num_parameters = sum(value.numel() for value in averaged.values())
        return {"num_parameters": num_parameters}

    def export_transformer(self, folder: str, averaged: dict[str, Tensor]) -> None:
        """The folder's transformer."""
        with torch.device("meta"):
            shell = VideoDiT(self.task.dit)
        weights.save_model(shell, folder, "transformer", state=averaged)

    def show(self, folder: str) -> tuple[dict[str, Frames], float]:
        """Videos of a few training captions, in their clips' shapes."""
        generator = Generator.from_pretrained(folder, _device())
        requests = []
        for number, place in enumerate(range(0, len(self.data), -(-len(self.data) // NUM_SHOWN))):
            shape = self.data.shapes[place].video(generator.vae.config.stride)
            requests.append(
                GenerationRequest(
                    prompt=self.data.captions[place],
                    num_frames=shape.t,
                    height_px=shape.h,
                    width_px=shape.w,
                    seed=number,
                )
            )
        videos = generator(requests)
        tags = [f"samples/{number}: {request.prompt}" for number, request in enumerate(requests)]
        return {tag: video.numpy() for tag, video in zip(tags, videos, strict=True)}, self.data.fps


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
