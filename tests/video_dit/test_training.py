"""The training step against closed forms and plain PyTorch."""

import copy
import math

import pytest
import torch
from torch import nn

from video_dit.train_step import Losses, MicroBatch, NotFiniteError, train_step
from video_dit.training import OptimizerConfig, SingleProcess, TrainState


def squared_error(model, inputs):
    x, y = inputs
    return (model(x) - y).square().sum()


def random_problem(num_samples=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, 3, generator=generator)
    return nn.Linear(3, 2), x, torch.randn(num_samples, 2, generator=generator)


def micro_batches(x, y, sizes):
    return [
        MicroBatch(inputs=(a, b), weight=1.0, sample_ids=(f"clip{i}",))
        for i, (a, b) in enumerate(zip(x.split(sizes), y.split(sizes), strict=True))
    ]


def test_accumulated_steps_equal_plain_adamw_on_the_whole_batch():
    model, x, y = random_problem()
    peer = copy.deepcopy(model)
    config = OptimizerConfig(warmup_steps=2, num_steps=10, clip_norm=0.5, weight_decay=0.1)
    state = TrainState(model, config, SingleProcess())
    optimizer = torch.optim.AdamW(
        [{"params": [peer.weight], "weight_decay": 0.1}, {"params": [peer.bias], "weight_decay": 0.0}],
        betas=(config.beta1, config.beta2),
    )
    for step in range(10):
        metrics = train_step(state, micro_batches(x, y, [1, 4, 1]), squared_error, y.numel())
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * config.fraction_at(step)
        loss = (peer(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(peer.parameters(), 0.5)
        optimizer.step()
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert torch.allclose(model.weight, peer.weight, atol=1e-6)
    assert torch.allclose(model.bias, peer.bias, atol=1e-6)


def test_a_parameter_without_a_gradient_stands_still_and_counts_no_step():
    """As it does in plain AdamW; only its moments are there from the start."""
    parameters = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))]
    model, peer = nn.ParameterList(parameters), nn.ParameterList(copy.deepcopy(parameters))
    config = OptimizerConfig(warmup_steps=0, weight_decay=0.1, final_fraction=1.0)
    state = TrainState(model, config, SingleProcess())
    optimizer = torch.optim.AdamW(peer, lr=config.learning_rate, betas=(config.beta1, config.beta2), weight_decay=0.1)
    (ours,) = state.optimizers
    shapes = [{name: value.shape for name, value in ours.state[p].items()} for p in model]
    for step in range(6):
        gradient = torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
        for each in (model, peer):
            each[0].grad, each[1].grad = gradient.clone(), gradient.clone() if step >= 3 else None
        state.update()
        optimizer.step()
        assert model[1].equal(torch.ones(2, 3)) == (step < 3)
        for mine, theirs in zip(model, peer, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert [ours.state[p]["step"].item() for p in model] == [6, 3]
    assert [{name: value.shape for name, value in optimizer.state[p].items()} for p in peer] == shapes


def test_weight_zero_adds_nothing():
    model, x, y = random_problem()
    twin = copy.deepcopy(model)
    idle = MicroBatch(inputs=(x * 5, y), weight=0.0, sample_ids=())
    config = OptimizerConfig()
    train_step(TrainState(model, config, SingleProcess()), [*micro_batches(x, y, [6]), idle], squared_error, 12)
    train_step(TrainState(twin, config, SingleProcess()), micro_batches(x, y, [6]), squared_error, 12)
    assert torch.equal(model.weight, twin.weight)


def test_logged_means_are_over_all_values_and_train_nothing():
    def with_figures(model, inputs):
        loss, (x, _) = squared_error(model, inputs), inputs
        none = torch.zeros(())
        return Losses({"loss": loss}, {"inputs": (x.sum(), torch.tensor(float(x.numel()))), "nothing": (none, none)})

    model, x, y = random_problem()
    twin = copy.deepcopy(model)
    idle = MicroBatch(inputs=(x * 5, y), weight=0.0, sample_ids=())
    config = OptimizerConfig()
    batches = [*micro_batches(x, y, [1, 5]), idle]
    found = train_step(TrainState(model, config, SingleProcess()), batches, with_figures, 12)
    plain = train_step(TrainState(twin, config, SingleProcess()), batches, squared_error, 12)
    assert found.pop("inputs") == pytest.approx(x.double().mean().item())
    assert found == plain  # "nothing" has no mean
    assert torch.equal(model.weight, twin.weight)


def test_average_follows_its_closed_form():
    model, x, y = random_problem()
    config = OptimizerConfig(ema_decay=0.6)
    state = TrainState(model, config, SingleProcess())
    expected = model.weight.detach().clone()
    for step in range(20):
        train_step(state, micro_batches(x, y, [6]), squared_error, 12)
        keep = min(0.6, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * model.weight.detach()
    assert torch.allclose(state.ema["weight"], expected, atol=1e-6)


def test_learning_rate_warms_up_and_decays():
    config = OptimizerConfig(warmup_steps=3, num_steps=103, final_fraction=0.1)
    assert [config.fraction_at(step) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert config.fraction_at(53) == pytest.approx(0.1 + 0.9 / 2)
    assert config.fraction_at(103) == pytest.approx(0.1)


def test_a_loss_that_is_not_finite_stops_before_the_update():
    model, x, y = random_problem()
    before = model.weight.detach().clone()
    y[2] = math.inf
    with pytest.raises(NotFiniteError, match=r"step 0: loss=inf.*clip0, clip1"):
        train_step(
            TrainState(model, OptimizerConfig(), SingleProcess()), micro_batches(x, y, [3, 3]), squared_error, 12
        )
    assert torch.equal(model.weight, before)


def test_config_names_the_field():
    with pytest.raises(ValueError, match="learning_rate=0"):
        OptimizerConfig(learning_rate=0)
    with pytest.raises(ValueError, match=r"ema_decay=1\.5"):
        OptimizerConfig(ema_decay=1.5)
    with pytest.raises(ValueError, match="matrix_learning_rate=-1"):
        OptimizerConfig(matrix_learning_rate=-1)


def test_muon_wants_a_model_that_tells_its_matrices():
    model, _, _ = random_problem()
    with pytest.raises(ValueError, match=r"matrix_learning_rate=0\.02: Linear does not tell"):
        TrainState(model, OptimizerConfig(matrix_learning_rate=0.02), SingleProcess())


def two_halves():
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Linear(3, 2), "heads": nn.Linear(3, 2), "frozen": nn.Linear(3, 2)})


def losses_of_halves(model, inputs):
    x, y = inputs
    y = y + model["frozen"](x)
    return {"first": (model["body"](x) - y).square().sum(), "second": 3 * (model["heads"](x) - y).square().sum()}


def test_parts_train_as_if_alone_and_named_losses_add_up():
    _, x, y = random_problem()
    config = OptimizerConfig(warmup_steps=2, num_steps=8, clip_norm=0.1)
    heads = OptimizerConfig(warmup_steps=0, num_steps=8, clip_norm=0.5, learning_rate=0.02, weight_decay=0.0)
    model = two_halves()
    model["frozen"].requires_grad_(False)
    frozen = copy.deepcopy(model["frozen"].state_dict())
    state = TrainState(model, config, SingleProcess(), {"heads": heads})
    alone = {}
    for part, part_config in (("body", config), ("heads", heads)):
        alone[part] = TrainState(copy.deepcopy(model[part]), part_config, SingleProcess())
    for _ in range(8):
        metrics = train_step(state, micro_batches(x, y, [4, 2]), losses_of_halves, 12)
        with torch.no_grad():
            target = y + model["frozen"](x)
        first = train_step(alone["body"], micro_batches(x, target, [4, 2]), squared_error, 12)
        second = train_step(alone["heads"], micro_batches(x, target, [4, 2]), lambda m, i: 3 * squared_error(m, i), 12)
        assert metrics == pytest.approx(
            {
                "loss": first["loss"] + second["loss"],
                "first": first["loss"],
                "second": second["loss"],
                **{name: first[name] for name in ("grad_norm", "lr")},
                **{f"{name}_heads": second[name] for name in ("grad_norm", "lr")},
            },
            rel=1e-5,
        )
    for part, peer in alone.items():
        for name, value in peer.model.state_dict().items():
            torch.testing.assert_close(model[part].state_dict()[name], value)
    assert all(torch.equal(value, frozen[name]) for name, value in model["frozen"].state_dict().items())
    assert set(state.ema) == {"body.weight", "body.bias", "heads.weight", "heads.bias"}
