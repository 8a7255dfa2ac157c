"""A small transformer whose every weight matters, and packs of mixed shapes, for all tests of this folder."""

import torch

from video_dit.diffusion.losses import DiffusionBatch, diffusion_loss
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.packing import pack

SIZES = {"attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "text_dim": 8, "freq_dim": 16, "ffn_dim": 32}

# 43 tokens, packed in order of length: 1 3 6 6 27. On four processes the last clip lies on three of them.
MIXED = [(4, 3, 6, 6), (4, 1, 2, 2), (4, 2, 2, 6), (4, 1, 2, 6), (4, 2, 2, 6)]
TINY = [(4, 1, 2, 2), (4, 1, 2, 4)]  # 3 tokens: of four processes one has none


def model_of(heads):
    torch.manual_seed(0)
    model = VideoDiT(VideoDiTConfig(num_attention_heads=heads, num_layers=2, **SIZES))
    for parameter in model.parameters():  # no zero, no one
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def batch_of(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = [torch.randn(shape, generator=generator) for shape in shapes]
    texts = [torch.randn(1 + place, 8, generator=generator) for place in range(len(shapes))]
    timesteps = [torch.rand(shape[1], generator=generator) * 1000 for shape in shapes]
    packed = pack(latents, timesteps, texts)
    target = torch.randn(packed.tokens.shape, generator=generator)
    ones = torch.ones(packed.num_tokens)  # small weights would leave gradients that are nothing but rounding
    return DiffusionBatch(packed, target, weight=ones, sigma=ones)


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = diffusion_loss(model, batch)
    loss.backward()
    gradients = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    return {"loss": loss.detach()} | gradients


def assert_close(actual, expected, tolerance=1e-5):
    """Relative to the largest entry of each tensor; 0 for bit by bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() <= tolerance * value.abs().max(), name
