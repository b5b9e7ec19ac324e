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
from readme_jax.serving.flight import Flying, plan_calls
from readme_jax.serving.residency import Moves, Places, Residency
from readme_jax.serving.work import Batch, Chunk, experts_in

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
    active = [3.0, 1.0, 2.0, 1.0]
    assert cache.swap([0, 0, 0.05, 0.02], active, load=0.1) is None
    assert cache.swap([0, 0, 0.02, 0.15], active, load=0.1) is None, "no more sequences need 3 than 1"
    assert cache.swap([0, 0, 0.15, 0.02], active, load=0.1) == (2, 1)
    assert cache.resident == {0}
    assert cache.swap([0, 0, 9.0, 9.0], active, load=0.1) is None, "one at a time"
    cache.finish_swap()
    assert cache.resident == {0, 2}
    with pytest.raises(RuntimeError, match="no swap"):
        cache.finish_swap()


def test_the_only_resident_is_not_swapped_away() -> None:
    cache = ExpertCache(4, 1, staging=1)
    assert cache.swap([0, 0, 9.0, 9.0], [1.0, 0, 0, 0], load=0.1) is None and cache.resident == {0}


def test_batch_that_needs_the_expert_being_swapped_finishes_the_swap() -> None:
    cache = ExpertCache(4, 2, staging=1)
    cache.swap([0, 0, 1.0, 0], [3.0, 1.0, 2.0, 0.0], load=0.1)
    plan = cache.step(frozenset({0, 2}))
    assert plan.loads == ((2, 1),) and cache.resident == {0, 2} and cache.swapping is None


@pytest.mark.parametrize(
    ("arguments", "says"), [((0, 1), "experts = 0"), ((4, -1), "slots = -1"), ((4, 2, 1, "fifo"), "fifo")]
)
def test_bad_settings_name_themselves(arguments, says) -> None:
    with pytest.raises(ConfigError, match=says):
        ExpertCache(*arguments)


# --- moves --------------------------------------------------------------------------------------------------------


def residency(experts: int, slots: int, staging: int, **options: float) -> Residency:
    return Residency(Places(experts, slots, staging), ExpertCache(experts, slots, staging), **options)


def test_missing_experts_stream_past_residents_that_are_needed_sooner() -> None:
    """Belady keeps 0 and 1, which the next batch needs: 2 and 3 pass one after the other."""
    made = residency(4, 2, staging=1)
    made.decide(frozenset({2, 3}), [0b0011])
    assert not made.fit(frozenset({2, 3}))
    assert made.group([frozenset({2}), frozenset({3}), frozenset({2})]) == [0, 2]
    assert made.bring(frozenset({2}), later=[3]) == Moves((), (2,))
    assert made.bring(frozenset({3})) == Moves((2,), (3,))
    assert made.settle() == Moves((3,), ())
    assert made.held == {0, 1}


def test_a_resident_to_be_leaves_last_and_its_victim_first() -> None:
    made = residency(4, 2, staging=1)
    made.decide(frozenset({0, 2, 3}), [0b0101])  # 2 takes the place of 1, which nobody needs
    assert made.resident == {0, 2}
    assert made.bring(frozenset({0, 2}), later=[3]) == Moves((), (2,))
    assert made.bring(frozenset({3})) == Moves((1,), (3,))
    assert made.settle() == Moves((3,), ())
    assert made.held == {0, 2}


def test_of_what_later_calls_need_the_last_leaves_first_and_residents_before_it() -> None:
    for later, leaves in (([0, 1], 1), ([1, 0], 0), ([1], 0), ([0], 1)):
        made = residency(4, 2, staging=0)
        assert made.bring(frozenset({3}), later=later) == Moves((leaves,), (3,)), later


def test_a_prompt_that_goes_back_and_forth_between_strangers_is_loaded_for_once() -> None:
    """0 and 1 are resident; with one more place, 2 and 3 fit together only if one of those leaves."""
    made = residency(4, 2, staging=1)
    prompt = Flying(0, 0.0, 40, [(2,), (3,)] * 20, 1)
    calls, after = plan_calls(Batch((Chunk(prompt, 0, 40),)), made, 40)
    assert [(c.piece.start, c.piece.stop, c.moves.load) for c in calls if c.piece] == [(0, 40, (2, 3))]
    assert len(after.drop) == 1 and len(made.held) == 2


def test_a_token_whose_experts_do_not_fit_beside_residents_sends_one_away() -> None:
    made = residency(4, 2, staging=1)
    made.decide(frozenset({2, 3}), [0b0011])
    assert made.group([frozenset({2, 3})]) == [0]
    moves = made.bring(frozenset({2, 3}))
    assert len(moves.drop) == 1 and set(moves.load) == {2, 3} and len(made.held) == 3
    made.settle()
    assert len(made.held) == 2 and made.held & {0, 1}


def test_without_staging_a_step_runs_in_waves() -> None:
    made = residency(4, 1, staging=0)
    made.decide(frozenset({0, 1, 2}))
    needs = [frozenset({e}) for e in (2, 1, 0)]
    assert made.group(needs) == [2]
    for expert in (0, 1, 2):
        made.bring(frozenset({expert}))
        assert made.held == {expert}


def test_a_swap_arrives_after_a_steps_calls_and_counts_once_it_is_there() -> None:
    made = residency(4, 2, staging=1, load_seconds=0.1)
    assert made.swap([0, 0, 1.0, 0], [3.0, 1.0, 2.0, 0]) == (False, True)  # 2 for 1
    made.decide(frozenset({0}))
    assert made.bring(frozenset({0})) == Moves()
    assert made.settle() == Moves((1,), (2,))
    assert made.held == {0, 2} and made.here == {0}, "on its way: no call is given it for want of a better one"
    made.store.coming = 2
    assert made.swap([0] * 4, [1.0] * 4) == (False, False)
    made.store.coming = None
    assert made.swap([0] * 4, [1.0] * 4) == (True, False)
    assert made.resident == made.here == {0, 2}


def test_a_step_that_needs_the_expert_being_swapped_brings_it() -> None:
    made = residency(4, 2, staging=1, load_seconds=0.1)
    made.swap([0, 0, 1.0, 0], [3.0, 1.0, 2.0, 0])
    made.decide(frozenset({0, 2}))
    assert made.bring(frozenset({0, 2})) == Moves((), (2,))
    assert made.settle() == Moves((1,), ())
    assert made.held == made.resident == {0, 2}


@given(st.integers(1, 5), st.integers(0, 3), st.lists(st.sets(st.integers(0, 6), min_size=1), max_size=30))
def test_calls_get_their_experts_within_the_places_there_are(slots: int, staging: int, batches: list[set[int]]) -> None:
    made = residency(7, slots, staging)
    for number, needed in enumerate(batches):
        made.decide(frozenset(needed), [sum(1 << e for e in batch) for batch in batches[number + 1 :]])
        needs = [frozenset({e}) for e in sorted(needed)]
        while needs:
            held, group = made.held, made.group(needs)
            experts = frozenset().union(*(needs[i] for i in group))
            moves = made.bring(experts)
            assert held - set(moves.drop) | set(moves.load) == made.held >= experts
            assert not set(moves.load) & held and set(moves.drop) <= held and len(made.held) <= slots + staging
            if len(group) > 1 or len(experts) <= staging:
                assert made.held >= held & made.resident
            needs = [need for i, need in enumerate(needs) if i not in group]
        made.settle()
        assert len(made.held) <= slots
