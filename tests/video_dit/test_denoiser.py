"""The guided denoiser: what two passes give, in one; each sample as if alone; nothing run that nobody asked for."""

import pytest
import torch

from video_dit.denoiser import GuidedDenoiser
from video_dit.diffusion.guidance import Guidance, GuidanceOptions
from video_dit.diffusion.schedules import RectifiedFlow
from video_dit.packing import pack

FLOW = RectifiedFlow()
SHAPES = [(4, 2, 4, 4), (4, 1, 2, 2), (4, 3, 2, 6)]  # 8, 1 and 9 tokens: packed by length
SCALES = [3.0, 1.0, 2.0]  # in the caller's order
TEXTS = [torch.full((2 + n, 24), 0.2 * n) for n in range(3)]
NEGATIVE = [torch.full((1 + n, 24), -0.1) for n in range(3)]
OPTIONS = {
    "plain": [GuidanceOptions()] * 3,
    "mixed": [GuidanceOptions(interval=(0.4, 1.0), rescale=0.5), GuidanceOptions(), GuidanceOptions(zero_star=True)],
    "apg": [GuidanceOptions(parallel=0.0, max_norm=2.0, momentum=-0.5)] * 3,
    "zero_above": [GuidanceOptions(zero_above=0.9)] * 3,
}


def pack_of(numbers):
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return pack([latents[n] for n in numbers], [0.0] * len(numbers), [TEXTS[n] for n in numbers])


def denoiser_of(dit, numbers, options, **more):
    packed = pack_of(numbers)
    chosen = [numbers[place] for place in packed.order]
    guidance = Guidance([SCALES[n] for n in chosen], [options[n] for n in chosen], packed.lengths, "velocity")
    return GuidedDenoiser(dit, packed, [NEGATIVE[n] for n in numbers], guidance, FLOW, **more)


class Counted:
    """A model that counts the tokens it is run on."""

    def __init__(self, dit):
        self.dit, self.text_keys, self.num_tokens = dit, dit.text_keys, []

    def __call__(self, packed, cache, text_keys):
        self.num_tokens.append(packed.num_tokens)
        return self.dit(packed, cache, text_keys)


@pytest.fixture
def dit(generator):
    return generator.dit


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_packed_pass_is_two_passes_and_the_formula(dit, options):
    denoise = denoiser_of(dit, [0, 1, 2], options)
    packed = denoise.packed
    again = Guidance(denoise.guidance.scales, denoise.guidance.options, packed.lengths, "velocity")
    for sigma in (1.0, 0.7, 0.2):
        timesteps = torch.full_like(packed.timesteps, 1000 * sigma)
        conditional = dit(packed.replace(tokens=packed.tokens, timesteps=timesteps))
        unconditional = dit(packed.with_texts(NEGATIVE).replace(tokens=packed.tokens, timesteps=timesteps))
        level = FLOW.level(sigma)
        expected = again.start_from_rest(packed.tokens, again(packed.tokens, conditional, unconditional, level), level)
        found = denoise(packed.tokens, torch.tensor(1000 * sigma))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_sample_is_guided_as_if_alone(dit, options):
    together = denoiser_of(dit, [0, 1, 2], options, cache_thresholds=[0.05] * 3)
    alone = [denoiser_of(dit, [n], options, cache_thresholds=[0.05]) for n in range(3)]
    for sigma in (1.0, 0.95, 0.9, 0.3, 0.25):
        timestep = torch.tensor(1000 * sigma)
        found = together.packed.unpack(together(together.packed.tokens, timestep))
        for part, denoise in zip(found, alone, strict=True):
            (expected,) = denoise.packed.unpack(denoise(denoise.packed.tokens, timestep))
            torch.testing.assert_close(part, expected, rtol=0, atol=1e-5)
    asked = [denoise.cache.num_asked for denoise in alone]
    run = [denoise.cache.num_run for denoise in alone]
    assert together.cache.num_run == sum(run) < sum(asked)


@torch.no_grad()
def test_only_what_is_guided_is_run_twice(dit):
    counted = Counted(dit)
    denoise = denoiser_of(counted, [0, 1, 2], [GuidanceOptions(interval=(0.4, 0.8))] * 3)
    for sigma in (1.0, 0.7, 0.2):
        denoise(denoise.packed.tokens, torch.tensor(1000 * sigma))
    assert counted.num_tokens == [18, 18 + 8 + 9, 18]  # sample 1 has scale 1
    counted.num_tokens.clear()
    unguided = denoiser_of(counted, [1], OPTIONS["plain"])
    unguided(unguided.packed.tokens, torch.tensor(500.0))
    assert counted.num_tokens == [1]


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_given_tokens_count_for_nothing(dit, options):
    """A given frame, at timestep 0: what is made of the others is guided by themselves alone."""
    packed = pack_of([2])
    is_given = (torch.arange(9) < 3)[:, None]
    timestep = torch.where(is_given, 0.0, 700.0)
    found = denoiser_of(dit, [2], options, is_given=is_given)(packed.tokens, timestep)
    halves = [
        dit(texts.replace(tokens=packed.tokens, timesteps=torch.tensor([0.0, 700.0, 700.0])))
        for texts in (packed, packed.with_texts(NEGATIVE[2:]))
    ]
    free = Guidance([SCALES[2]], [options[2]], [6], "velocity")
    x, conditional, unconditional = (values[3:] for values in (packed.tokens, *halves))
    if options[2].rescale == 0:  # which looks at means, too
        torch.testing.assert_close(found[3:], free(x, conditional, unconditional, FLOW.level(0.7)), rtol=0, atol=1e-5)
    assert found.isfinite().all()


@torch.no_grad()
def test_text_keys_are_what_every_step_would_compute(dit):
    packed = pack_of([0, 1, 2])
    torch.testing.assert_close(dit(packed, None, dit.text_keys(packed)), dit(packed), rtol=0, atol=0)
    first = pack_of([1])  # the shortest: in front
    keys = [keys.first(len(first.text)) for keys in dit.text_keys(packed)]
    torch.testing.assert_close(dit(first, None, keys), dit(first), rtol=0, atol=1e-6)
