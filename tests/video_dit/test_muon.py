"""Muon against the singular value decomposition and its own definition."""

import pytest
import torch
from torch import nn

from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.muon import Matrix, Muon, orthogonalize
from video_dit.training import OptimizerConfig, SingleProcess, TrainState


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 5), (2, 5, 12)])
def test_orthogonalized_matrices_keep_the_singular_vectors_and_level_the_values(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = left.mT @ orthogonalize(matrices) @ right.mT  # diagonal
    diagonal = torch.diagonal(values, dim1=1, dim2=2)
    assert diagonal.min() > 0.6
    assert diagonal.max() < 1.25
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-4


def test_nothing_comes_of_a_zero_gradient():
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_two_steps_equal_the_definition_and_fused_maps_are_apart():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(12, 4, generator=generator)  # three maps of 4 x 4
    gradients = torch.randn(2, 12, 4, generator=generator)
    parameter = nn.Parameter(weight.clone())
    muon = Muon([Matrix(parameter, 3)], lr=0.1, momentum=0.9, weight_decay=0.5, world=SingleProcess())
    average, expected = torch.zeros_like(weight), weight.clone()
    for gradient in gradients:
        parameter.grad = gradient.clone()
        muon.step()
        average = 0.9 * average + 0.1 * gradient
        direction = 0.1 * gradient + 0.9 * average
        update = torch.cat([orthogonalize(rows[None])[0] for rows in direction.split(4)])
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * update
    torch.testing.assert_close(parameter.detach(), expected)


def test_tall_matrices_move_further():
    tall = nn.Parameter(torch.zeros(16, 4))
    tall.grad = torch.randn(16, 4, generator=torch.Generator().manual_seed(2))
    Muon([Matrix(tall, 1)], lr=1.0, momentum=0.0, weight_decay=0.0, world=SingleProcess()).step()
    torch.testing.assert_close(tall.detach(), -2 * orthogonalize(tall.grad[None])[0])


def test_a_transformer_is_shared_out_between_muon_and_adamw():
    model = VideoDiT(
        VideoDiTConfig(num_attention_heads=2, attention_head_dim=8, text_dim=4, freq_dim=8, ffn_dim=32, num_layers=2)
    )
    state = TrainState(model, OptimizerConfig(matrix_learning_rate=0.02), SingleProcess())
    adamw, muon = ([p for group in o.param_groups for p in group["params"]] for o in state.optimizers)
    assert len(muon) == 2 * 7  # qkv and out; q, kv and out; two of the MLP
    assert {id(p) for p in (*adamw, *muon)} == {id(p) for p in model.parameters()}
    assert len(adamw) + len(muon) == len(list(model.parameters()))
    fused = {(group["params"][0].shape[0], group["num_fused"]) for group in state.optimizers[1].param_groups}
    assert fused == {(48, 3), (32, 2), (32, 1), (16, 1)}
