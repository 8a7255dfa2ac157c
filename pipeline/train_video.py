"""Train the video diffusion transformer on LATENTS; the result is a whole model folder."""

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
from pipeline.models import Model, open_model
from pipeline.online import OnlineDataset
from pipeline.plan import Pack, PlanConfig
from pipeline.train import WorkersConfig, train
from video_dit import weights
from video_dit.diffusion.losses import DiffusionBatch, DiffusionConfig, diffusion_batch, diffusion_losses
from video_dit.flops import TRAINING_FACTOR, forward_flops
from video_dit.generator import GenerationRequest, Generator, SamplingConfig, save_pipeline_parts
from video_dit.lora import LoraConfig, add_lora, merge_lora, published_lora, save_lora
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.parallel.apply import Precision
from video_dit.text import load_text_encoder
from video_dit.training import OptimizerConfig
from video_dit.vae import VideoVAE, VideoVAEConfig

NUM_SHOWN = 4  # videos in TensorBoard each time


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoTask(LatentTask):
    """See `pipeline.trainee.Task`."""

    start_uri: str | None = None
    lora: LoraConfig | None = None

    def build(self) -> VideoTrainee:
        """Open the latents and make the transformer."""
        return VideoTrainee(self)


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
