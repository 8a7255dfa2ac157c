"""From noise to data. Each sampler is a coroutine: it yields where it wants the model, and is sent what that says.

    estimate = yield Query(x, level, step)      # data and noise that x is believed to be mixed from

So one loop may drive a single video (`sampling.sample`) or many at once, each at its own step. Since x is
alpha d + sigma n, the probability flow of every schedule (arXiv 2011.13456, eq. 13) is dx = d dalpha + n dsigma, and
with an exact estimate each sampler lands on the data in any number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from video_dit.diffusion.schedules import Level
from video_dit.diffusion.targets import Estimate


class Query(NamedTuple):
    """A point at a noise level, during a step 0, 1, ..."""

    x: Tensor
    level: Level
    step: int


class FreshNoise(NamedTuple):
    """What a random sampler adds: `eta` of a DDPM step's noise, drawn for each step by `draw`."""

    eta: float
    draw: Callable[[int], Tensor]


Sampling = Generator[Query, Estimate, Tensor]
Sampler = Callable[[Tensor, Sequence[Level], FreshNoise], Sampling]


def euler(x: Tensor, levels: Sequence[Level], fresh: FreshNoise) -> Sampling:
    """First order: data and noise taken as constant over a step. One evaluation each."""
    for step, (now, then) in enumerate(pairwise(levels)):
        data, noise = yield Query(x, now, step)
        x = then.mix(data, noise)
    return x


def ddim(x: Tensor, levels: Sequence[Level], fresh: FreshNoise) -> Sampling:
    """DDIM (arXiv 2010.02502, eq. 12): Euler's step with a share of the noise, by eta, drawn anew."""
    for step, (now, then) in enumerate(pairwise(levels)):
        data, noise = yield Query(x, now, step)
        variance = fresh.eta**2 * _posterior_variance(now, then)
        x = Level(then.alpha, (then.sigma**2 - variance).clamp_min(0).sqrt()).mix(data, noise)
        if fresh.eta and not _is_data(then):
            x = x + variance.sqrt().to(x) * fresh.draw(step)
    return x


def ddpm(x: Tensor, levels: Sequence[Level], fresh: FreshNoise) -> Sampling:
    """DDPM's ancestral sampling (arXiv 2006.11239, algorithm 2) from the posterior of eq. 7; it is DDIM with eta 1."""
    return ddim(x, levels, fresh._replace(eta=1.0))


def heun(x: Tensor, levels: Sequence[Level], fresh: FreshNoise) -> Sampling:
    """Second order (arXiv 2206.00364, algorithm 1): the mean of the slopes at both ends. Two evaluations a step."""
    for step, (now, then) in enumerate(pairwise(levels)):
        here = yield Query(x, now, step)
        ahead = then.mix(*here)
        if _is_data(then):  # the noise is not determined there
            return ahead
        there = yield Query(ahead, then, step)
        change = Level((then.alpha - now.alpha) / 2, (then.sigma - now.sigma) / 2)
        x = x + change.mix(here.data + there.data, here.noise + there.noise)
    return x


def dpmpp_2m(x: Tensor, levels: Sequence[Level], fresh: FreshNoise) -> Sampling:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): second order from one evaluation a step and the one before."""
    before: tuple[Level, Tensor] | None = None
    for step, (now, then) in enumerate(pairwise(levels)):
        data, _ = yield Query(x, now, step)
        x_next = _advance(x, _extrapolate(data, now, then, before), now, then)
        x, before = x_next, (now, data)
    return x


def unipc(x: Tensor, levels: Sequence[Level], fresh: FreshNoise) -> Sampling:
    """UniPC of order 2 with B2(h) = exp(h) - 1 (arXiv 2302.04867, algorithms 1 and 2).

    Its predictor is DPM-Solver++(2M)'s step; each evaluation also corrects the point where it was made.
    """
    previous: tuple[Level, Tensor] | None = None
    before: tuple[Level, Tensor] | None = None
    x_before = x
    for step, (now, then) in enumerate(pairwise(levels)):
        data, _ = yield Query(x, now, step)
        if previous is not None:
            x = _correct(x_before, data, now, previous, before)
        before, previous = previous, (now, data)
        x_before = x
        x = _advance(x, _extrapolate(data, now, then, before), now, then)
    return x


SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "unipc": unipc,
}


def _is_data(level: Level) -> bool:
    return not level.sigma.any()


def _posterior_variance(now: Level, then: Level) -> Tensor:
    """Of q(x_then | x_now, data): DDPM's eq. 7, for any alpha and sigma."""
    kept = now.alpha / then.alpha
    return then.sigma**2 * (1 - (kept * then.sigma / now.sigma) ** 2)


def _advance(x: Tensor, data: Tensor, now: Level, then: Level) -> Tensor:
    """Where the flow leads if its data is `data`: exact for constant data (arXiv 2211.01095, eq. 9)."""
    shrink = then.sigma / now.sigma
    return shrink.to(x) * x + (then.alpha - now.alpha * shrink).to(x) * data


def _log_snr(level: Level) -> Tensor:
    return level.alpha.log() - level.sigma.log()  # lambda in the papers; -inf for pure noise, inf for data


def _extrapolate(data: Tensor, now: Level, then: Level, before: tuple[Level, Tensor] | None) -> Tensor:
    """The data in the middle of the step, in log SNR, on the line through the last two estimates."""
    if before is None or _is_data(then):
        return data
    level, data_before = before
    ratio = (_log_snr(then) - _log_snr(now)) / (_log_snr(now) - _log_snr(level))
    return data + (ratio / 2).to(data) * (data - data_before)


def _correct(
    x: Tensor, data_now: Tensor, now: Level, previous: tuple[Level, Tensor], before: tuple[Level, Tensor] | None
) -> Tensor:
    """The step from `previous` to `now` again, by the estimate at its end (arXiv 2302.04867, eq. 7)."""
    level, data = previous
    h = _log_snr(now) - _log_snr(level)
    if before is None:
        slope = (data_now - data) / 2
    else:  # the two weights solve eq. 12 of the paper
        level_before, data_before = before
        ratio = (_log_snr(level_before) - _log_snr(level)) / h
        growth = torch.expm1(-h)
        first = (-growth / h - 1) / growth
        second = 2 * ((growth / h + 1) / h - 0.5) / growth
        weight_before = (second - first) / (ratio - 1)
        toward_before = (weight_before / ratio).to(data) * (data_before - data)
        slope = toward_before + (first - weight_before).to(data) * (data_now - data)
    return _advance(x, data + slope, level, now)
