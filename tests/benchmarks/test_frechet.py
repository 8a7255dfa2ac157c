"""The Frechet distance against its closed form, and that its features see what distinguishes videos."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from frechet import features_of, frechet_distance


def test_distance_is_the_closed_form_of_the_fitted_gaussians():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(500, 4, generator=generator, dtype=torch.float64) @ torch.diag(
        torch.tensor([1.0, 2, 3, 4]).double()
    )
    second = (
        1
        + torch.randn(400, 4, generator=generator, dtype=torch.float64)
        @ torch.randn(4, 4, generator=generator).double()
    )
    covariances = [features.T.cov() for features in (first, second)]
    eigenvalues = torch.linalg.eigvals(covariances[0] @ covariances[1]).real
    expected = (first.mean(0) - second.mean(0)).square().sum() + sum(c.trace() for c in covariances)
    expected = expected - 2 * eigenvalues.clamp_min(0).sqrt().sum()
    assert frechet_distance(first, second) == pytest.approx(expected.item())
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(first, first + 2) == pytest.approx(16)


def test_features_see_colour_blur_and_motion():
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(256, (5, 16, 24, 3), dtype=torch.uint8, generator=generator)
    still = video[:1].expand_as(video)
    dark, blurred = video // 2, video.float().mean((1, 2), keepdim=True).expand_as(video).to(torch.uint8)
    (original, *others) = features_of([video, still, dark, blurred])
    assert original.shape == (160,)
    for other in others:
        assert (other - original).norm() > 0.1 * original.norm()
