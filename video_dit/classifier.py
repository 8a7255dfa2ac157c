"""Which classes noisy latents show: what classifier guidance (ADM, arXiv 2105.05233) asks.

The model is a video transformer without text whose tokens vote: its prediction holds a logit for every class at every
place of a sample, and a sample's logits are the mean over its places. So it takes any shapes, packed, at any timesteps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from video_dit import weights
from video_dit.diffusion.classifier_guidance import LogProb, with_classifier
from video_dit.diffusion.sampling import Denoise
from video_dit.generator import GenerationRequest, Generator
from video_dit.key_tables import LATENT_CLASSIFIER
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.muon import Matrix
from video_dit.packing import PackedBatch

UNKNOWN = -1  # the label of an attribute that is not known, or not asked for
TEXT_DIM = 1  # of the one zero token that stands where a text would


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentClassifierConfig:
    """What is told apart, and the sizes of the transformer under the names of VideoDiTConfig.

    Attributes:
        classes: names of each attribute's classes: {"colour": ("red", "green"), ...}.
        patch_size: latent frames, rows and columns in one token; that of the model to be guided.
        in_channels: channels of the latents.
    """

    classes: dict[str, tuple[str, ...]]
    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 4
    attention_head_dim: int = 32
    in_channels: int = 16
    freq_dim: int = 64
    ffn_dim: int = 512
    num_layers: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", {name: tuple(values) for name, values in self.classes.items()})
        if not self.classes:
            raise ValueError("classes={}: must name at least one attribute")
        for name, values in self.classes.items():
            if len(values) < 2 or len(set(values)) < len(values):
                raise ValueError(f"classes[{name!r}]={values}: must be at least two names, all different")
        _ = self.transformer  # checks the sizes

    @property
    def transformer(self) -> VideoDiTConfig:
        """A channel of its prediction for each class."""
        shared = {field.name for field in dataclasses.fields(self)} - {"classes"}
        return VideoDiTConfig(
            out_channels=sum(map(len, self.classes.values())),
            text_dim=TEXT_DIM,
            **{name: getattr(self, name) for name in shared},
        )

    def labels(self, samples: Sequence[Mapping[str, str | None]]) -> Tensor:
        """Numbers of the classes that samples have: b attributes, int64, attributes in the order of `classes`.

        Args:
            samples: class by attribute; one that is missing or None is UNKNOWN.

        Raises:
            ValueError: an attribute or a class that the classifier does not know.
        """
        for sample in samples:
            for name, value in sample.items():
                if name not in self.classes:
                    raise ValueError(f"{name}={value!r}: no attribute of the classifier, must be in {[*self.classes]}")
                if value is not None and value not in self.classes[name]:
                    raise ValueError(f"{name}={value!r}: must be one of {self.classes[name]}, or None")
        numbers = [
            [UNKNOWN if sample.get(name) is None else names.index(sample[name]) for name, names in self.classes.items()]
            for sample in samples
        ]
        return torch.tensor(numbers, dtype=torch.int64).reshape(len(samples), len(self.classes))


class LatentClassifier(nn.Module):
    """Tells the classes of every sample in a pack at its noise level; samples never see each other."""

    published_class = LATENT_CLASSIFIER

    def __init__(self, config: LatentClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = VideoDiT(config.transformer)

    def forward(self, packed: PackedBatch) -> dict[str, Tensor]:
        """Logits by attribute, b classes, float32, samples in the order of the list given to `pack`.

        Args:
            packed: tokens n (c pt ph pw); its texts are not looked at.
        """
        no_text = packed.tokens.new_zeros(1, TEXT_DIM)
        votes = self.transformer(packed.with_texts([no_text] * len(packed.grids)))  # n (classes pt ph pw)
        logits = torch.stack([sample.float().mean((1, 2, 3)) for sample in packed.unpack(votes)])  # b classes
        parts = logits.split([len(names) for names in self.config.classes.values()], dim=1)
        return dict(zip(self.config.classes, parts, strict=True))

    def start_from(self, dit: VideoDiT) -> None:
        """Take over what a diffusion model has learned to see, all but its texts and its predictions.

        Raises:
            ValueError: the model has other sizes.
        """
        own = self.config.transformer
        expected = dataclasses.replace(dit.config, out_channels=own.out_channels, text_dim=own.text_dim)
        wrong = [
            f"{field.name}={getattr(own, field.name)} (must be {getattr(expected, field.name)})"
            for field in dataclasses.fields(own)
            if getattr(own, field.name) != getattr(expected, field.name)
        ]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: the classifier needs the sizes of the model that it starts from")
        state = {
            name: value for name, value in dit.state_dict().items() if not name.startswith(("text_mlp", "head.out"))
        }
        self.transformer.load_state_dict(state, strict=False)

    @property
    def blocks(self) -> nn.ModuleList:
        """What `parallelize` works on, block by block."""
        return self.transformer.blocks

    def hidden_matrices(self) -> list[Matrix]:
        """What Muon may train."""
        return self.transformer.hidden_matrices()

    @classmethod
    def from_pretrained(
        cls, url: str, subfolder: str = "classifier", dtype: torch.dtype | None = None
    ) -> LatentClassifier:
        """Load a model folder; see `weights.load_model` for the errors. `dtype` None keeps the weights' own."""
        return weights.load_model(cls, LatentClassifierConfig, url, subfolder, dtype)

    def save_pretrained(self, url: str, subfolder: str = "classifier") -> None:
        """Write a model folder; the names of the classes are in its config.json."""
        weights.save_model(self, url, subfolder)


class ClassifierBatch(NamedTuple):
    """A pack of noisy samples, and their labels, b attributes, in the order of the list given to `pack`."""

    packed: PackedBatch
    labels: Tensor


def class_log_prob(logits: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """log p(labels), b: attributes are told independently of each other, and UNKNOWN ones tell nothing.

    Args:
        logits: by attribute, b classes.
        labels: b attributes.
    """
    by_attribute = [
        -F.cross_entropy(values, label, ignore_index=UNKNOWN, reduction="none")
        for values, label in zip(logits.values(), labels.unbind(1), strict=True)
    ]
    return torch.stack(by_attribute).sum(0)


def classifier_loss(model: nn.Module, batch: ClassifierBatch) -> Tensor:
    """Cross-entropy, summed over samples and their attributes."""
    device = next(model.parameters()).device
    return -class_log_prob(model(batch.packed.to(device)), batch.labels.to(device)).sum()


def pack_log_prob(classifier: LatentClassifier, packed: PackedBatch, labels: Tensor) -> LogProb:
    """What `with_classifier` asks about a pack: (tokens, timestep) -> log p(labels | tokens), summed over samples.

    The timestep is a number, or n 1, the same for all tokens of a frame.

    Args:
        classifier: on the pack's device.
        packed: the samples; its tokens, timesteps and texts are not used.
        labels: b attributes, in the order of the list given to `pack`.

    Raises:
        ValueError: the classifier is made for other tokens.
    """
    config = classifier.config
    num_channels = packed.tokens.shape[1] // (packed.patch.t * packed.patch.h * packed.patch.w)
    if (config.patch_size, config.in_channels) != (packed.patch, num_channels):
        raise ValueError(
            f"patch_size={config.patch_size}, in_channels={config.in_channels}: the classifier must have the guided "
            f"model's {tuple(packed.patch)} and {num_channels}"
        )
    with torch.inference_mode(False):  # autograd takes no inference tensors
        frames = packed.frame_of_token.clone()
        packed = dataclasses.replace(packed, frame_of_token=frames)
        labels = labels.to(packed.tokens.device).clone()

    def log_prob(tokens: Tensor, timestep: Tensor) -> Tensor:
        by_token = timestep.to(tokens.device, torch.float32).expand(tokens.shape[0], 1)[:, 0]  # n
        timesteps = by_token.new_zeros(packed.timesteps.shape).scatter(0, frames, by_token)  # f
        return class_log_prob(classifier(packed.replace(tokens=tokens, timesteps=timesteps)), labels).sum()

    return log_prob


def sample_classes(
    generator: Generator,
    classifier: LatentClassifier,
    requests: Sequence[GenerationRequest],
    labels: Tensor,
    scale: float,
) -> list[Tensor]:
    """Videos of classes, by a diffusion model that is told nothing and a classifier that leads it.

    Args:
        generator: its model must know the empty caption, from caption dropout.
        classifier: on the generator's device, of noise by the same schedule.
        requests: as for the generator; their prompts and guidance scales are not used.
        labels: b attributes, see `LatentClassifierConfig.labels`.
        scale: of the classifier's gradient; 0 asks no classifier.

    Returns:
        uint8 t h w 3 RGB on the CPU, one a request.
    """
    untold = [dataclasses.replace(request, prompt="", guidance_scale=1.0) for request in requests]

    def guide(denoise: Denoise, packed: PackedBatch) -> Denoise:
        log_prob = pack_log_prob(classifier, packed, labels)
        return with_classifier(denoise, log_prob, generator.sampling.schedule, generator.sampling.target, scale)

    return generator(untold, guide=guide)
