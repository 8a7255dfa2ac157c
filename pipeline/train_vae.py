"""Train the causal video VAE on random crops of CLIPS; the result is a model folder with `vae/` and `text_encoder/`."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import media, store
from pipeline.feed import BoundedCache
from pipeline.media import Frames
from pipeline.mixture import Samples
from pipeline.models import model_folder
from pipeline.plan import Pack, PlanConfig
from pipeline.reconstruction import SCORES, latent_statistics, reconstruction_scores, reconstruction_table, to_video
from pipeline.stages.reader import ClipReader
from pipeline.train import WorkersConfig, train
from video_dit.generator import video_to_u8
from video_dit.parallel.apply import Precision
from video_dit.perceptual import Lpips
from video_dit.random import keyed_generator
from video_dit.text import HashedWordConfig, HashedWordEncoder
from video_dit.training import OptimizerConfig
from video_dit.vae import VideoVAE, VideoVAEConfig
from video_dit.vae_losses import AdversarialVae, VaeLossConfig, reconstruction_losses

RECONSTRUCTION = "reconstruction.json"
SHEET = "reconstructions.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainVaeConfig:
    """A training run of the VAE.

    Attributes:
        vae: sizes; the latent statistics are measured after training.
        text: the text encoder that the model folder gets, so that it can encode captions too.
        crop_frames, crop_px: crops are at most this long and wide; shorter and smaller clips are taken whole.
        image_steps: the first steps see one frame of each crop: a picture teaches shapes and colours at a fraction of a
            video's cost, and the network starts out passing frames on unchanged.
        loss: what the reconstruction is measured by.
        plan: its tokens are frames of crops; `token_budget` frames go through the model at once.
        optimizer: learning rate and length.
        discriminator_learning_rate: of the discriminator, where `loss` has one.
        num_statistics_clips: clips whose latents give mean and standard deviation of each channel, PSNR and SSIM.
    """

    vae: VideoVAEConfig = dataclasses.field(default_factory=VideoVAEConfig)
    text: HashedWordConfig = dataclasses.field(default_factory=HashedWordConfig)
    crop_frames: int = 9
    crop_px: int = 32
    image_steps: int = 0
    loss: VaeLossConfig = dataclasses.field(default_factory=VaeLossConfig)
    plan: PlanConfig = dataclasses.field(default_factory=PlanConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    discriminator_learning_rate: float = 2e-4
    num_statistics_clips: int = 128

    def __post_init__(self) -> None:
        stride = self.vae.stride
        if (self.crop_frames - 1) % stride.t:
            raise ValueError(f"crop_frames={self.crop_frames}: must be 1 + a multiple of {stride.t}")
        if self.crop_px % stride.h:
            raise ValueError(f"crop_px={self.crop_px}: must be a multiple of {stride.h}")


def train_vae(
    config: TrainVaeConfig, workers: WorkersConfig, clips: store.Manifest, storage: str, name: str = "vae"
) -> store.Manifest:
    """Train, or return the run that the same call finished before; arguments as for `train_video`."""
    task = VaeTask(clips_uri=clips.uri, config=config)
    return store.publish_once(
        storage,
        "train_vae",
        name,
        dataclasses.asdict(config),
        [clips],
        lambda folder: train(task, workers, folder, "video VAE"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VaeTask:
    """See `pipeline.trainee.Task`."""

    clips_uri: str
    config: TrainVaeConfig

    @property
    def plan(self) -> PlanConfig:
        """Batches."""
        return self.config.plan

    @property
    def optimizer(self) -> OptimizerConfig:
        """Learning rate and length."""
        return self.config.optimizer

    @property
    def precision(self) -> Precision:
        """Of weights and activations."""
        return "fp32"

    @property
    def part_optimizers(self) -> Mapping[str, OptimizerConfig]:
        """That of the discriminator."""
        if not self.config.loss.adversarial_weight:
            return {}
        rate = self.config.discriminator_learning_rate
        own = dataclasses.replace(self.optimizer, learning_rate=rate, matrix_learning_rate=None, weight_decay=0.0)
        return {"discriminator": own}

    def build(self) -> VaeTrainee:
        """Open the clips and make the VAE."""
        return VaeTrainee(self)


class VaeBatch(NamedTuple):
    """Crops of one pack, those of equal shape stacked: b 3 t h w in [-1, 1] each, with the key of their noise."""

    videos: list[Tensor]
    key: tuple[int | str, ...]
    is_adversarial: bool
    touch_all: bool  # it holds images alone, and other packs of the step may hold videos


class VaeTrainee:
    """See `pipeline.trainee.Trainee`."""

    def __init__(self, task: VaeTask, cache_bytes: int = 1 << 29) -> None:
        self.config = task.config
        self.clips = store.Manifest.load(task.clips_uri).read("clips").to_pylist()
        self.samples = Samples.of([min(clip["num_frames"], self.config.crop_frames) for clip in self.clips])
        vae = VideoVAE(self.config.vae)
        loss = self.config.loss
        self.perceptual = Lpips.from_pretrained(loss.perceptual_file) if loss.perceptual_file else None
        self.model = AdversarialVae(vae, loss, self.perceptual) if loss.adversarial_weight else vae
        self._reader = ClipReader()
        self._decoded: BoundedCache[int, Frames] = BoundedCache(cache_bytes, lambda video: video.nbytes)

    def loss_function(self, model: nn.Module, batch: VaeBatch) -> dict[str, Tensor]:
        """The weighted losses by name, summed over pixels and channels."""
        device = next(model.parameters()).device
        if self.perceptual is not None:
            self.perceptual.to(device)
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
        for part, video in enumerate(batch.videos):
            video, generator = video.to(device), keyed_generator(*batch.key, part)
            if self.config.loss.adversarial_weight:
                losses = model(video, generator, batch.is_adversarial, batch.touch_all)
            else:
                losses = reconstruction_losses(
                    model, video, generator, self.config.loss, self.perceptual, batch.touch_all
                )[1]
            for name, loss in losses.items():
                totals[name] = totals[name] + loss * video.numel()
        return dict(totals)

    def begin(self, places: Iterator[int]) -> None:
        """Samples are read when they are asked for."""

    def num_elements(self, step: int, pack: Pack) -> float:
        """Pixels times channels of the pack's crops."""
        most = self.config.crop_px
        total = 0
        for clip in (self.clips[place] for place in pack):
            frames = min(clip["num_frames"], self._crop_frames(step))
            total += 3 * frames * min(clip["height_px"], most) * min(clip["width_px"], most)
        return float(total)

    def sample_ids(self, pack: Pack) -> tuple[str, ...]:
        """Clip ids."""
        return tuple(self.clips[place]["clip_id"] for place in pack)

    def load(self, step: int, pack: Pack) -> VaeBatch:
        """Random crops, keyed by (seed, step, clip)."""
        by_shape: dict[tuple[int, ...], list[Frames]] = defaultdict(list)
        for place in pack:
            key = (self.config.plan.seed, step, self.clips[place]["clip_id"])
            crop = random_crop(self._read(place), self._crop_frames(step), self.config.crop_px, *key)
            by_shape[crop.shape].append(crop)
        key = (self.config.plan.seed, step, self.clips[pack[0]]["clip_id"])
        return VaeBatch(
            videos=[to_video(np.stack(crops)) for crops in by_shape.values()],
            key=key,
            is_adversarial=step >= self.config.loss.adversarial_start,
            touch_all=self._crop_frames(step) > 1 and all(shape[0] == 1 for shape in by_shape),
        )

    def export(self, folder: str, averaged: dict[str, Tensor]) -> dict[str, float]:
        """Measure the latents' statistics and the reconstruction of whole clips, and write the model folder."""
        vae = VideoVAE(self.config.vae).eval()
        own = {name.removeprefix("vae."): value for name, value in averaged.items() if not name.startswith("discrim")}
        vae.load_state_dict(own)
        most = min(len(self.clips), self.config.num_statistics_clips)
        places = np.linspace(0, len(self.clips) - 1, most).astype(int).tolist()
        videos = [self._read(place) for place in places]
        vae.with_latent_statistics(*latent_statistics(vae, videos)).save_pretrained(folder)
        HashedWordEncoder(self.config.text).save_pretrained(folder)
        scores = reconstruction_scores(vae, videos)
        rows = [{"place": place, **row} for place, row in zip(places, scores, strict=True)]
        store.write_json(store.join(folder, RECONSTRUCTION), rows)
        means = {name: float(np.mean([row[name] for row in rows])) for name in SCORES}
        num_parameters = sum(parameter.numel() for parameter in vae.parameters())
        return {**means, "num_parameters": num_parameters, "num_clips": len(self.clips)}

    def flops(self, pack: Pack) -> float:
        """Not counted."""
        return 0.0

    def measure(self, folder: str) -> dict[str, float]:
        """Nothing beside what `export` measures."""
        return {}

    def show(self, folder: str) -> tuple[dict[str, Frames], float]:
        """The clips whose reconstructions are the worst, the median and the best, each above its reconstruction."""
        vae = VideoVAE.from_pretrained(folder)
        rows = sorted(store.read_json(store.join(folder, RECONSTRUCTION)), key=lambda row: row["psnr_db"])
        shown, captions = {}, []
        for name, rank in {"worst": 0, "median": len(rows) // 2, "best": -1}.items():
            row = rows[rank]
            video_u8 = self._read(row["place"])
            with torch.no_grad():
                reconstruction = vae.decode(vae.encode(to_video(video_u8[None])).mean)[0]
            shown[f"reconstructions/{name}"] = np.concatenate([video_u8, video_to_u8(reconstruction).numpy()], axis=1)
            clip_id = self.clips[row["place"]]["clip_id"]
            captions.append(
                f"{name} of {len(rows)} clips, its reconstruction below it:"
                f" {row['psnr_db']:.1f} dB, SSIM {row['ssim']:.3f} ({clip_id})"
            )
        sheet = media.contact_sheet(list(shown.values()), captions, cell_px=160)
        store.write_bytes(store.join(folder, SHEET), media.encode_png(sheet))
        return shown, float(self.clips[0]["fps"])

    def _crop_frames(self, step: int) -> int:
        return 1 if step < self.config.image_steps else self.config.crop_frames

    def _read(self, place: int) -> Frames:
        clip = self.clips[place]
        arguments = {name: clip[name] for name in ("start_s", "end_s", "fps", "height_px", "width_px", "num_frames")}
        return self._decoded.get(place, lambda: self._reader.read(clip["source_uri"], **arguments).video_u8)


def random_crop(video_u8: Frames, max_frames: int, max_px: int, *key: int | str) -> Frames:
    """A crop of t h w c video at a place that the key decides."""
    num_frames, height_px, width_px, _ = video_u8.shape
    t, h, w = min(num_frames, max_frames), min(height_px, max_px), min(width_px, max_px)
    free = torch.tensor([num_frames - t + 1, height_px - h + 1, width_px - w + 1])
    t0, y0, x0 = (torch.rand(3, generator=keyed_generator(*key, "crop")) * free).long().tolist()
    return video_u8[t0 : t0 + t, y0 : y0 + h, x0 : x0 + w]


def read_reconstruction(run: store.Manifest) -> dict[str, dict[str, float]]:
    """What a finished run measured: see `reconstruction_table`."""
    return reconstruction_table(store.read_json(store.join(model_folder(run), RECONSTRUCTION)))
