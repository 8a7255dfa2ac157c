"""Estimates by closed form, and against what a real step keeps."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from jobs.recipes import toy_cpu
from pipeline.console import readable
from pipeline.estimate import TEXT_TOKENS, activation_bytes, estimate
from pipeline.train_video import TrainVideoConfig
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.packing import pack
from video_dit.shapes import LatentShape
from video_dit.training import OptimizerConfig

SMALL = VideoDiTConfig(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16, ffn_dim=40
)
CLIP = LatentShape(3, 8, 8)


def test_wan_on_eight_gpus_needs_what_the_formulas_say():
    config = TrainVideoConfig(dit=VideoDiTConfig(), precision="bf16")
    found = estimate(config, num_gpus=8, gpu="H200", clip=LatentShape(5, 32, 56), checkpointing="block")
    assert found.num_parameters == 1_418_996_800
    assert found.state_bytes == pytest.approx(1_418_996_800 * 20 / 8)  # weights, average, gradients, two moments
    assert found.checkpoint_bytes == 1_418_996_800 * 16
    tokens = 5 * 16 * 28 * (2048 // (5 * 16 * 28) or 1)
    assert found.tokens_per_step == 2 * tokens
    assert found.step_s == pytest.approx(found.flops_per_step / (8 * 0.4 * 989e12))
    assert found.hours == pytest.approx(found.step_s * 1000 / 3600)
    assert estimate(config, num_gpus=8, gpu="abacus", clip=LatentShape(5, 32, 56)).hours is None


def test_muon_keeps_one_number_for_each_of_its_weights():
    adamw = TrainVideoConfig(dit=SMALL)
    muon = dataclasses.replace(adamw, optimizer=OptimizerConfig(matrix_learning_rate=0.1))
    states = [estimate(config, num_gpus=1, gpu="H200", clip=CLIP).state_bytes for config in (adamw, muon)]
    matrices = sum(matrix.parameter.numel() for matrix in VideoDiT(SMALL).hidden_matrices())
    assert states[0] - states[1] == 4 * matrices


def really_kept(model):
    """Bytes that autograd keeps of a forward pass with data, weights aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept, alive = {}, []

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(value)
        return value

    packed = pack([torch.randn(4, *CLIP)] * 2, [500.0] * 2, [torch.randn(TEXT_TOKENS, 8)] * 2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        model(packed)
    return sum(kept.values())


@pytest.mark.parametrize("form", ["none", "block"])
def test_activations_are_those_that_a_real_step_keeps(form):
    with torch.device("meta"):
        shell = VideoDiT(SMALL)
    found = activation_bytes(shell, CLIP, 2, form, is_bf16=False)
    model = VideoDiT(SMALL)
    from video_dit.parallel.activation_checkpointing import checkpoint_block

    for block in model.blocks:
        checkpoint_block(block, form)
    assert found == pytest.approx(really_kept(model), rel=0.1)


def test_checkpointing_keeps_less():
    kept = {}
    for form in ("none", "selective", "block"):
        with torch.device("meta"):
            shell = VideoDiT(SMALL)
        kept[form] = activation_bytes(shell, CLIP, 2, form, is_bf16=False)
    num_tokens = 2 * 3 * 4 * 4
    assert kept["selective"] - kept["block"] == SMALL.num_layers * 2 * num_tokens * SMALL.dim * 4
    assert kept["none"] > 3 * kept["selective"]


def test_bytes_are_readable():
    assert [readable(value) for value in (0, 999, 1500, 2.5e9)] == ["0.0 B", "999.0 B", "1.5 KB", "2.5 GB"]


def test_the_job_prints_a_card():
    command = [sys.executable, "jobs/estimate.py", "toy_cpu", "--num-gpus", "2", "--video.plan.token-budget", "4096"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    parameters = sum(p.numel() for p in VideoDiT(toy_cpu().video.dit).parameters())
    assert f"{parameters:,}" in ended.stdout
    assert "memory of a GPU" in ended.stdout
    assert "2,400 steps" in ended.stdout
