"""Train a classifier of noisy LATENTS on the toy world's attributes, which captions state: for classifier guidance."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import pyarrow as pa
import torch
from torch import Tensor

from pipeline import store
from pipeline.feed import LatentDataset, is_held_out
from pipeline.media import Frames
from pipeline.models import Model, model_folder
from pipeline.plan import Pack, Plan, PlanConfig
from pipeline.toy_scenes import VALUES, parse_caption
from pipeline.train import WorkersConfig, train
from video_dit import weights
from video_dit.classifier import (
    TEXT_DIM,
    UNKNOWN,
    ClassifierBatch,
    LatentClassifier,
    LatentClassifierConfig,
    classifier_loss,
)
from video_dit.diffusion.losses import DiffusionConfig, diffusion_batch
from video_dit.model import VideoDiT
from video_dit.packing import PackedBatch, pack
from video_dit.parallel.apply import Precision
from video_dit.random import keyed_normal
from video_dit.training import OptimizerConfig

MEASURED_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
ACCURACY = "accuracy.json"

Accuracy = dict[str, dict[str, float]]  # attribute -> noise level -> share of the held-out samples that is told right


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainClassifierConfig:
    """A training run of the classifier.

    Attributes:
        model: sizes; its classes are attributes of the toy world.
        diffusion: the schedule is that of the model to be guided; noise levels may be drawn otherwise.
        plan: token budget and batch.
        optimizer: learning rate and length.
        held_out_share: of the clips, by their ids, that are not trained on but measured.
    """

    model: LatentClassifierConfig = dataclasses.field(default_factory=lambda: LatentClassifierConfig(classes=VALUES))
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    plan: PlanConfig = dataclasses.field(default_factory=PlanConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    held_out_share: float = 0.1

    def __post_init__(self) -> None:
        for name, values in self.model.classes.items():
            if values != VALUES.get(name):
                raise ValueError(f"model.classes[{name!r}]={values}: must be an attribute of the toy world: {VALUES}")
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"held_out_share={self.held_out_share}: must be between 0 and 1, neither of them")


def train_classifier(
    config: TrainClassifierConfig,
    workers: WorkersConfig,
    latents: Sequence[store.Manifest],
    storage: str,
    start: Model | None = None,
    name: str = "classifier",
) -> store.Manifest:
    """Train, or return the run that the same call finished before.

    The result measures `accuracy_<attribute>_at_<sigma>` on the held-out clips; see `read_accuracy`.

    Args:
        config: decides the result.
        workers: resources; do not.
        latents: what `encode` published, one or several data sets.
        storage: root of all results; a file system that all workers share.
        start: a diffusion model of the same sizes to begin with: it knows what latents show; None begins at random.
        name: of the run.

    Raises:
        ValueError: a caption that states no toy scene, sizes that do not fit the latents, no clip to train on or to
            hold out, or workers that cannot share the storage.
    """
    _check_fits(config, latents)
    uris = tuple(manifest.uri for manifest in latents)
    task = ClassifierTask(latents_uris=uris, config=config, start_uri=start.uri if start else None)
    task.new_model()  # fails here if the sizes do not fit
    return store.publish_once(
        storage,
        "train_classifier",
        name,
        {**dataclasses.asdict(config), "start": start.name if start else None},
        [*latents, *(start.parents if start else ())],
        lambda folder: train(task, workers, folder, "classifier"),
    )


def _check_fits(config: TrainClassifierConfig, latents: Sequence[store.Manifest]) -> None:
    tables = [manifest.read("latents", ["clip_id", "caption", "latents_shape"]) for manifest in latents]
    rows = pa.concat_tables(tables).to_pydict()
    caption_labels(config.model, rows["caption"])
    for channels in {shape[0] for shape in rows["latents_shape"]}:
        if channels != config.model.in_channels:
            raise ValueError(
                f"model.in_channels={config.model.in_channels}, but the encoded clips have {channels}: set "
                f"model.in_channels to {channels}"
            )
    num_held_out = sum(is_held_out(clip_id, config.held_out_share) for clip_id in rows["clip_id"])
    if not 0 < num_held_out < len(rows["clip_id"]):
        raise ValueError(
            f"held_out_share={config.held_out_share}: {num_held_out} of {len(rows['clip_id'])} clips are held out, "
            "must be some and not all"
        )


def caption_labels(config: LatentClassifierConfig, captions: Sequence[str]) -> Tensor:
    """Labels of toy captions, b attributes; motion in an image and the speed of a still object are UNKNOWN.

    Raises:
        ValueError: a caption that states no toy scene.
    """
    scenes = [parse_caption(caption) for caption in captions]
    return config.labels([{name: getattr(scene, name) for name in config.classes} for scene in scenes])


def read_accuracy(run: store.Manifest) -> Accuracy:
    """What a finished run measured."""
    table: Accuracy = store.read_json(store.join(model_folder(run), ACCURACY))
    return table


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierTask:
    """See `pipeline.trainee.Task`."""

    latents_uris: tuple[str, ...]
    config: TrainClassifierConfig
    start_uri: str | None = None

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

    def new_model(self) -> LatentClassifier:
        """The classifier before its training."""
        classifier = LatentClassifier(self.config.model)
        if self.start_uri:
            classifier.start_from(VideoDiT.from_pretrained(self.start_uri))
        return classifier

    def build(self) -> ClassifierTrainee:
        """Open the latents and make the classifier."""
        return ClassifierTrainee(self)


class ClassifierTrainee:
    """See `pipeline.trainee.Trainee`."""

    def __init__(self, task: ClassifierTask) -> None:
        self.config = task.config
        self.data = LatentDataset(*(store.Manifest.load(uri) for uri in task.latents_uris))
        self.labels = caption_labels(self.config.model, self.data.captions)
        self.model = task.new_model()
        self.patch = self.model.transformer.config.patch
        self.samples = self.data.samples(self.patch, self.config.held_out_share)
        self.measured = self.samples.held_out()[0].tolist()
        self.loss_function = classifier_loss
        self.no_text = torch.zeros(1, TEXT_DIM)

    def begin(self, places: Iterator[int]) -> None:
        """Samples are read when they are asked for."""

    def num_elements(self, step: int, pack: Pack) -> float:
        """Samples of the pack."""
        return float(len(pack))

    def sample_ids(self, pack: Pack) -> tuple[str, ...]:
        """Clip ids."""
        return tuple(self.data.clip_ids[place] for place in pack)

    def load(self, step: int, pack: Pack) -> ClassifierBatch:
        """Noised latents, as a diffusion model in training sees them; noise is keyed by (seed, step, clip)."""
        samples = [self.data[place] for place in pack]
        batch = diffusion_batch(
            latents=[sample.draw(self.config.plan.seed, step) for sample in samples],
            texts=[self.no_text] * len(samples),
            empty_text=self.no_text,
            keys=[(self.config.plan.seed, step, sample.clip_id) for sample in samples],
            config=self.config.diffusion,
            patch=self.patch,
        )
        return ClassifierBatch(batch.packed, self.labels[list(pack)])

    def export(self, folder: str, averaged: dict[str, Tensor]) -> dict[str, float]:
        """Write the model folder, with what the held-out clips say of it."""
        classifier = LatentClassifier(self.config.model).eval()
        classifier.load_state_dict(averaged)
        classifier.save_pretrained(folder)
        class_name = LatentClassifier.published_class
        weights.save_index(folder, [("classifier", "video_dit", class_name)], pipeline_class=class_name)
        table = self.accuracy(classifier)
        store.write_json(store.join(folder, ACCURACY), table)
        return {
            **{f"accuracy_{name}_at_{level}": share for name, row in table.items() for level, share in row.items()},
            "num_parameters": sum(value.numel() for value in averaged.values()),
            "num_samples": len(self.data) - len(self.measured),
            "num_held_out": len(self.measured),
        }

    def flops(self, pack: Pack) -> float:
        """Not counted."""
        return 0.0

    def measure(self, folder: str) -> dict[str, float]:
        """Nothing beside what `export` measures."""
        return {}

    def show(self, folder: str) -> tuple[dict[str, Frames], float]:
        """Nothing to look at."""
        return {}, self.data.fps

    def accuracy(self, classifier: LatentClassifier) -> Accuracy:
        """On the held-out clips, with noise keyed by clip; attributes that none of them has are left out."""
        known = (self.labels[self.measured] != UNKNOWN).sum(0)  # attributes
        right = {str(sigma): self._num_right(classifier, sigma) for sigma in MEASURED_SIGMAS}
        return {
            name: {level: numbers[column].item() / known[column].item() for level, numbers in right.items()}
            for column, name in enumerate(self.config.model.classes)
            if known[column]
        }

    @torch.no_grad()
    def _num_right(self, classifier: LatentClassifier, sigma: float) -> Tensor:
        """How many held-out clips are told right at a noise level, by attribute."""
        total = torch.zeros(len(self.config.model.classes), dtype=torch.int64)
        for step in Plan(self.samples.held_out()[1], self.config.plan).epoch(0):
            for places in ([self.measured[number] for number in numbers] for numbers in step.packs):
                logits = classifier(self._noisy_pack(places, sigma))
                found = torch.stack([values.argmax(1) for values in logits.values()], dim=1)  # b attributes
                total += (found == self.labels[places]).sum(0)
        return total

    def _noisy_pack(self, places: list[int], sigma: float) -> PackedBatch:
        schedule = self.config.diffusion.schedule
        noisy = []
        for sample in (self.data[place] for place in places):
            noise = keyed_normal(sample.latents.shape, "held out", sample.clip_id)
            noisy.append(schedule.mix(sample.latents, noise, sigma))
        timestep = float(schedule.timestep(torch.tensor(sigma, dtype=torch.float64)))
        return pack(noisy, [timestep] * len(noisy), [self.no_text] * len(noisy), self.patch)
