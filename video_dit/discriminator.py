"""A discriminator on the features of a frozen transformer (ADD, arXiv 2311.17042; LADD, arXiv 2403.12015).

What a block of the teacher makes of noisy latents tells real from generated ones at every token; only small heads on it
are trained. They see nothing but the features, which hold the caption and the noise level already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@contextmanager
def record_features(blocks: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """What blocks return while the context lasts, in the order of their calls: n d each, float32.

    Each token's features are normalised to mean 0 and variance 1, since those of deep blocks are large.
    """
    features: list[Tensor] = []

    def record(block: nn.Module, inputs: tuple[object, ...], output: Tensor) -> None:
        features.append(F.layer_norm(output.float(), output.shape[-1:]))

    handles = [block.register_forward_hook(record) for block in blocks]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


class FeatureHeads(nn.Module):
    """An MLP for each of some features: how real every token looks.

    Args:
        dim: width of the features.
        num_features: how many there are of each token.
        hidden_dim: of the MLPs.
    """

    def __init__(self, dim: int, num_features: int, hidden_dim: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, 1)) for _ in range(num_features)
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """n d, num_features times -> logits n num_features; positive is real."""
        return torch.cat([head(x) for head, x in zip(self.heads, features, strict=True)], dim=1)


def hinge_generator(fake: Tensor) -> Tensor:
    """The generator's loss, minus its logits: n k -> n, mean over the heads."""
    return -fake.mean(dim=1)


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss, zero beyond a margin of 1 on both sides: n k, n k -> n, mean over the heads."""
    return (F.relu(1 - real) + F.relu(1 + fake)).mean(dim=1)


def r1_penalty(logits: Tensor, features: Sequence[Tensor]) -> Tensor:
    """R1 (arXiv 1801.04406, eq. 9): the squared norm of each head's gradient with respect to its real features.

    As in ADD, the gradient is taken at the heads' inputs, not at the latents: it costs no pass through the teacher.

    Args:
        logits: n k, of heads of which each sees one features tensor.
        features: n d, k times, of real samples; they require a gradient.

    Returns:
        n, mean over the heads; differentiable.
    """
    gradients = torch.autograd.grad(logits.sum(), list(features), create_graph=True)
    return torch.stack([gradient.square().sum(dim=1) for gradient in gradients]).mean(dim=0)
