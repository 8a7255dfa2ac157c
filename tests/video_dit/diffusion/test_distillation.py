"""Distillation against closed forms: an exact teacher, whose gradients go where, and what depends on a key alone."""

import copy
import types

import pytest
import torch
from torch import nn

from video_dit.diffusion.distillation import (
    AdversarialDistillation,
    DistillationConfig,
    distillation_batch,
    distillation_distance,
    distillation_losses,
    predict_data,
)
from video_dit.diffusion.losses import DiffusionConfig
from video_dit.diffusion.schedules import LinearBetaSchedule, RectifiedFlow
from video_dit.diffusion.targets import TARGETS, target_of
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.random import keyed_normal
from video_dit.shapes import Stride

PATCH = Stride(1, 2, 2)
SHAPES = [(4, 3, 4, 2), (4, 1, 4, 4), (4, 2, 2, 6)]
EMPTY = torch.zeros(1, 5)
SIZES = {"attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "text_dim": 5, "freq_dim": 16, "ffn_dim": 32}


def batch_of(config, schedule=None, data=None, names="abc"):
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(shape, generator=generator) if data is None else torch.full(shape, data) for shape in SHAPES]
    texts = [torch.randn(2 + place, 5, generator=generator) for place in range(3)]
    keys = [(7, 3, name) for name in names]
    num = len(names)
    return distillation_batch(
        latents[:num], texts[:num], EMPTY, keys, config, schedule or RectifiedFlow(shift=3.0), PATCH
    )


def transformer():
    torch.manual_seed(0)
    model = VideoDiT(VideoDiTConfig(num_attention_heads=2, num_layers=2, **SIZES))
    for parameter in model.parameters():  # no zero, no one
        nn.init.normal_(parameter, std=0.2)
    return model


def distillation_of(config):
    teacher = transformer()
    return AdversarialDistillation(copy.deepcopy(teacher), teacher, config, DiffusionConfig(shift=3.0))


class Exact(nn.Module):
    """Knows that all data is one number, and predicts the target that follows at a batch's noise levels."""

    def __init__(self, data, batch, schedule, target):
        super().__init__()
        self.data, self.schedule, self.target = data, schedule, target
        self.offset = nn.Parameter(torch.zeros(()))
        self.blocks = nn.ModuleList([nn.Identity()])
        self.config = types.SimpleNamespace(dim=16)
        self.sigmas = torch.cat([batch.sigma[:, 0], batch.noise_sigma[:, 0]])
        self.timesteps = schedule.timestep(self.sigmas)

    def forward(self, packed):
        x = self.blocks[0](packed.tokens)
        distances = (packed.timesteps[packed.frame_of_token][:, None] - self.timesteps).abs()  # n levels
        level = self.schedule.level(self.sigmas[distances.argmin(dim=1)][:, None])
        data = torch.full_like(x, self.data)
        noise = (x - level.alpha.to(x) * data) / level.sigma.to(x)
        return target_of(data, noise, self.target, level) + self.offset


@pytest.mark.parametrize("target", TARGETS)
def test_a_student_that_is_an_exact_teacher_has_nothing_to_learn(target):
    """Point-mass data: whatever noise is added, a teacher that knows the data finds the student's prediction again."""
    schedule_name = "flow" if target == "velocity" else "linear"
    diffusion = DiffusionConfig(schedule_name=schedule_name, target=target)
    config = DistillationConfig(guidance_scale=1.0, renoise_mean=-1.0)
    batch = batch_of(config, diffusion.schedule, data=0.5)
    exact = Exact(0.5, batch, diffusion.schedule, target)
    module = AdversarialDistillation(copy.deepcopy(exact), exact, config, diffusion)
    assert torch.allclose(predict_data(exact, batch.packed, diffusion.schedule.level(batch.sigma), target), batch.data)
    losses = distillation_losses(module, batch)
    assert losses["distillation"].item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        module.student.offset += 0.1  # and a student that is not exact has
    assert distillation_losses(module, batch)["distillation"].item() > 1e-4


def test_the_distance_is_weighed_by_the_share_of_the_data():
    level = RectifiedFlow().level(torch.tensor([[0.25], [1.0]]))
    generated, teacher = torch.full((2, 4), 3.0, requires_grad=True), torch.full((2, 4), 1.0, requires_grad=True)
    distance = distillation_distance(generated, teacher, level)
    assert distance.tolist() == [0.75 * 4, 0.0]
    distance.sum().backward()
    assert teacher.grad is None  # the teacher's estimate is a constant
    assert torch.equal(generated.grad, torch.tensor([[0.75], [0.0]]).expand(2, 4))  # 2 * 2 / 4 channels, weighted


def test_guidance_moves_the_teachers_estimate_linearly():
    """A distance to guided data is quadratic in the scale: three values fix the fourth."""
    modules = {scale: distillation_of(DistillationConfig(guidance_scale=scale)) for scale in (0.0, 1.0, 2.0, 3.0)}
    losses = {
        scale: distillation_losses(module, batch_of(module.config))["distillation"].item()
        for scale, module in modules.items()
    }
    assert losses[1.0] != pytest.approx(losses[2.0], rel=1e-3)
    assert losses[3.0] == pytest.approx(losses[0.0] - 3 * losses[1.0] + 3 * losses[2.0], rel=1e-3)


def gradients(module, names):
    module.zero_grad()
    losses = distillation_losses(module, batch_of(module.config))
    sum(losses[name] for name in names).backward()
    return {
        part: sum(p.grad.abs().sum().item() for p in module.get_submodule(part).parameters() if p.grad is not None)
        for part in ("student", "teacher", "heads")
    }


def test_gradients_reach_whom_a_loss_is_for_and_nobody_else():
    module = distillation_of(DistillationConfig())
    before = copy.deepcopy(module.teacher.state_dict())
    for name in ("distillation", "adversarial"):
        found = gradients(module, [name])
        assert found["student"] > 0
        assert found["teacher"] == found["heads"] == 0
    for name in ("discriminator", "r1"):
        found = gradients(module, [name])
        assert found["heads"] > 0
        assert found["teacher"] == found["student"] == 0
    assert all(torch.equal(value, before[name]) for name, value in module.teacher.state_dict().items())


def test_the_students_adversarial_gradient_is_that_of_the_heads_logits():
    """A step against it makes the heads take the student's samples for more real."""
    module = distillation_of(DistillationConfig(distillation_weight=0.0))
    optimizer = torch.optim.SGD(module.student.parameters(), lr=1e-4)
    values = []
    for _ in range(4):
        losses = distillation_losses(module, batch_of(module.config))
        values.append(losses["adversarial"].item())
        optimizer.zero_grad()
        losses["adversarial"].backward()
        optimizer.step()
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]


def test_noise_and_levels_of_a_sample_depend_on_its_key_alone():
    config = DistillationConfig()
    together, alone = batch_of(config), batch_of(config, names="a")
    for pack_together, pack_alone in ((together.packed, alone.packed), (together.noise, alone.noise)):
        assert torch.equal(pack_together.unpack(pack_together.tokens)[0], pack_alone.unpack(pack_alone.tokens)[0])
    noise = together.noise.unpack(together.noise.tokens)[0]
    assert torch.equal(noise, keyed_normal(SHAPES[0], 7, 3, "a", "renoise"))
    sigma, data, noisy = (
        together.packed.unpack(x)[0] for x in (together.sigma.expand(-1, 16), together.data, together.packed.tokens)
    )
    expected = (1 - sigma) * data + sigma * keyed_normal(SHAPES[0], 7, 3, "a", "noise")
    assert torch.allclose(noisy, expected.float(), atol=1e-6)


def test_students_levels_are_the_schedules_even_steps_and_each_is_visited():
    schedule, config = RectifiedFlow(shift=3.0), DistillationConfig(num_steps=4)
    names = [str(number) for number in range(80)]
    keys = [(0, 0, name) for name in names]
    batch = distillation_batch([torch.zeros(4, 1, 2, 2)] * 80, [EMPTY] * 80, EMPTY, keys, config, schedule, PATCH)
    levels, counts = batch.sigma.unique(return_counts=True)
    assert torch.allclose(levels, schedule.sigmas(4)[:-1].flip(0))
    assert (counts > 8).all()
    assert torch.allclose(batch.packed.timesteps, (1000 * batch.sigma[:, 0]).float())
    assert torch.allclose(batch.noise.timesteps, (1000 * batch.noise_sigma[:, 0]).float())
    assert batch.noise_sigma.unique().numel() == 80
    assert set(batch.unconditional.text_lengths) == {1}


def test_a_schedule_without_pure_noise_starts_at_its_highest_level():
    schedule = LinearBetaSchedule()
    batch = batch_of(DistillationConfig(num_steps=1), schedule)
    assert torch.allclose(batch.sigma, schedule.sigmas(1)[0])


def test_errors_name_the_field():
    with pytest.raises(ValueError, match="num_steps=0: must be at least 1"):
        DistillationConfig(num_steps=0)
    with pytest.raises(ValueError, match="r1_weight=-1"):
        DistillationConfig(r1_weight=-1)
    with pytest.raises(ValueError, match="renoise_std=0"):
        DistillationConfig(renoise_std=0)
    with pytest.raises(ValueError, match=r"feature_blocks=\(2,\): the teacher has blocks 0 to 1"):
        distillation_of(DistillationConfig(feature_blocks=(2,)))
