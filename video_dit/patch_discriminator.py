"""A discriminator of small pieces of video (PatchGAN, arXiv 1611.07004, in three dimensions), for training a VAE."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PatchDiscriminator(nn.Module):
    """Strided convolutions without norms, which R1 does not need: a logit for each piece; positive is real.

    Args:
        width: channels of the first layer; each of the next has twice as many.
        num_layers: each halves height and width.
    """

    def __init__(self, width: int = 32, num_layers: int = 3) -> None:
        super().__init__()
        widths = [3, *(width * 2**number for number in range(num_layers))]
        self.layers = nn.ModuleList(
            nn.Conv3d(narrow, wide, kernel_size=3, stride=(1, 2, 2), padding=1)
            for narrow, wide in itertools.pairwise(widths)
        )
        self.out = nn.Conv3d(widths[-1], 1, kernel_size=3, padding=1)

    def forward(self, video: Tensor) -> Tensor:
        """b 3 t h w in [-1, 1] -> b 1 t h/2^n w/2^n."""
        for layer in self.layers:
            video = F.leaky_relu(layer(video), 0.2)
        logits: Tensor = self.out(video)
        return logits


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Zero beyond a margin of 1 on both sides, mean over pieces."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def r1_penalty(logits: Tensor, video: Tensor) -> Tensor:
    """Squared norm of a video's gradient (arXiv 1801.04406, eq. 9), mean over the batch; differentiable.

    Args:
        logits: of real videos.
        video: those, b ..., requiring a gradient.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), video, create_graph=True)
    return gradient.square().flatten(1).sum(dim=1).mean()
