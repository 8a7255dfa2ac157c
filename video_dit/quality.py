"""How near a video is to another: PSNR and SSIM."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PEAK = 2.0  # of videos in [-1, 1]
_WINDOW, _SIGMA = 11, 1.5


def psnr_db(video: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each video, b c t h w in [-1, 1] -> b; 100 dB at most."""
    error = (video - reference).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(PEAK**2 / error.clamp_min(1e-10 * PEAK**2))


def ssim(video: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each video (Wang et al. 2004): mean over frames, channels and windows of 11 x 11.

    Windows are Gaussian, of standard deviation 1.5, and lie whole inside a frame; they are smaller in frames smaller
    than 11 pixels.

    Args:
        video, reference: b c t h w in [-1, 1].

    Returns:
        b.
    """
    b, c, t, h, w = video.shape
    size = min(_WINDOW, h, w)
    places = torch.arange(size, device=video.device) - (size - 1) / 2
    bell = torch.exp(-places.square() / (2 * _SIGMA**2))
    bell = bell / bell.sum()

    def local_mean(x: Tensor) -> Tensor:
        frames = x.reshape(b * c * t, 1, h, w)
        return F.conv2d(F.conv2d(frames, bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1))

    x, y = ((values.double() + 1) / 2 for values in (video, reference))  # in [0, 1], as the formula has it
    bell = bell.double()
    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x, var_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.reshape(b, -1).mean(dim=1).float()
