"""The expert cache: never more than k, never evicts what is needed, Belady where the future is known."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from readme_jax.errors import ConfigError
from readme_jax.serving.expert_cache import ExpertCache, replay
from readme_jax.serving.residency import Places, Residency
from readme_jax.serving.work import experts_in

EXPERTS = 6
batches = st.lists(st.integers(1, 2**EXPERTS - 1), min_size=1, max_size=25)


def check_plan(before: frozenset[int], needed: frozenset[int], cache: ExpertCache, plan) -> None:
    """Follow a plan layer-wise and assert that every expert is there when its wave runs."""
    there, ran = set(before), set()
    assert plan.hits == needed & before
    assert plan.misses == len(needed - before)
    for number, (wave, loads) in enumerate(zip(plan.waves, plan.wave_loads, strict=True)):
        for expert, victim in loads:
            assert victim not in needed or (number > 0 and victim in ran), "evicts what the batch still needs"
            there.discard(victim)
            there.add(expert)
        assert len(there) <= cache.slots
        assert set(wave) <= there | set(plan.streams)
        ran |= wave
    assert ran == needed
    for expert, victim in plan.keeps:
        assert expert in plan.streams and victim in needed
        there.discard(victim)
        there.add(expert)
    assert there == cache.resident


@given(
    st.integers(1, EXPERTS), st.integers(0, 3), st.sampled_from(["belady", "lru", "random"]), batches, st.integers(0, 5)
)
def test_plans_hold_what_they_need(slots, staging, policy, masks, seen) -> None:
    cache = ExpertCache(EXPERTS, slots, staging, policy)
    for index, mask in enumerate(masks):
        before, needed = cache.resident, experts_in(mask)
        check_plan(before, needed, cache, cache.step(needed, masks[index + 1 : index + 1 + seen]))
        assert len(cache.resident) == slots
        if slots == EXPERTS:
            assert cache.misses == 0


@given(st.integers(1, 4), st.lists(st.integers(1, 31), min_size=1, max_size=7))
def test_belady_with_the_whole_future_is_optimal(slots, masks) -> None:
    """With staging no choice of residents over the whole sequence, found by exhaustive search, hits more."""

    @cache
    def most(resident: frozenset[int], index: int) -> int:
        if index == len(masks):
            return 0
        needed = experts_in(masks[index])
        after = combinations(sorted(resident | needed), slots)
        return len(resident & needed) + max(most(frozenset(c), index + 1) for c in after)

    experts = ExpertCache(5, slots, staging=1)
    best = most(experts.resident, 0)
    replay(experts, masks, offline=True)
    assert experts.hits == best


def test_lru_evicts_the_least_recent_and_belady_the_farthest() -> None:
    for policy, kept in (("lru", {1, 2}), ("belady", {0, 2})):
        cache = ExpertCache(3, 2, staging=1, policy=policy)
        for mask in (0b001, 0b010):  # 0, then 1
            cache.step(experts_in(mask))
        cache.step(frozenset({2}), [0b100, 0b001, 0b010])
        assert cache.resident == kept


def test_belady_streams_what_comes_back_last() -> None:
    cache = ExpertCache(3, 2, staging=1)
    plan = cache.step(frozenset({2}), [0b011, 0b100])
    assert plan.streams == (2,) and cache.resident == {0, 1}


def test_streamed_expert_takes_the_place_of_one_that_has_run() -> None:
    cache = ExpertCache(3, 2, staging=1)
    plan = cache.step(frozenset({0, 1, 2}), [0b110, 0b110, 0b001])
    assert plan.keeps == ((2, 0),) and cache.resident == {1, 2}


def test_waves_without_staging() -> None:
    cache = ExpertCache(5, 2)
    plan = cache.step(frozenset(range(5)), [0b00001])
    assert [set(w) for w in plan.waves][0] == {0, 1}
    assert all(len(w) <= 2 for w in plan.waves) and len(plan.waves) == 3


def test_future_is_read_only_as_far_as_needed() -> None:
    def future():
        yield 0b0111
        raise AssertionError("read on although the victim is known")

    cache = ExpertCache(4, 3, staging=1)
    cache.step(frozenset({3}), future())
    assert cache.resident == {0, 1, 2}


def test_random_is_a_function_of_its_seed() -> None:
    masks = np.random.default_rng(0).integers(1, 2**EXPERTS, 50).tolist()
    first, second, other = (ExpertCache(EXPERTS, 3, 1, "random", seed) for seed in (1, 1, 2))
    assert replay(first, masks) == replay(second, masks)
    replay(other, masks)
    assert first.resident == second.resident


def test_swap_waits_until_waiting_outweighs_its_victim() -> None:
    cache = ExpertCache(4, 2, staging=1)
    active = [3.0, 1.0, 0.0, 0.0]
    assert cache.swap([0, 0, 0.05, 0.02], active, load=0.1) is None
    assert cache.swap([0, 0, 0.15, 0.02], active, load=0.1) == (2, 1)
    assert cache.resident == {0}
    assert cache.swap([0, 0, 9.0, 9.0], active, load=0.1) is None, "one at a time"
    cache.finish_swap()
    assert cache.resident == {0, 2}
    with pytest.raises(RuntimeError, match="no swap"):
        cache.finish_swap()


def test_batch_that_needs_the_expert_being_swapped_finishes_the_swap() -> None:
    cache = ExpertCache(4, 2, staging=1)
    cache.swap([0, 0, 1.0, 0], [3.0, 1.0, 1.0, 0.0], load=0.1)
    plan = cache.step(frozenset({0, 2}))
    assert plan.loads == ((2, 1),) and cache.resident == {0, 2} and cache.swapping is None


@pytest.mark.parametrize(
    ("arguments", "says"), [((0, 1), "experts = 0"), ((4, -1), "slots = -1"), ((4, 2, 1, "fifo"), "fifo")]
)
def test_bad_settings_name_themselves(arguments, says) -> None:
    with pytest.raises(ConfigError, match=says):
        ExpertCache(*arguments)


# --- lateness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("due", "coming", "foreseen", "late"),
    [
        (0.2, 2, 1, 1),  # decided on two load times before, and still on its way
        (0.2, None, 1, 0),  # in time
        (0.05, 2, 0, 0),  # needed before a load could have arrived: nobody's fault
    ],
)
def test_a_load_known_a_load_time_ahead_that_has_not_arrived_is_late(due, coming, foreseen, late) -> None:
    cache = ExpertCache(4, 2, 1)
    residency = Residency(Places(4, 2, 1), cache, load_seconds=0.1)
    residency.bring(cache.resident)
    residency.decide(frozenset({0, 2}), (), now=1.0)
    residency.bring(frozenset({0, 2}))
    residency.store.coming = coming
    residency.due(1.0 + due)
    assert (residency.foreseen, residency.late) == (foreseen, late)
    residency.due(9.0)
    residency.decide(frozenset({0, 2}), (), now=10.0)  # on the device by now: no load
    residency.bring(frozenset({0, 2}))
    residency.due(11.0)
    assert (residency.foreseen, residency.late) == (foreseen, late)  # each load counts once


def test_loads_of_later_calls_of_a_step_are_not_due_with_its_first() -> None:
    cache = ExpertCache(4, 1)
    residency = Residency(Places(4, 1, 0), cache, load_seconds=0.1)
    residency.bring(cache.resident)
    residency.decide(frozenset({1, 2, 3}), (), now=0.0)
    for expert in (1, 2, 3):
        residency.bring(frozenset({expert}))
    residency.due(1.0)
    assert residency.foreseen == 1
