"""Train the video diffusion transformer on LATENTS; the result is a whole model folder."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from pipeline import store
from pipeline.errors import ManifestError
from pipeline.feed import LatentDataset
from pipeline.media import Frames
from pipeline.plan import Pack, PlanConfig
from pipeline.train import Model, WorkersConfig, train
from video_dit import weights
from video_dit.diffusion.losses import DiffusionBatch, DiffusionConfig, diffusion_batch, diffusion_losses
from video_dit.generator import GenerationRequest, Generator, SamplingConfig, save_pipeline_parts
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.text import load_text_encoder
from video_dit.training import OptimizerConfig
from video_dit.vae import VideoVAE, VideoVAEConfig

NUM_SHOWN = 4  # videos in TensorBoard each time


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainVideoConfig:
    """A training run of the transformer.

    Attributes:
        dit: sizes.
        diffusion: schedule, target, noise levels and caption dropout.
        plan: token budget and batch; `quadratic_tokens` is best 2 d + ffn_dim.
        optimizer: learning rate and length.
        num_steps, guidance_scale: what the model folder tells to be sampled with.
    """

    dit: VideoDiTConfig = dataclasses.field(default_factory=VideoDiTConfig)
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    plan: PlanConfig = dataclasses.field(default_factory=PlanConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    num_steps: int = SamplingConfig.num_steps
    guidance_scale: float = SamplingConfig.guidance_scale


def train_video(
    config: TrainVideoConfig, workers: WorkersConfig, latents: store.Manifest, storage: str, name: str = "video"
) -> store.Manifest:
    """Train, or return the run that the same call finished before.

    Args:
        config: decides the result.
        workers: resources; do not.
        latents: what `encode` published; names the model folder with the VAE it was made with.
        storage: root of all results; a file system that all workers share.
        name: of the run.

    Raises:
        ValueError: the transformer's sizes do not fit the latents, or workers cannot share the storage.
    """
    _check_fits(config.dit, encoder_folder(latents))
    task = VideoTask(
        latents_uri=latents.uri,
        dit=config.dit,
        diffusion=config.diffusion,
        plan=config.plan,
        optimizer=config.optimizer,
        num_steps=config.num_steps,
        guidance_scale=config.guidance_scale,
    )
    return store.publish_once(
        storage,
        "train_video",
        name,
        dataclasses.asdict(config),
        [latents],
        lambda folder: train(task, workers, folder, "video transformer"),
    )


def _check_fits(dit: VideoDiTConfig, encoder: str) -> None:
    channels = weights.read_config(VideoVAEConfig, encoder, "vae").z_dim
    for name, value, found in (
        ("in_channels", dit.in_channels, channels),
        ("out_channels", dit.out_channels, channels),
        ("text_dim", dit.text_dim, load_text_encoder(encoder).dim),
    ):
        if value != found:
            raise ValueError(f"dit.{name}={value}, but the encoded clips have {found}: set dit.{name} to {found}")


def encoder_folder(latents: store.Manifest) -> str:
    """The model folder whose VAE and text encoder made the latents."""
    return store.join(latents.parents[1]["uri"], latents.config["model"])


def latents_of(model: Model) -> store.Manifest:
    """What a model was trained on.

    Raises:
        ManifestError: it is not a finished run of `train_video`.
    """
    run = model.run
    if run is None or run.verb != "train_video":
        found = "no run is known" if run is None else f"{run.uri} is a run of {run.verb}"
        raise ManifestError(f"{model.uri}: {found}: give the folder of a finished run of train_video as --model")
    return store.Manifest.load(run.parents[0]["uri"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentTask:
    """What trainings of a transformer on LATENTS share; see `pipeline.train.Task`."""

    latents_uri: str
    dit: VideoDiTConfig
    diffusion: DiffusionConfig
    plan: PlanConfig
    optimizer: OptimizerConfig
    num_steps: int
    guidance_scale: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoTask(LatentTask):
    """See `pipeline.train.Task`."""

    def build(self) -> VideoTrainee:
        """Open the latents and make the transformer."""
        return VideoTrainee(self)


class LatentTrainee:
    """What trainings of a transformer on LATENTS share; see `pipeline.train.Trainee`."""

    def __init__(self, task: LatentTask) -> None:
        manifest = store.Manifest.load(task.latents_uri)
        self.task = task
        self.encoder_folder = encoder_folder(manifest)
        self.data = LatentDataset(manifest)
        self.text = load_text_encoder(self.encoder_folder)
        self.sizes = self.data.num_tokens(task.dit.patch)
        self.empty_text = self.text([""])[0]

    def num_elements(self, step: int, pack: Pack) -> float:
        """Tokens of the pack."""
        return float(sum(self.sizes[place] for place in pack))

    def sample_ids(self, pack: Pack) -> tuple[str, ...]:
        """Clip ids."""
        return tuple(self.data.clip_ids[place] for place in pack)

    def samples(self, step: int, pack: Pack) -> dict[str, Any]:
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
        with torch.device("meta"):
            shell = VideoDiT(self.task.dit)
        weights.save_model(shell, folder, "transformer", state=averaged)
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
        return {"num_parameters": num_parameters, "num_samples": len(self.data)}

    def show(self, folder: str) -> tuple[dict[str, Frames], float]:
        """Videos of a few training captions, in their clips' shapes."""
        generator = Generator.from_pretrained(folder)
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


class VideoTrainee(LatentTrainee):
    """See `pipeline.train.Trainee`."""

    def __init__(self, task: VideoTask) -> None:
        super().__init__(task)
        self.model = VideoDiT(task.dit)
        self.loss_function = diffusion_losses

    def load(self, step: int, pack: Pack) -> DiffusionBatch:
        """Noised latents; noise is keyed by (seed, step, clip)."""
        return diffusion_batch(
            **self.samples(step, pack),
            config=self.task.diffusion,
            patch=self.task.dit.patch,
        )
