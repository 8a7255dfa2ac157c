"""The plan: every sample once, under the budget, and the same for any number of workers."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.mixture import Samples, StageConfig
from pipeline.plan import Plan, PlanConfig, Step, packs_of_rank

sizes = st.lists(st.integers(1, 300), min_size=1, max_size=120)


def plan_of(num_tokens, **fields):
    return Plan(Samples.of(num_tokens), PlanConfig(**fields))


def places_of(steps):
    return [place for step in steps for pack in step.packs for place in pack]


@settings(max_examples=150, deadline=None)
@given(
    num_tokens=sizes,
    packs_per_step=st.integers(1, 5),
    context_size=st.integers(1, 3),
    window_steps=st.integers(1, 4),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_every_sample_once_an_epoch_and_no_pack_over_budget(
    num_tokens, packs_per_step, context_size, window_steps, seed, epoch
):
    config = PlanConfig(
        token_budget=150,
        packs_per_step=packs_per_step,
        context_size=context_size,
        window_steps=window_steps,
        seed=seed,
    )
    if min(num_tokens) > config.longest:
        return
    plan = Plan(Samples.of(num_tokens), config)
    steps = plan.epoch(epoch)
    assert plan.rejected == [place for place, tokens in enumerate(num_tokens) if tokens > 150 * context_size]
    assert sorted(places_of(steps) + plan.rejected) == list(range(len(num_tokens)))
    for step in steps:
        for pack in step.packs:
            assert sum(num_tokens[place] for place in pack) <= 150 * (context_size if step.is_shared else 1)
            assert all((num_tokens[place] > 150) == step.is_shared for place in pack)
    for is_shared, size in ((False, packs_per_step), (True, max(1, packs_per_step // context_size))):
        counts = [len(step.packs) for step in steps if step.is_shared == is_shared]
        assert counts[:-1] == [size] * (len(counts) - 1)
    assert steps == Plan(Samples.of(num_tokens), config).epoch(epoch)


@settings(max_examples=100, deadline=None)
@given(num_packs=st.integers(1, 9), num_groups=st.integers(1, 5))
def test_ranks_share_a_step_whole_and_evenly(num_packs, num_groups):
    step = Step(tuple((place,) for place in range(num_packs)))
    shares = [packs_of_rank(step, rank, num_groups) for rank in range(num_groups)]
    assert len({len(share) for share in shares}) == 1  # as many collectives on every rank
    weighted = sorted(pack[0] for share in shares for pack, weight in share if weight == 1)
    assert weighted == list(range(num_packs))


def published_mix(count):
    """Nine durations, seven shapes: 240 to 48,360 tokens, median 4,080."""
    random = np.random.default_rng(0)
    durations = random.choice([1, 5, 9, 17, 33, 49, 65, 81, 121], count)
    shapes = [(256, 256), (192, 320), (320, 192), (256, 448), (480, 480), (480, 832), (832, 480)]
    height, width = np.array(shapes)[random.integers(0, len(shapes), count)].T
    return ((durations - 1) // 4 + 1) * (height // 16) * (width // 16)


def test_packs_of_many_samples_are_full_and_cost_alike():
    num_tokens, config = published_mix(100_000), {"token_budget": 65_536, "quadratic_tokens": 12_032}
    for size in (8, 32):
        start_s = time.monotonic()
        steps = plan_of(num_tokens, packs_per_step=size, **config).epoch(0)
        assert time.monotonic() - start_s < 60  # a tenth of a second a million samples would be; no timing test
        whole = [step for step in steps if len(step.packs) == size]
        assert num_tokens.sum() / (65_536 * sum(len(step.packs) for step in steps)) >= 0.999
        cost = num_tokens * (1 + num_tokens / 12_032)
        packs = np.array([[cost[list(pack)].sum() for pack in step.packs] for step in whole])
        busy = packs.sum() / (packs.max(axis=1) * size).sum()  # of all processes, while the dearest pack of a step runs
        assert busy >= 0.995


def test_small_data_sets_are_packed_full():
    num_tokens = [12 + (place * 37) % 213 for place in range(2000)]
    steps = plan_of(num_tokens, token_budget=2048, packs_per_step=2).epoch(0)
    assert sum(num_tokens) / (2048 * sum(len(step.packs) for step in steps)) >= 0.99


def test_epochs_and_seeds_shuffle_and_any_step_can_be_the_first():
    num_tokens = [10 + place % 7 for place in range(200)]
    plan = plan_of(num_tokens, token_budget=100)
    assert plan.epoch(0) != plan.epoch(1)
    assert plan.epoch(0) != plan_of(num_tokens, token_budget=100, seed=1).epoch(0)
    whole = list(itertools.islice(plan.steps(), 40))
    assert [number for number, _ in whole] == list(range(40))
    for start in (1, 25, 39):
        assert list(itertools.islice(plan.steps(start), 40 - start)) == whole[start:]


def test_stages_follow_each_other_at_their_steps():
    """Low resolution first, then high with images: what the recipe of a real model says."""
    samples = Samples(
        num_tokens=np.array([10] * 40 + [40] * 20 + [5] * 60),
        data_set=np.array([0] * 40 + [1] * 80),
        is_image=np.array([False] * 60 + [True] * 60),
        is_held_out=np.zeros(120, bool),
    )
    stages = (
        StageConfig(repeats=(1, 0)),
        StageConfig(first_step=7, repeats=(0, 1), image_fraction=0.5, packs_per_step=3),
    )
    plan = Plan(samples, PlanConfig(token_budget=80, packs_per_step=2, stages=stages))
    steps = dict(itertools.islice(plan.steps(), 16))
    first = places_of([steps[number] for number in range(7)])
    assert set(first) == set(range(40))
    assert len(first) == 40 + 40 + 16  # epochs of three steps, the third half as large
    assert {len(steps[number].packs) for number in range(3)} == {2, 1}
    epoch = places_of(plan.epoch(0, stage=1))
    assert sorted(place for place in epoch if place < 60) == list(range(40, 60))
    assert sum(place >= 60 for place in epoch) == 20
    assert len(set(epoch)) == 40
    assert [steps[7], steps[8]] == plan.epoch(0, stage=1)[:2]
    assert len(steps[7].packs) == 3
    assert list(itertools.islice(plan.steps(9), 7)) == [(number, steps[number]) for number in range(9, 16)]


@settings(max_examples=100, deadline=None)
@given(repeats=st.lists(st.floats(0, 3), min_size=2, max_size=2), epochs=st.integers(1, 6))
def test_repeats_are_kept_to_the_sample(repeats, epochs):
    """After any number of epochs no sample is more than one ahead of another of its data set."""
    counts = (7, 13)
    data_set = np.repeat([0, 1], counts)
    if 7 * repeats[0] + 13 * repeats[1] < 1:
        return
    samples = Samples(np.full(20, 3), data_set, np.zeros(20, bool), np.zeros(20, bool))
    plan = Plan(samples, PlanConfig(token_budget=9, stages=(StageConfig(repeats=tuple(repeats)),)))
    seen = np.bincount(places_of(step for epoch in range(epochs) for step in plan.epoch(epoch)), minlength=20)
    for number, count in enumerate(counts):
        times = seen[data_set == number]
        assert times.max() - times.min() <= 1
        assert times.sum() == int(np.floor(epochs * repeats[number] * count))


def test_held_out_samples_are_in_no_step_and_planned_on_their_own():
    held_out = np.arange(50) % 7 == 0
    samples = Samples.of([5] * 50)._replace(is_held_out=held_out)
    plan = Plan(samples, PlanConfig(token_budget=20))
    assert sorted(places_of(plan.epoch(0))) == np.flatnonzero(~held_out).tolist()
    places, own = samples.held_out()
    assert places.tolist() == np.flatnonzero(held_out).tolist()
    assert sorted(places_of(Plan(own, PlanConfig(token_budget=20)).epoch(0))) == list(range(len(places)))


def test_half_an_epoch_is_another_half_the_next_time():
    plan = plan_of([1] * 10, token_budget=5, stages=(StageConfig(repeats=(0.5,)),))
    first, second = places_of(plan.epoch(0)), places_of(plan.epoch(1))
    assert len(first) == len(second) == 5
    assert sorted(first + second) == list(range(10))


def test_packs_of_a_step_cost_alike():
    num_tokens = [50] * 400 + [1000] * 20
    steps = plan_of(num_tokens, token_budget=1000, packs_per_step=2, quadratic_tokens=500).epoch(0)
    long_packs = [sum(len(pack) == 1 for pack in step.packs) for step in steps]
    assert sorted(long_packs) == [0] * 10 + [2] * 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: plan_of([101, 105], token_budget=100), r"token_budget=100 .* at least 101"),
        (lambda: plan_of([]), "data set is empty"),
        (lambda: PlanConfig(packs_per_step=0), "packs_per_step=0"),
        (lambda: PlanConfig(stages=(StageConfig(first_step=5),)), r"first_step=\[5\]: must begin with 0"),
        (lambda: PlanConfig(stages=(StageConfig(), StageConfig())), r"first_step=\[0, 0\]: must begin with 0 and grow"),
        (lambda: StageConfig(repeats=(0.0, 0.0)), "not all 0"),
        (lambda: StageConfig(image_fraction=1.5), "image_fraction=1.5"),
        (lambda: plan_of([1], stages=(StageConfig(image_fraction=0.5),)), "1 videos and 0 images"),
        (lambda: plan_of([1], stages=(StageConfig(repeats=(1.0, 1.0)),)), "1 data set, and 2 numbers"),
    ],
)
def test_bad_input_names_field_value_and_fix(make, message):
    with pytest.raises(ValueError, match=message):
        make()
