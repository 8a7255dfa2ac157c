"""The whole way from a source to a model, hop by hop: each runs what is missing before it and skips what is there."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from pipeline import console, report_page, store
from pipeline.curate import CurateConfig, curate
from pipeline.distill_video import DistillVideoConfig, distill_video
from pipeline.encode import EncodeConfig, encode
from pipeline.evaluate import EvaluateConfig, evaluate_video, read_scores, toy_requests
from pipeline.generate import GenerateConfig, sample_video
from pipeline.given import GivenConfig
from pipeline.latent_training import latents_of
from pipeline.models import Model, model_folder, open_model
from pipeline.toy import ToyConfig, make_toy_clips
from pipeline.train import WorkersConfig
from pipeline.train_classifier import TrainClassifierConfig, read_accuracy, train_classifier
from pipeline.train_vae import SHEET, TrainVaeConfig, read_reconstruction, train_vae
from pipeline.train_video import TrainVideoConfig, train_video
from video_dit.generator import GenerationRequest, read_limits


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What a finished model shows first.

    Attributes:
        prompts: what to show; without any, held-out toy scenes, or captions of the source's own clips.
        num_frames, height_px, width_px: of the prompts' videos, given frames included; `generate.window_frames` makes
            long ones.
        given: images and videos that the prompts' videos are made from.
        num: how many, when no prompts are given.
        generate: steps, guidance and batches.
    """

    prompts: tuple[str, ...] = ()
    num_frames: int = 17
    height_px: int = 64
    width_px: int = 64
    given: GivenConfig = dataclasses.field(default_factory=GivenConfig)
    num: int = 12
    generate: GenerateConfig = dataclasses.field(default_factory=GenerateConfig)

    def __post_init__(self) -> None:
        if self.given.files and not self.prompts:
            raise ValueError(f"prompts=(): {', '.join(self.given.files)} given, must say what their videos show")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole configuration: one part a hop, and the workers that train."""

    toy: ToyConfig = dataclasses.field(default_factory=ToyConfig)
    curate: CurateConfig = dataclasses.field(default_factory=CurateConfig)
    vae: TrainVaeConfig = dataclasses.field(default_factory=TrainVaeConfig)
    encode: EncodeConfig = dataclasses.field(default_factory=EncodeConfig)
    video: TrainVideoConfig = dataclasses.field(default_factory=TrainVideoConfig)
    classifier: TrainClassifierConfig = dataclasses.field(default_factory=TrainClassifierConfig)
    distill: DistillVideoConfig = dataclasses.field(default_factory=DistillVideoConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    workers: WorkersConfig = dataclasses.field(default_factory=WorkersConfig)


class Chain:
    """The hops of one recipe over one source.

    Args:
        recipe: all configs.
        source: folder, bucket or manifest of videos; None makes the toy world.
        storage: root of all results.
        model: a run's or a model's folder to use instead of training one.
        latents: what `encode` published, to use instead of encoding the source; several are data sets of a mixture.
    """

    def __init__(
        self, recipe: Recipe, source: str | None, storage: str, model: str | None = None, latents: Sequence[str] = ()
    ) -> None:
        self.recipe, self.source, self.storage = recipe, source, storage
        self._given_model, self._given_latents = model, latents
        self._clips: store.Manifest | None = None  # looked up once

    def toy_clips(self) -> store.Manifest:
        """The toy world's files."""
        return self._hop("toy clips", lambda: make_toy_clips(self.recipe.toy, self.storage))

    def clips(self) -> store.Manifest:
        """CLIPS of the source."""
        if self._clips is None:
            source = self.source or store.join(self.toy_clips().uri, "clips")
            self._clips = self._hop("curate", lambda: curate(self.recipe.curate, source, self.storage))
        return self._with_page(self._clips)

    def vae(self) -> store.Manifest:
        """The trained VAE."""
        clips = self.clips()
        run = self._hop("train VAE", lambda: train_vae(self.recipe.vae, self.recipe.workers, clips, self.storage))
        console.reconstruction_table(read_reconstruction(run))
        console.say(f"look at: {store.join(model_folder(run), SHEET)}")
        return run

    def latents(self) -> list[store.Manifest]:
        """The given LATENTS, or those of the clips."""
        return [store.Manifest.load(store.absolute(uri)) for uri in self._given_latents] or [self.encoded()]

    def encoded(self) -> store.Manifest:
        """LATENTS of the clips."""
        encoder, clips, config = self.encoder(), self.clips(), self.recipe.encode
        (parent,) = encoder.as_parents
        return self._with_page(self._hop("encode", lambda: encode(config, clips, parent, encoder.uri, self.storage)))

    def encoder(self) -> Model:
        """The model whose VAE and text encoder encode: the one to train further, or a VAE trained for the clips."""
        if self.recipe.video.start:
            return open_model(self.recipe.video.start)
        vae = self.vae()
        return Model(uri=model_folder(vae), run=vae)

    def classifier(self) -> store.Manifest:
        """The trained classifier of the toy world's attributes; begins with the model."""
        config, workers, model = self.recipe.classifier, self.recipe.workers, self.model()
        run = self._hop(
            "train classifier",
            lambda: train_classifier(config, workers, latents_of(model), self.storage, start=model),
        )
        console.accuracy_table(read_accuracy(run))
        return run

    def model(self) -> Model:
        """The given model, or the one that the recipe trains."""
        if self._given_model:
            return open_model(self._given_model)
        video, workers = self.recipe.video, self.recipe.workers
        if video.online_actors:
            encoder, data = self.encoder(), [self.clips()]
        else:
            encoder, data = None, self.latents()
        run = self._hop("train video", lambda: train_video(video, workers, data, self.storage, encoder=encoder))
        return Model(uri=model_folder(run), run=run)

    def samples(self, model: Model | None = None) -> store.Manifest:
        """Videos and a contact sheet of a model."""
        self.recipe.sample.given.check_files()
        made_by = model or self.model()
        config = self.recipe.sample.generate
        return self._hop("sample", lambda: sample_video(config, self._requests(made_by), made_by, self.storage))

    def scores(self, model: Model | None = None) -> store.Manifest:
        """The toy world's score table of a model."""
        made_by = model or self.model()
        manifest = self._hop("evaluate", lambda: evaluate_video(self.recipe.evaluate, made_by, self.storage))
        console.score_table(read_scores(manifest))
        return manifest

    def student(self) -> Model:
        """The recipe's distillation of the model."""
        config, teacher = self.recipe.distill, self.model()
        run = self._hop("distill", lambda: distill_video(config, self.recipe.workers, teacher, self.storage))
        return Model(uri=model_folder(run), run=run)

    def train_and_show(self) -> store.Manifest:
        """Train, sample and, in the toy world, score; says what to look at."""
        return self._show(self.model())

    def distill_and_show(self) -> store.Manifest:
        """The same with a student, in its few steps."""
        return self._show(self.student())

    def _show(self, model: Model) -> store.Manifest:
        samples = self.samples(model)
        if self.source is None:
            self.scores(model)
        console.say(f"look at: {samples.uri}/contact_sheet.png")
        console.say(f"watch: tensorboard --logdir {self.storage}")
        return model.run or samples

    def _requests(self, model: Model) -> list[GenerationRequest]:
        config = self.recipe.sample
        size = (config.num_frames, config.height_px, config.width_px)
        if config.prompts:
            requests = [config.generate.request(n, prompt, *size) for n, prompt in enumerate(config.prompts)]
            return config.given.put_into(requests, read_limits(model.uri))
        if self.source is None:
            return toy_requests(config.generate, config.num, self.recipe.evaluate.seed)
        clips = self.clips().read("clips").slice(0, config.num).to_pylist()
        return [
            config.generate.request(n, clip["caption"], clip["num_frames"], clip["height_px"], clip["width_px"])
            for n, clip in enumerate(clips)
        ]

    def _with_page(self, manifest: store.Manifest) -> store.Manifest:
        """The result, with a page to look at."""
        if not store.exists(store.join(manifest.uri, report_page.PAGE)):
            report_page.write_page(manifest)
        return manifest

    def _hop(self, label: str, run: Callable[[], store.Manifest]) -> store.Manifest:
        start_s = time.monotonic()
        manifest = run()
        console.hop_done(label, manifest, time.monotonic() - start_s)
        return manifest
