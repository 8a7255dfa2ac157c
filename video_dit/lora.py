"""Low-rank adapters (LoRA, arXiv 2106.09685) of the transformer, in diffusers' format.

    W + (alpha / rank) B A,   A: rank x inputs,  B: outputs x rank

peft puts them into the model for training. Files hold them under the published names, where a fused linear map of ours
is several of theirs: those share A, and each has its rows of B. Any adapter of that format can be merged into weights,
whoever trained it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from video_dit import weights
from video_dit.key_tables import published_names

LORA_FILE = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."
METADATA = "lora_adapter_metadata"  # where diffusers looks for rank and alpha
TARGETS = ("self_attention.qkv", "self_attention.out", "cross_attention.q", "cross_attention.kv", "cross_attention.out")
MLP_TARGETS = ("mlp.0", "mlp.2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Size of the adapters.

    Attributes:
        rank: of the change of each linear map.
        alpha: strength of the change, divided by the rank; None is the rank, a factor of 1.
        mlp: whether the blocks' MLPs have adapters as well as their attention.
    """

    rank: int = 16
    alpha: int | None = None
    mlp: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be at least 1")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"alpha={self.alpha}: must be positive, or None for the rank")

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def add_lora(model: nn.Module, config: LoraConfig) -> None:
    """Freeze a transformer and give its blocks adapters to train, in place; at first they change nothing.

    Raises:
        ModuleNotFoundError: peft is missing; the extra `lora` installs it.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("LoRA needs peft: pip install 'kinoray[lora]'") from error
    ends = "|".join(map(re.escape, (*TARGETS, *(MLP_TARGETS if config.mlp else ()))))
    model.requires_grad_(False)
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=config.rank, lora_alpha=config.alpha or config.rank, target_modules=rf"blocks\.\d+\.({ends})", bias="none"
        ),
        model,
    )


def published_lora(state: Mapping[str, Tensor], class_name: str) -> dict[str, Tensor]:
    """A trained model's adapters under the published names.

    Args:
        state: of a model after `add_lora`; its frozen weights may be missing.
        class_name: whose names, a key of KEY_TABLES.
    """
    published: dict[str, Tensor] = {}
    for key, value in state.items():
        found = re.fullmatch(r"(.+)\.lora_([AB])\.default\.weight", key)
        if not found:
            continue
        names = [name.removesuffix(".weight") for name in published_names(f"{found[1]}.weight", class_name)]
        parts = value.chunk(len(names)) if found[2] == "B" else [value] * len(names)
        for name, part in zip(names, parts, strict=True):
            published[f"{PREFIX}{name}.lora_{found[2]}.weight"] = part.contiguous().clone()
    return published


def save_lora(published: Mapping[str, Tensor], config: LoraConfig, url: str) -> None:
    """Write adapters under their published names as `LORA_FILE`; diffusers' `load_lora_weights` takes the folder."""
    modules = sorted({key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in published})
    told = {"r": config.rank, "lora_alpha": config.alpha or config.rank, "target_modules": modules, "bias": "none"}
    metadata = {"format": "pt", METADATA: json.dumps({f"{PREFIX}{key}": value for key, value in told.items()})}
    weights.write_bytes(save_tensors(dict(published), metadata=metadata), url, LORA_FILE)


def merge_lora(model: nn.Module, url: str, strength: float = 1.0) -> None:
    """Add adapters to a transformer's weights, in place.

    Args:
        model: with `.published_class`.
        url: a folder with LORA_FILE, or a safetensors file, of diffusers' format.
        strength: 1 as trained, 0 not at all.

    Raises:
        ValueError: the file holds something else, or adapters that do not fit this model.
    """
    url = url if url.endswith(".safetensors") else f"{url.rstrip('/')}/{LORA_FILE}"
    data = weights.read_bytes(url)
    left, scale = _read(data, url), _scale(data)
    for key, value in model.state_dict().items():
        if not key.endswith(".weight"):
            continue
        names = published_names(key, str(model.published_class))
        rows = value.chunk(len(names)) if len(names) > 1 else [value]
        for name, row in zip(names, rows, strict=True):
            pair = left.pop(name.removesuffix(".weight"), None)
            if pair is None:
                continue
            change = scale * strength * (pair["B"].float() @ pair["A"].float())
            if change.shape != row.shape:
                raise ValueError(f"{url}: {name} is {tuple(change.shape)}, the model's {tuple(row.shape)}")
            row.copy_((row.float() + change.to(row.device)).to(row.dtype))  # a view of the weight
    if left:
        raise ValueError(f"{url}: the model has no {', '.join(sorted(left)[:5])}: it was trained on another")


def _read(data: bytes, url: str) -> dict[str, dict[str, Tensor]]:
    """A and B by the published module's name."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in load_tensors(data).items():
        found = re.fullmatch(rf"(?:{re.escape(PREFIX)}|diffusion_model\.)?(.+)\.lora_([AB])\.weight", key)
        if not found:
            raise ValueError(f"{url}: {key!r} is no LoRA tensor in diffusers' format, NAME.lora_A.weight")
        pairs.setdefault(found[1], {})[found[2]] = value
    for name, pair in pairs.items():
        if len(pair) != 2:
            raise ValueError(f"{url}: {name} lacks lora_{'AB'.replace(next(iter(pair)), '')}")
    return pairs


def _scale(data: bytes) -> float:
    """alpha / rank, 1 where the file does not tell."""
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    told = json.loads(metadata.get(METADATA, "{}"))
    told = {key.removeprefix(PREFIX): value for key, value in told.items()}
    if told.get("alpha_pattern") or told.get("rank_pattern"):
        raise ValueError("LoRA with ranks or alphas of their own for some layers is not supported")
    return float(told["lora_alpha"]) / float(told["r"]) if "lora_alpha" in told else 1.0
