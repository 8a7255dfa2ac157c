"""A run's card by closed form, and what the driver shows of a run."""

import dataclasses
import io
import json

import torch
from rich.console import Console
from torch import nn

from pipeline import console, progress, store
from pipeline.console import run_card
from pipeline.mixture import Samples
from pipeline.plan import Plan, PlanConfig
from pipeline.run_card import CARD, card_of
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.training import OptimizerConfig, SingleProcess, TrainState

SMALL = VideoDiTConfig(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, ffn_dim=40)


def card(model=None, config=None, num_tokens=(10,) * 12):
    """Of a run of 30 steps over samples of ten tokens."""
    state = TrainState(model or nn.Linear(3, 5), config or OptimizerConfig(num_steps=30), SingleProcess())
    plan = Plan(Samples.of(num_tokens), PlanConfig(token_budget=25, packs_per_step=3))
    return card_of(state, plan, lambda pack: 7.0 * len(pack), num_steps=30, checkpoint_every=8, peak=1e9)


def shown(table):
    """A table as text."""
    text = io.StringIO()
    Console(file=text, width=100).print(table)
    return text.getvalue()


def test_a_plain_model_has_the_bytes_of_the_formula():
    found = card()
    weights = 4 * (3 * 5 + 5)
    assert (found.num_parameters, found.num_trained) == (20, 20)
    assert found.held_bytes == 5 * weights  # weights, average, gradients, two moments
    assert found.checkpoint_bytes == 4 * weights  # no gradients


def test_frozen_weights_have_no_average_gradients_or_moments():
    model = nn.Linear(3, 5)
    model.bias.requires_grad_(False)
    found = card(model)
    assert (found.num_parameters, found.num_trained) == (20, 15)
    assert found.held_bytes == 4 * (20 + 4 * 15)


def test_bytes_are_those_of_a_state_that_has_done_a_step():
    model = VideoDiT(SMALL)
    state = TrainState(model, OptimizerConfig(matrix_learning_rate=0.1), SingleProcess())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    expected = state.held_bytes
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters())
    state.update()
    moments = [
        value
        for optimizer in state.optimizers
        for kept in optimizer.state.values()
        for value in kept.values()
        if isinstance(value, torch.Tensor) and value.ndim
    ]
    values = [*model.state_dict().values(), *state.ema.values(), *moments]
    assert expected == gradients + sum(value.nbytes for value in values)
    assert state.saved_bytes == expected - gradients


def test_steps_are_counted_from_the_plan():
    found = card()  # two samples a pack, three packs a step
    assert (found.num_samples, found.num_rejected, found.num_held_out) == (12, 0, 0)
    assert (found.samples_per_step, found.tokens_per_step, found.fill) == (6.0, 60.0, 0.8)
    assert found.num_epochs == 30 * 6 / 12
    assert found.flops_per_step == 42.0


def test_what_is_too_long_for_a_pack_is_told():
    found = card(num_tokens=(10,) * 12 + (26, 99))
    assert (found.num_samples, found.num_rejected) == (12, 2)
    assert "12, 2 too long" in shown(run_card(found, "a run"))


def test_the_card_names_what_people_ask_for():
    text = shown(run_card(card(), "video transformer"))
    for part in ("video transformer", "parameters", "80.0% full", "400.0 B", "320.0 B, every 8 steps", "15.0 epochs"):
        assert part in text
    assert "hours" not in text


def test_the_driver_shows_the_card_once_then_steps_and_the_next_checkpoint(tmp_path, monkeypatch, capsys):
    (tmp_path / CARD).write_text("an earlier attempt's")
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.01)
    row = {"step": 12, "loss": 0.5, "num_tokens": 60, "step_s": 2.0, "data_wait_s": 0.5}
    with progress.watch(tmp_path, 30, "a run"):
        assert not (tmp_path / CARD).exists()
        store.write_json(str(tmp_path / CARD), dataclasses.asdict(card()))  # whole: it is looked for meanwhile
        (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    lines = capsys.readouterr().err
    assert lines.count("parameters") == 1
    assert "a run 13/30  loss 0.5000  30 tokens/s  data wait 25%  checkpoint in 6 s  34 s left" in lines


def test_an_unknown_number_of_operations_gives_no_hours():
    unknown = dataclasses.replace(card(), flops_per_step=0.0)
    assert "peak" not in shown(console.run_card(unknown, "a run"))
    assert "peak" in shown(console.run_card(card(), "a run"))
