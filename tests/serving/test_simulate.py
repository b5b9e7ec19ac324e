"""The simulation: timelines worked out by hand, conservation, and decisions that follow from step times alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from readme_jax.errors import ConfigError
from readme_jax.serving.cost import DEVICES, SHAPES, CostModel, Device, LayerCost, Shape
from readme_jax.serving.expert_cache import ExpertCache
from readme_jax.serving.loop import Logged
from readme_jax.serving.rollout import queue_future, roll_out
from readme_jax.serving.scheduler import DecodeFirst, make_scheduler
from readme_jax.serving.simulate import Setup, replay_decisions, simulate
from readme_jax.serving.timeline import Timeline
from readme_jax.serving.traffic import Request
from readme_jax.serving.work import Batch, Chunk, Room, Sequence

MODEL = CostModel(
    Shape(64, 4, 4, 4, 16, 256, 100, num_experts=4, width=0.5, permanent=0.125), Device(1e9, 1e8, 2e7, 1e-4)
)
POLICIES = ("decode_first", "prefill_first", "algorithm1", "lookahead")


def requests(count: int, seed: int = 0, rate: float = 20.0) -> list[Request]:
    rng = np.random.default_rng(seed)
    made, arrival = [], 0.0
    for i in range(count):
        arrival += float(rng.exponential(1 / rate))
        prompt, output = int(rng.integers(1, 40)), int(rng.integers(1, 12))
        changes = rng.random(prompt + output) < 0.1
        experts = (int(rng.integers(4)) + np.cumsum(changes)) % 4
        made.append(Request(i, arrival, prompt, output, tuple((int(e),) for e in experts)))
    return made


def serve(policy: str = "decode_first", slots: int = 2, staging: int = 1, count: int = 30, **setup):
    cache = ExpertCache(4, slots, staging)
    scheduler = make_scheduler(policy, 32, MODEL.costs(), 4)
    return simulate(requests(count), scheduler, cache, MODEL, Setup(rows=8, **setup)), cache


def layers_of(timeline: Timeline, cache: ExpertCache, needed: set[int], known: float = 0.0, start: float = 10.0):
    cost = LayerCost(1.0, dict.fromkeys(needed, 0.5))
    return timeline.run(start, known, cost, cache.step(frozenset(needed)), head=0.25)


def test_step_without_misses_is_its_compute() -> None:
    step = layers_of(Timeline(3, 4.0, 1, "batch"), ExpertCache(4, 2, 1), {0, 1})
    assert step.total == step.compute == 3 * 2.0 + 0.25 and step.transfer == 0


def test_loads_on_demand_add_up() -> None:
    """Each layer: its load (4 s) begins with it and covers the shared part and the hit (1.5 s); then 0.5 s."""
    step = layers_of(Timeline(3, 4.0, 1, "off"), ExpertCache(4, 2, 1), {0, 2})
    assert step.total == pytest.approx(3 * 4.5 + 0.25)


def test_loads_a_layer_ahead_overlap_with_compute() -> None:
    """Without staging, into a slot the batch does not need: the link never rests after the first layer."""
    step = layers_of(Timeline(3, 4.0, 0, "layer"), ExpertCache(4, 2), {0, 2})
    assert step.total == pytest.approx(3 * 4.0 + 0.5 + 0.25)


def test_loads_known_before_the_step_hide_whole() -> None:
    step = layers_of(Timeline(3, 0.5, 0, "batch"), ExpertCache(4, 2), {0, 2}, known=0.0)
    assert step.total == step.compute and step.late == 0


def test_known_loads_that_are_waited_for_count_as_late() -> None:
    assert layers_of(Timeline(3, 4.0, 0, "batch"), ExpertCache(4, 2), {0, 2}, known=4.0).late > 0


def test_ring_lets_the_link_run_ahead_and_a_single_slot_does_not() -> None:
    """Two streamed experts a layer: with one slot each load waits until the expert before it has run."""
    fast = layers_of(Timeline(4, 1.0, 3, "batch"), _fixed({0, 1}, 3), {0, 1, 2, 3}, known=10.0)
    slow = layers_of(Timeline(4, 1.0, 1, "batch"), _fixed({0, 1}, 1), {0, 1, 2, 3}, known=10.0)
    assert fast.total < slow.total
    assert fast.transfer == slow.transfer == 8.0


def _fixed(resident: set[int], staging: int) -> ExpertCache:
    cache = ExpertCache(4, len(resident), staging)
    assert cache.resident == resident
    return cache


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("slots", "staging"), [(0, 0), (2, 1), (2, 0), (1, 0), (1, 2)])
def test_everything_asked_for_is_served_once(policy, slots, staging) -> None:
    outcome, _ = serve(policy, slots, staging)
    asked = requests(30)
    assert sorted(s.request.id for s in outcome.served) == list(range(30))
    ran = {r.id: 0 for r in asked}
    for chunks in outcome.chunks:
        for id, start, count in chunks:
            assert start == ran[id]
            ran[id] += count
    assert all(ran[r.id] == r.prompt + r.output - 1 for r in asked)
    for served in outcome.served:
        assert served.request.arrival < served.first_token <= served.done
        assert served.produced == served.request.output


def test_steps_take_at_least_compute_and_transfer() -> None:
    outcome, cache = serve(prefetch="layer", swaps=False)
    assert cache.misses > 0
    for step in outcome.steps:
        assert step.total >= max(step.compute, step.transfer) - 1e-12


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(POLICIES), st.sampled_from(["queue", "rollout", "none"]), st.booleans())
def test_decisions_follow_from_step_times(policy, future, swaps) -> None:
    """Fed another run's step times and nothing else, every decision is made again."""
    setup = Setup(rows=8, future=future, swaps=swaps)
    cache, scheduler = ExpertCache(4, 2, 1), make_scheduler(policy, 32, MODEL.costs(), 4)
    first = simulate(requests(20), scheduler, cache, MODEL, setup)
    made = replay_decisions(requests(20), first.log, scheduler, ExpertCache(4, 2, 1), MODEL, setup)
    assert made == first.chunks


def test_other_step_times_make_other_decisions() -> None:
    first, _ = serve(swaps=False)
    late = [Logged(100.0 + i, (), (), 101.0 + i) for i in range(len(first.steps))]
    cache = ExpertCache(4, 2, 1)
    made = replay_decisions(requests(30), late, make_scheduler("decode_first", 32), cache, MODEL, Setup(rows=8))
    assert made != first.chunks


def test_prefetch_and_staging_never_slow_a_run() -> None:
    done = {}
    for staging in (0, 3):
        for prefetch in ("off", "layer", "batch"):
            outcome, _ = serve(staging=staging, prefetch=prefetch, swaps=False, future="none")
            done[staging, prefetch] = outcome.served[-1].done
    assert done[0, "off"] >= done[0, "layer"] >= done[0, "batch"]
    assert done[3, "off"] > done[3, "batch"]


def test_swaps_run_in_idle_link_time() -> None:
    swapping, _ = serve("lookahead", slots=2, staging=1, count=60)
    assert swapping.swaps > 0 and swapping.moved == sum(swapping.misses) + swapping.swaps


def test_roll_out_plays_ahead_on_copies() -> None:
    one = Sequence(1, 0.0, 2, [(0,), (0,), (1,)])
    one.computed, one.running = 2, True
    two = Sequence(2, 0.0, 3, [(2,), (2,), (3,)])
    scheduler = DecodeFirst(2)
    batch = scheduler.pick([one, two], frozenset(), 0.0, room := Room(1))
    assert [(c.sequence.id, c.count) for c in batch.chunks] == [(1, 1), (2, 1)]
    seen = list(roll_out(scheduler, [one, two], batch, frozenset(), 0.0, room, steps=3, seconds=0.1))
    assert seen[:3] == [0b0110, 0b1010, 0b1010]
    assert (one.computed, one.known, two.computed, two.known) == (2, 3, 0, 3)


def test_queue_future_is_what_the_batch_leaves() -> None:
    """Most pending tokens first; what has no row is not in the queue yet."""
    one, two, three = (Sequence(i, 0.0, 3, [(i,), (0,), (i,)]) for i in (1, 2, 3))
    two.running = True
    assert queue_future([one, two, three], Batch((Chunk(one, 0, 2),))) == [0b0100, 0b0010]


def test_requests_that_no_row_can_take_are_an_error() -> None:
    with pytest.raises(ConfigError, match="0 rows"):
        simulate(requests(1), make_scheduler("decode_first", 8), ExpertCache(4, 0), MODEL, Setup(rows=0))


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_streaming_buffer_does_not_make_long_runs_of_one_expert_slower(slots: int) -> None:
    """Requests that keep to an expert each. Of one slot a background swap would leave nothing to run but streams."""
    model = CostModel(SHAPES["llama2_7b"], DEVICES["h100"])
    asked = [Request(i, 0.0, 64, 64, ((i,),) * 128) for i in range(4)]

    def seconds(staging: int) -> float:
        scheduler = make_scheduler("lookahead", 256, model.costs(), 7)
        return max(s.done for s in simulate(asked, scheduler, ExpertCache(7, slots, staging), model).served)

    assert seconds(staging=1) < 1.05 * seconds(staging=0)
