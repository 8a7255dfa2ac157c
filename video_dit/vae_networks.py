"""The VAE's two networks, encoder and decoder, and how a new one's weights are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from video_dit.vae_convs import Cache, CausalConv3d
from video_dit.vae_layers import (
    Downsample,
    MidBlock,
    ResidualBlock,
    ResidualDownBlock,
    ResidualUpBlock,
    RMSNorm,
    UpBlock,
    Upsample,
    activate,
    residual_blocks,
)


class Stages(NamedTuple):
    """The ladder of resolutions in an encoder, finest first, or in a decoder, coarsest first.

    Attributes:
        widths: channels before the first stage and after each.
        is_temporal: whether time is resampled after each stage but the last.
        num_blocks: residual blocks a stage.
        dropout: probability inside the residual blocks.
        is_residual: Wan 2.2's form, with a parameter-free shortcut around each stage.
    """

    widths: list[int]
    is_temporal: tuple[bool, ...]
    num_blocks: int
    dropout: float
    is_residual: bool

    def steps(self) -> Iterator[tuple[int, int, bool | None]]:
        """Channels before, channels after and `is_temporal` of each stage; None for the last, which keeps its size."""
        return zip(self.widths[:-1], self.widths[1:], (*self.is_temporal, None), strict=True)


class Encoder(nn.Module):
    """Pixel patches to the raw mean and log-variance of their latents."""

    def __init__(self, in_dim: int, out_dim: int, stages: Stages) -> None:
        super().__init__()
        first, last, options = stages.widths[0], stages.widths[-1], (stages.num_blocks, stages.dropout)
        self.conv_in = CausalConv3d(in_dim, first, (3, 3, 3))
        self.down_blocks = nn.ModuleList()
        for dim, width, is_temporal in stages.steps():
            if stages.is_residual:
                self.down_blocks.append(ResidualDownBlock(dim, width, *options, is_temporal))
            else:
                self.down_blocks.extend(residual_blocks(dim, width, *options))
                if is_temporal is not None:
                    self.down_blocks.append(Downsample(width, is_temporal))
        self.mid_block = MidBlock(last, stages.dropout)
        self.norm_out = RMSNorm(last)
        self.conv_out = CausalConv3d(last, out_dim, (3, 3, 3))

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """`b c t h w` to `b c_out t' h' w'`."""
        x = self.conv_in(x, cache)  # b width t h w
        for block in self.down_blocks:
            x = block(x, cache)  # b width t' h' w'
        x = self.mid_block(x, cache)
        return self.conv_out(activate(self.norm_out, x), cache)  # b c_out t' h' w'


class Decoder(nn.Module):
    """Raw latents to pixel patches: the encoder's stages backwards, with one more residual block each."""

    def __init__(self, in_dim: int, out_dim: int, stages: Stages) -> None:
        super().__init__()
        first, last, options = stages.widths[0], stages.widths[-1], (stages.num_blocks + 1, stages.dropout)
        self.conv_in = CausalConv3d(in_dim, first, (3, 3, 3))
        self.mid_block = MidBlock(first, stages.dropout)
        self.up_blocks = nn.ModuleList()
        for index, (dim, width, is_temporal) in enumerate(stages.steps()):
            if stages.is_residual:
                self.up_blocks.append(ResidualUpBlock(dim, width, *options, is_temporal))
            else:  # the upsampling before has halved the channels
                self.up_blocks.append(UpBlock(dim // 2 if index else dim, width, *options, is_temporal))
        self.norm_out = RMSNorm(last)
        self.conv_out = CausalConv3d(last, out_dim, (3, 3, 3))

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """`b c t h w` to `b c_out t' h' w'`."""
        x = self.conv_in(x, cache)  # b width t h w
        x = self.mid_block(x, cache)
        for block in self.up_blocks:
            x = block(x, cache)  # b width t' h' w'
        return self.conv_out(activate(self.norm_out, x), cache)  # b c_out t' h' w'


def initialize(network: nn.Module, spread: float = 0.1) -> None:
    """Draw weights with which a new network passes its input on, in space and in time, and so learns at once.

    Convolutions are orthogonal maps of channels at their centre (delta-orthogonal: Xiao et al., arXiv 1806.05393) that
    look at the current frame alone, plus `spread` of PyTorch's own draw over rows and columns; residual blocks start as
    the identity; time is halved by averaging pairs of frames and doubled by repeating them. With PyTorch's default a
    small VAE stays for over a thousand steps at grey blobs where the colours should be.
    """
    if any(parameter.is_meta for parameter in network.parameters()):
        return
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                _draw_orthogonal(module, spread)
        for module in network.modules():
            if isinstance(module, ResidualBlock):
                module.conv2.weight.zero_()
            elif isinstance(module, Downsample) and module.time_conv is not None:
                module.time_conv.weight.zero_()
                identity = torch.eye(module.time_conv.in_channels)
                module.time_conv.weight[:, :, -2:, 0, 0] = 0.5 * identity[:, :, None]
            elif isinstance(module, Upsample) and module.time_conv is not None:
                module.time_conv.weight.zero_()
                module.time_conv.weight[:, :, -1, 0, 0] = torch.eye(module.time_conv.in_channels).repeat(2, 1)


def _draw_orthogonal(conv: nn.Conv2d | nn.Conv3d, spread: float) -> None:
    weight = conv.weight
    if conv.bias is not None:
        conv.bias.zero_()
    if any(step > 1 for step in conv.stride):  # what is skipped would be lost: spread over the whole kernel
        nn.init.orthogonal_(weight)
        return
    weight *= spread
    if weight.ndim == 5:
        weight[:, :, :-1] = 0  # past frames
    centre = weight[..., -1, :, :] if weight.ndim == 5 else weight
    rows, columns = weight.shape[-2:]
    centre[..., rows // 2, columns // 2] += nn.init.orthogonal_(torch.empty(weight.shape[:2]))
