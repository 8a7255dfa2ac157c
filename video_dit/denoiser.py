"""The model as samplers want it: (tokens, timestep) -> prediction, guided, for all samples of a pack at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from video_dit.diffusion.guidance import classifier_free
from video_dit.model import VideoDiT
from video_dit.packing import PackedBatch, concatenate


class GuidedDenoiser:
    """A transformer under classifier-free guidance: both halves in one packed forward, a scale for each sample.

    Args:
        dit: the transformer.
        packed: the samples; its tokens and timesteps are not used.
        negative: what guidance leads away from, (s, d) a sample, in the order of the list given to `pack`.
        scales: of guidance, in that order; 1 is none.
    """

    def __init__(self, dit: VideoDiT, packed: PackedBatch, negative: Sequence[Tensor], scales: Sequence[float]) -> None:
        self.dit = dit
        self.guided = any(scale != 1 for scale in scales)
        self.packed = concatenate(packed, packed.with_texts(negative)) if self.guided else packed
        lengths = torch.tensor([grid.num_tokens for grid in packed.grids])
        in_order = torch.tensor([scales[place] for place in packed.order])
        self.scale = in_order.repeat_interleave(lengths)[:, None].to(packed.tokens.device)  # n 1
        frames = torch.arange(packed.timesteps.shape[0], device=packed.tokens.device)
        self.first_tokens = torch.searchsorted(packed.frame_of_token, frames)  # f: all tokens of a frame are alike

    def __call__(self, tokens: Tensor, timestep: Tensor) -> Tensor:
        """The guided prediction, n (c pt ph pw).

        Args:
            tokens: n (c pt ph pw).
            timestep: in [0, 1000]: a number, or n 1, the same for all tokens of a frame.
        """
        timesteps = timestep.float().to(tokens.device).expand(tokens.shape[0], 1)[self.first_tokens, 0]  # f
        if not self.guided:
            return self.dit(self.packed.replace(tokens=tokens, timesteps=timesteps))
        both = self.packed.replace(tokens=torch.cat([tokens, tokens]), timesteps=torch.cat([timesteps, timesteps]))
        conditional, unconditional = self.dit(both).chunk(2)
        return classifier_free(conditional, unconditional, self.scale)
