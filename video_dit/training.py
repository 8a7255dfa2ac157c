"""One training step and its state, the same in a test, under torchrun and on Ray.

Nothing here knows about processes: a `World` sums over them. There is no random state and no scheduler state, so a
checkpoint is the weights, their average, the optimizer's moments and the number of steps done.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from video_dit.muon import Matrix, Muon, local


class World(Protocol):
    """The processes that train together."""

    rank: int
    size: int

    def sum(self, value: Tensor) -> Tensor:
        """The value added up over all processes."""

    def whole(self, value: Tensor) -> Tensor:
        """A tensor that may be sharded over the processes, as a plain one."""


@runtime_checkable
class HasMatrices(Protocol):
    """A model that Muon can train."""

    def hidden_matrices(self) -> list[Matrix]:
        """The linear maps between hidden layers."""


class SingleProcess:
    """A world of one."""

    rank = 0
    size = 1

    def sum(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value

    def whole(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101), Muon if wanted, with warm-up, cosine decay, clipping and an average of the weights.

    Attributes:
        learning_rate: at its highest, after the warm-up.
        matrix_learning_rate: of Muon on the model's hidden matrices, likewise; None trains them by AdamW as well.
        final_fraction: of the learning rate that is left at the last step.
        warmup_steps: linear warm-up.
        num_steps: steps in all; the decay ends there.
        weight_decay: on matrices and convolutions; never on biases, norms and tables.
        beta1, beta2: of AdamW's moments.
        momentum: of Muon.
        clip_norm: the gradient's largest norm.
        ema_decay: of the average, reached gradually: min(ema_decay, (1 + step) / (10 + step)).
    """

    learning_rate: float = 1e-3
    matrix_learning_rate: float | None = None
    final_fraction: float = 0.05
    warmup_steps: int = 50
    num_steps: int = 1000
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    momentum: float = 0.95
    clip_norm: float = 1.0
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        for name in ("learning_rate", "num_steps", "clip_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")
        if self.matrix_learning_rate is not None and self.matrix_learning_rate <= 0:
            raise ValueError(f"matrix_learning_rate={self.matrix_learning_rate}: must be positive, or None for AdamW")
        for name in ("final_fraction", "beta1", "beta2", "momentum", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be between 0 and 1")

    def fraction_at(self, step: int) -> float:
        """Share of the highest learning rates at step 0, 1, ..., num_steps - 1."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
        return self.final_fraction + (1 - self.final_fraction) * cosine

    def ema_decay_at(self, step: int) -> float:
        """Decay of the average after step 0, 1, ...; small first, so that the start is soon forgotten."""
        return min(self.ema_decay, (1 + step) / (10 + step))


class Part(NamedTuple):
    """Parameters that are clipped and updated together."""

    name: str  # of the submodule; "" for all that no other part has
    config: OptimizerConfig
    parameters: list[nn.Parameter]
    optimizers: list[torch.optim.Optimizer]  # AdamW, and Muon if the config has it


class TrainState:
    """Model, average of its weights, optimizers and the number of steps done. Frozen parameters stay out of it all.

    Args:
        model: already sharded if it is to be.
        config: of the optimizers.
        world: the processes.
        parts: submodules with another config of their own, such as a discriminator's; the model's Muon is not for them.

    Attributes:
        ema: the state dict with averaged parameters, sharded like the model's.
        parts: the rest of the model, then the named ones.
        step: steps done.

    Raises:
        ValueError: Muon for a model that does not tell its hidden matrices.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        world: World,
        parts: Mapping[str, OptimizerConfig] | None = None,
    ) -> None:
        self.model = model
        self.world = world
        self.parts = _parts(model, {"": config, **(parts or {})}, world)
        self._trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        frozen = {name for name, _ in model.named_parameters()} - set(self._trained)
        self.ema = {name: value.detach().clone() for name, value in model.state_dict().items() if name not in frozen}
        self.step = 0

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those of all parts."""
        return [optimizer for part in self.parts for optimizer in part.optimizers]

    @property
    def saved_bytes(self) -> int:
        """Of a checkpoint, all processes' shards together: weights, average and the optimizers' moments."""
        return sum(value.nbytes for value in (*self.model.state_dict().values(), *self.ema.values())) + sum(
            parameter.nbytes for parameter in self._with_moments()
        )

    @property
    def held_bytes(self) -> int:
        """Of what this process holds once training runs, activations aside: the same and gradients, its own shards."""
        tensors = (*self.model.state_dict().values(), *self.ema.values(), *self._trained.values())
        return sum(local(value).nbytes for value in (*tensors, *self._with_moments()))

    def _with_moments(self) -> Iterator[nn.Parameter]:
        """Each parameter as often as an optimizer keeps a moment of its size."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield from [parameter] * (1 if isinstance(optimizer, Muon) else 2)

    def update(self) -> None:
        """One step of all optimizers and of the average, from the gradients, which are then gone."""
        for part in self.parts:
            for optimizer in part.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = optimizer.defaults["lr"] * part.config.fraction_at(self.step)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        self._update_ema()
        self.step += 1

    @torch.no_grad()
    def _update_ema(self) -> None:
        weights = [local(parameter) for parameter in self._trained.values()]
        averages = [local(self.ema[name]) for name in self._trained]
        torch._foreach_lerp_(averages, weights, 1 - self.parts[0].config.ema_decay_at(self.step))


def _parts(model: nn.Module, configs: Mapping[str, OptimizerConfig], world: World) -> list[Part]:
    modules = {name: model.get_submodule(name) for name in configs}
    elsewhere = {parameter for name, module in modules.items() if name for parameter in module.parameters()}
    parts = []
    for name, config in configs.items():
        taken = set() if name else elsewhere
        parameters = [p for p in modules[name].parameters() if p.requires_grad and p not in taken]
        parts.append(Part(name, config, parameters, _optimizers(modules[name], parameters, config, world)))
    return parts


def _optimizers(
    model: nn.Module, parameters: list[nn.Parameter], config: OptimizerConfig, world: World
) -> list[torch.optim.Optimizer]:
    matrices: list[Matrix] = []
    if config.matrix_learning_rate is not None:
        if not isinstance(model, HasMatrices):
            raise ValueError(
                f"matrix_learning_rate={config.matrix_learning_rate}: {type(model).__name__} does not tell its hidden "
                "matrices, must be None"
            )
        matrices = model.hidden_matrices()
    in_muon = {id(matrix.parameter) for matrix in matrices}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in parameters:
        if id(parameter) not in in_muon:
            (decayed if parameter.ndim >= 2 and parameter.shape[0] > 1 else others).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    for parameter in (*decayed, *others):
        # AdamW's own would come with a parameter's first gradient, and checkpoints before it lack them.
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        adamw.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    if config.matrix_learning_rate is None:
        return [adamw]
    muon = Muon(
        matrices,
        lr=config.matrix_learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        world=world,
    )
    return [adamw, muon]
