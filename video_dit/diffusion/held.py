"""Frames that a video is made from: noise levels at which training shows them and sampling holds them.

A token with noise level `sigma` and a held level `held_to` is seen at the lower of both, and told so by its timestep:
`held_to` is 0 for given frames, LONE_SIGMA or REMADE_SIGMA for a group of frames of which one is given, infinite for
frames to make.
(Noise on what is given, told to the model: conditioning augmentation, arXiv 2106.15282, section 3.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from video_dit.diffusion.sampling import Denoise
from video_dit.diffusion.schedules import Schedule
from video_dit.diffusion.targets import Target, target_of
from video_dit.random import keyed_generator

LONE_SIGMA = 0.5  # tells where things are in a group, and leaves open how they move there
REMADE_SIGMA = 0.2  # of such a group once its other frames were made, when it is sampled again
BOTH_ENDS_WEIGHT = 2  # of each way with both ends given, against one for each other: they are the harder ones


def draw_held(num_frames: int, key: tuple[int | str, ...]) -> Tensor:
    """Held levels of a training video's frames of tokens, t, float64: first and last ones, and at least one to make.

    As likely as each other are the first frame, first ones and last ones; BOTH_ENDS_WEIGHT times as likely, of three
    frames on, the first frame and the group of a lone last one, and first and last ones. Of each, every length is as
    likely.
    """
    generator = keyed_generator(*key, "given")

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    held = torch.full((num_frames,), torch.inf, dtype=torch.float64)
    most = num_frames - 1
    way = draw(0, 2 + 2 * BOTH_ENDS_WEIGHT if most > 1 else 2)
    if way == 0:
        held[0] = 0
    elif way == 1:
        held[: draw(1, most)] = 0
    elif way == 2:
        held[num_frames - draw(1, most) :] = 0
    elif way < 3 + BOTH_ENDS_WEIGHT:
        held[0], held[-1] = 0, LONE_SIGMA
    else:
        total = draw(2, most)
        num_first = draw(1, total - 1)
        held[:num_first] = held[num_frames - (total - num_first) :] = 0
    return held


def hold(denoise: Denoise, held_to: Tensor, clean: Tensor, schedule: Schedule, target: Target) -> Denoise:
    """A denoiser that sees given tokens at their held levels, and knows what they are.

    While they are held their data are predicted exactly, so every sampler keeps them on the path from their noise to
    `clean`: below their level they go on from there as any others.

    Args:
        denoise: takes a timestep for each token.
        held_to: n 1, held levels.
        clean: n (c pt ph pw), their values.
        schedule, target: of the model.
    """

    def denoise_others(tokens: Tensor, timestep: Tensor) -> Tensor:
        timesteps = timestep.to(held_to.device).expand(held_to.shape)  # n 1
        level = schedule.level(schedule.sigma_of(timesteps))
        is_held = level.sigma > held_to
        held = schedule.level(torch.minimum(level.sigma, held_to.to(level.sigma)))
        noise = (tokens - level.alpha.to(tokens) * clean) / level.sigma.to(tokens)
        shown = torch.where(is_held, held.mix(clean, noise).to(tokens), tokens)
        prediction = denoise(shown, torch.where(is_held, schedule.timestep(held.sigma).to(timesteps), timesteps))
        return torch.where(is_held, target_of(clean, noise, target, level), prediction)

    return denoise_others
