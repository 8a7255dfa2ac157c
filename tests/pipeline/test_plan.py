"""The plan: every sample once, under the budget, and the same for any number of workers."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.plan import PlanConfig, iterate_steps, packs_of_rank, plan_epoch

sizes = st.lists(st.integers(1, 300), min_size=1, max_size=120)


@settings(max_examples=150, deadline=None)
@given(num_tokens=sizes, packs_per_step=st.integers(1, 5), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_every_sample_once_and_no_pack_over_budget(num_tokens, packs_per_step, seed, epoch):
    config = PlanConfig(token_budget=300, packs_per_step=packs_per_step, window_steps=2, seed=seed)
    steps = plan_epoch(num_tokens, config, epoch)
    packs = list(itertools.chain.from_iterable(steps))
    assert sorted(itertools.chain.from_iterable(packs)) == list(range(len(num_tokens)))
    assert all(sum(num_tokens[place] for place in pack) <= 300 for pack in packs)
    assert all(len(step) == packs_per_step for step in steps[:-1])
    assert steps == plan_epoch(num_tokens, config, epoch)


@settings(max_examples=100, deadline=None)
@given(num_packs=st.integers(1, 9), world_size=st.integers(1, 5))
def test_ranks_share_a_step_whole_and_evenly(num_packs, world_size):
    step = tuple((place,) for place in range(num_packs))
    shares = [packs_of_rank(step, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1  # as many collectives on every rank
    weighted = sorted(pack[0] for share in shares for pack, weight in share if weight == 1)
    assert weighted == list(range(num_packs))


def test_packs_are_full():
    num_tokens = [12 + (place * 37) % 213 for place in range(2000)]
    config = PlanConfig(token_budget=2048, packs_per_step=2)
    steps = plan_epoch(num_tokens, config, 0)
    filled = sum(num_tokens) / (2048 * sum(len(step) for step in steps))
    assert filled >= 0.99


def test_epochs_and_seeds_shuffle_and_any_step_can_be_the_first():
    num_tokens = [10 + place % 7 for place in range(200)]
    config = PlanConfig(token_budget=100, packs_per_step=2)
    assert plan_epoch(num_tokens, config, 0) != plan_epoch(num_tokens, config, 1)
    assert plan_epoch(num_tokens, config, 0) != plan_epoch(num_tokens, PlanConfig(token_budget=100, seed=1), 0)
    whole = list(itertools.islice(iterate_steps(num_tokens, config), 40))
    assert [step for step, _ in whole] == list(range(40))
    assert list(itertools.islice(iterate_steps(num_tokens, config, start=25), 15)) == whole[25:]


def test_packs_of_a_step_cost_alike():
    num_tokens = [50] * 400 + [1000] * 20
    steps = plan_epoch(num_tokens, PlanConfig(token_budget=1000, packs_per_step=2, quadratic_tokens=500), 0)
    long_packs = [sum(len(pack) == 1 for pack in step) for step in steps]
    assert sorted(long_packs) == [0] * 10 + [2] * 10


def test_bad_input_names_field_value_and_fix():
    with pytest.raises(ValueError, match=r"token_budget=100 .* at least 101"):
        plan_epoch([5, 101], PlanConfig(token_budget=100), 0)
    with pytest.raises(ValueError, match="data set is empty"):
        plan_epoch([], PlanConfig(), 0)
    with pytest.raises(ValueError, match="packs_per_step=0"):
        PlanConfig(packs_per_step=0)
