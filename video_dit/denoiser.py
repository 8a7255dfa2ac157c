"""The model as samplers want it: (tokens, timestep) -> prediction, guided, for all samples of a pack at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from video_dit.diffusion.guidance import Guidance
from video_dit.diffusion.schedules import Level, Schedule
from video_dit.model import VideoDiT
from video_dit.packing import PackedBatch, concatenate
from video_dit.step_cache import StepCache


class GuidedDenoiser:
    """A transformer under classifier-free guidance, both halves in one packed forward; one for each sampling.

    The unconditional half holds the samples that have guidance, and is left out at noise levels where none has.

    Args:
        dit: the transformer.
        packed: the samples; its tokens and timesteps are not used.
        negative: what guidance leads away from, (s, d) a sample, in the order of the list given to `pack`.
        guidance: of the samples, in the pack's order.
        schedule: the one that timesteps belong to.
        is_given: bool n 1, tokens that the video has already: guidance leaves them out while they are at timestep 0.
        cache_thresholds: see `StepCache`, one a sample, in the pack's order; None runs all blocks in every step.
    """

    def __init__(
        self,
        dit: VideoDiT,
        packed: PackedBatch,
        negative: Sequence[Tensor],
        guidance: Guidance,
        schedule: Schedule,
        is_given: Tensor | None = None,
        cache_thresholds: Sequence[float] | None = None,
    ) -> None:
        self.dit, self.packed, self.guidance, self.schedule = dit, packed, guidance, schedule
        self.is_given = torch.zeros_like(packed.tokens[:, :1], dtype=torch.bool) if is_given is None else is_given
        self.any_given = bool(self.is_given.any())
        guided = [place for place, scale in enumerate(guidance.scales) if scale != 1]
        self.guided_tokens = (guidance.scale[:, 0] != 1).nonzero()[:, 0]
        self.guided_frames = packed.frame_of_token[self.guided_tokens].unique_consecutive()
        self.both = concatenate(packed, packed.with_texts(negative).select(guided)) if guided else packed
        frames = torch.arange(packed.timesteps.shape[0], device=packed.tokens.device)
        self.first_tokens = torch.searchsorted(packed.frame_of_token, frames)  # f: all tokens of a frame are alike
        self.text_keys = dit.text_keys(self.both)
        thresholds = cache_thresholds or [0.0] * len(packed.grids)
        self.cache = StepCache([*thresholds, *(thresholds[place] for place in guided)]) if any(thresholds) else None

    def __call__(self, tokens: Tensor, timestep: Tensor) -> Tensor:
        """The guided prediction, n (c pt ph pw).

        Args:
            tokens: n (c pt ph pw).
            timestep: in [0, 1000]: a number, or n 1, the same for all tokens of a frame.
        """
        timestep = timestep.to(tokens.device)
        if timestep.ndim:
            timesteps = timestep.float()[self.first_tokens, 0]  # f
        else:
            timesteps = timestep.float().expand(len(self.first_tokens))
        sigma, is_given = self.schedule.sigma_of(timestep), self.is_given
        if self.any_given:
            is_given = is_given & (timestep == 0)
            sigma = sigma.expand(is_given.shape).masked_fill(is_given, float(sigma.max()))  # theirs does not matter
        level = self.schedule.level(sigma)
        if self.guidance.is_needed(level.sigma):
            prediction = self._guide(tokens, timesteps, level, is_given)
        else:
            own = self.packed.replace(tokens=tokens, timesteps=timesteps)
            prediction = self.dit(own, self.cache, [keys.first(len(own.text)) for keys in self.text_keys])
        return self.guidance.start_from_rest(tokens, prediction, level)

    def _guide(self, tokens: Tensor, timesteps: Tensor, level: Level, is_given: Tensor) -> Tensor:
        if len(self.guided_tokens) == len(tokens):
            again = tokens, timesteps
        else:
            again = tokens[self.guided_tokens], timesteps[self.guided_frames]
        both = self.both.replace(tokens=torch.cat([tokens, again[0]]), timesteps=torch.cat([timesteps, again[1]]))
        predictions = self.dit(both, self.cache, self.text_keys)
        conditional, others = predictions.split([len(tokens), len(self.guided_tokens)])
        is_whole = len(others) == len(conditional)
        unconditional = others if is_whole else conditional.index_copy(0, self.guided_tokens, others)
        x = tokens
        if self.any_given:
            x, conditional, unconditional = (
                values.masked_fill(is_given, 0) for values in (tokens, conditional, unconditional)
            )
        return self.guidance(x, conditional, unconditional, level)
