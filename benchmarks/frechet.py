"""How far generated videos are from real ones: the Frechet distance of fixed features (as FID, arXiv 1706.08500).

The features are those of a convolutional network with seeded random weights, no other network is needed: its filters
respond to edges, colours and motion of every kind, and it is the same for every model. Only distances between equally
many videos of the same shapes can be compared: the estimate shrinks with their number.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (3, 16, 32, 32)


class RandomFeatures(nn.Module):
    """Seeded random 3 x 3 x 3 convolutions; a video's features are means and deviations over places, of each layer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.filters = [
            torch.randn(after, before, 3, 3, 3, generator=generator) / (27 * before) ** 0.5
            for before, after in itertools.pairwise(WIDTHS)
        ]

    @torch.inference_mode()
    def forward(self, video_u8: Tensor) -> Tensor:
        """uint8 t h w 3 to 2 * (16 + 32 + 32) numbers, float64; an image is a still video."""
        x = video_u8.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        found = []
        for weight in self.filters:
            x = F.relu(F.conv3d(F.pad(x, (1,) * 6, mode="replicate"), weight))
            found += [x.mean((0, 2, 3, 4)), x.std((0, 2, 3, 4), correction=0)]
            x = F.avg_pool3d(x, (1, 2, 2))
        return torch.cat(found).double()


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the Gaussians fitted to two sets of features, n d each."""
    means = [features.mean(0) for features in (first, second)]
    # With C = A' A the trace of the root is the sum of the singular values of A1 A2', which needs no root of a matrix.
    factors = [
        (features - mean) / (len(features) - 1) ** 0.5 for features, mean in zip((first, second), means, strict=True)
    ]
    traces = sum(float(factor.square().sum()) for factor in factors)
    root = float(torch.linalg.svdvals(factors[0] @ factors[1].T).sum())
    return float((means[0] - means[1]).square().sum()) + traces - 2 * root


def features_of(videos: Sequence[Tensor]) -> Tensor:
    """n d of uint8 videos, t h w 3 each."""
    network = RandomFeatures()
    return torch.stack([network(video) for video in videos])
