"""Train the video diffusion transformer on LATENTS; the result is a whole model folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline import store
from pipeline.latent_training import LatentTask, LatentTrainee, encoder_folder
from pipeline.models import Model, open_model
from pipeline.plan import Pack, PlanConfig
from pipeline.train import WorkersConfig, train
from video_dit import weights
from video_dit.diffusion.losses import DiffusionBatch, DiffusionConfig, diffusion_batch, diffusion_losses
from video_dit.generator import SamplingConfig
from video_dit.lora import LoraConfig, add_lora, merge_lora, published_lora, save_lora
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.parallel.apply import Precision
from video_dit.text import load_text_encoder
from video_dit.training import OptimizerConfig
from video_dit.vae import VideoVAEConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainVideoConfig:
    """A training run of the transformer.

    Attributes:
        start: folder of a model or a run whose transformer is trained further; None begins with random weights.
        lora_rank: train adapters of this rank beside its frozen weights; 0 trains the weights.
        lora_alpha, lora_mlp: see `video_dit.lora.LoraConfig`.
        dit: sizes, where there is no `start`.
        diffusion: schedule, target, noise levels and caption dropout.
        plan: token budget and batch; `quadratic_tokens` is best 2 d + ffn_dim.
        optimizer: learning rate and length.
        precision: of weights and activations in the blocks; see `ParallelConfig`.
        online_actors: encode the clips while training runs, by so many processes for each worker, and store nothing; 0
            trains on LATENTS.
        online_gpus: of each of those processes.
        held_out_share: share of the clips that are not trained on; their loss is measured.
        num_validation_prompts: of the toy world, made and judged whenever a model is written.
        num_steps, guidance_scale: what the model folder tells to be sampled with.
    """

    start: str | None = None
    lora_rank: int = 0
    lora_alpha: int | None = None
    lora_mlp: bool = False
    dit: VideoDiTConfig = dataclasses.field(default_factory=VideoDiTConfig)
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    plan: PlanConfig = dataclasses.field(default_factory=PlanConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    precision: Precision = "fp32"
    online_actors: int = 0
    online_gpus: float = 0.0
    held_out_share: float = 0.02
    num_validation_prompts: int = 16
    num_steps: int = SamplingConfig.num_steps
    guidance_scale: float = SamplingConfig.guidance_scale

    def __post_init__(self) -> None:
        if self.lora_rank and not self.start:
            raise ValueError(f"lora_rank={self.lora_rank}: start must name the model that the adapters are for")

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters to train; None trains the weights themselves."""
        return LoraConfig(rank=self.lora_rank, alpha=self.lora_alpha, mlp=self.lora_mlp) if self.lora_rank else None


def train_video(
    config: TrainVideoConfig,
    workers: WorkersConfig,
    latents: Sequence[store.Manifest],
    storage: str,
    name: str = "video",
    encoder: Model | None = None,
) -> store.Manifest:
    """Train, or return the run that the same call finished before.

    Args:
        config: decides the result.
        workers: resources; do not.
        latents: what `encode` published, one or several data sets; names the folder of the VAE that made them. What
            `curate` published, with an `encoder`.
        storage: root of all results; a file system that all workers share.
        name: of the run.
        encoder: model whose VAE and text encoder encode clips while training runs.

    Raises:
        ManifestError: data sets that were made with different VAEs.
        ValueError: the transformer's sizes do not fit the latents, or workers cannot share the storage.
    """
    start = open_model(config.start) if config.start else None
    dit = weights.read_config(VideoDiTConfig, start.uri, "transformer") if start else config.dit
    if (encoder is not None) != (config.online_actors > 0):
        raise ValueError(f"online_actors={config.online_actors}: must be positive with an encoder, and 0 without")
    _check_fits(dit, encoder.uri if encoder else encoder_folder(latents))
    task = VideoTask(
        latents_uris=tuple(manifest.uri for manifest in latents),
        encoder_uri=encoder.uri if encoder else None,
        online_actors=config.online_actors,
        online_gpus=config.online_gpus,
        start_uri=start.uri if start else None,
        lora=config.lora,
        dit=dit,
        diffusion=config.diffusion,
        plan=config.plan,
        optimizer=config.optimizer,
        precision=config.precision,
        held_out_share=config.held_out_share,
        num_validation_prompts=config.num_validation_prompts,
        num_steps=config.num_steps,
        guidance_scale=config.guidance_scale,
    )
    return store.publish_once(
        storage,
        "train_video",
        name,
        {**_identity(config), "start": start.name if start else None, "num_data_sets": len(latents)},
        [*latents, *(encoder.as_parents if encoder else ()), *(start.as_parents if start else ())],
        lambda folder: train(task, workers, folder, "video transformer"),
    )


def _identity(config: TrainVideoConfig) -> dict[str, Any]:
    """What decides the result: not by how many processes clips are encoded."""
    fields = dataclasses.asdict(config)
    del fields["online_gpus"]
    return {**fields, "online_actors": bool(config.online_actors)}


def _check_fits(dit: VideoDiTConfig, encoder: str) -> None:
    channels = weights.read_config(VideoVAEConfig, encoder, "vae").z_dim
    for name, value, found in (
        ("in_channels", dit.in_channels, channels),
        ("out_channels", dit.out_channels, channels),
        ("text_dim", dit.text_dim, load_text_encoder(encoder).dim),
    ):
        if value != found:
            raise ValueError(f"dit.{name}={value}, but the encoded clips have {found}: set dit.{name} to {found}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoTask(LatentTask):
    """See `pipeline.trainee.Task`."""

    start_uri: str | None = None
    lora: LoraConfig | None = None

    def build(self) -> VideoTrainee:
        """Open the latents and make the transformer."""
        return VideoTrainee(self)


class VideoTrainee(LatentTrainee):
    """See `pipeline.trainee.Trainee`."""

    def __init__(self, task: VideoTask) -> None:
        super().__init__(task)
        self.start_uri, self.lora = task.start_uri, task.lora
        start = task.start_uri and VideoDiT.from_pretrained(task.start_uri, dtype=torch.float32).train()
        self.model = start or VideoDiT(task.dit)
        if self.lora:
            add_lora(self.model, self.lora)
        self.loss_function = diffusion_losses

    def load(self, step: int, pack: Pack) -> DiffusionBatch:
        """Noised latents; noise is keyed by (seed, step, clip)."""
        return diffusion_batch(
            **self.batch_of(step, pack),
            config=self.task.diffusion,
            patch=self.task.dit.patch,
        )

    def export_transformer(self, folder: str, averaged: dict[str, Tensor]) -> None:
        """The trained transformer; of adapters, the model that they were merged into, and their own file beside it."""
        if self.lora is None:
            super().export_transformer(folder, averaged)
            return
        assert self.start_uri is not None
        save_lora(published_lora(averaged, VideoDiT.published_class), self.lora, folder)
        merged = VideoDiT.from_pretrained(self.start_uri)
        merge_lora(merged, folder)
        merged.save_pretrained(folder)
