"""Hinge losses and R1 in closed form on a linear discriminator, and what the heads see."""

import pytest
import torch
from torch import nn

from video_dit.discriminator import FeatureHeads, hinge_discriminator, hinge_generator, r1_penalty, record_features


def test_hinge_losses_are_those_of_their_definition():
    real, fake = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-3.0, 0.0], [0.5, -1.0]])
    assert hinge_discriminator(real, fake).tolist() == [(0 + 0.5) / 2 + (0 + 1) / 2, (2 + 0) / 2 + (1.5 + 0) / 2]
    assert hinge_generator(fake).tolist() == [1.5, 0.25]


def test_r1_of_linear_heads_is_the_square_of_their_weights():
    """D(x) = w x: the gradient is w everywhere, the penalty |w|^2, and the penalty's gradient 2 w."""
    weights = [torch.tensor([3.0, -4.0], requires_grad=True), torch.tensor([1.0, 2.0], requires_grad=True)]
    features = [torch.randn(5, 2, requires_grad=True) for _ in weights]
    logits = torch.stack([x @ w for x, w in zip(features, weights, strict=True)], dim=1)
    penalty = r1_penalty(logits, features)
    assert torch.allclose(penalty, torch.full((5,), (25.0 + 5.0) / 2))
    penalty.mean().backward()
    for weight in weights:
        assert torch.allclose(weight.grad, weight.detach())  # 2 w / 2 heads


def test_each_head_judges_each_token_by_its_own_features():
    torch.manual_seed(0)
    heads = FeatureHeads(8, 2, 4)
    features = [torch.randn(6, 8, requires_grad=True) for _ in range(2)]
    logits = heads(features)
    assert logits.shape == (6, 2)
    logits[3, 1].backward()
    assert not features[0].grad.any()
    assert features[1].grad.any(dim=1).tolist() == [False, False, False, True, False, False]
    with pytest.raises(ValueError, match="zip"):
        heads(features[:1])


def test_features_are_normalised_outputs_of_the_chosen_blocks_and_recording_ends():
    torch.manual_seed(0)
    blocks = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(5, 4)
    with record_features([blocks[0], blocks[2]]) as features:
        blocks(x)
    blocks(x)
    assert len(features) == 2
    for feature, output in zip(features, (blocks[0](x), blocks(x)), strict=True):
        expected = (output - output.mean(dim=1, keepdim=True)) / output.std(dim=1, keepdim=True, correction=0)
        assert torch.allclose(feature, expected, atol=1e-3)
