"""Schedulers: what every policy owes its sequences, and what each promises of its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from readme_jax.errors import ConfigError
from readme_jax.serving.cost import Costs
from readme_jax.serving.lookahead import Lookahead
from readme_jax.serving.scheduler import Algorithm1, DecodeFirst, PrefillFirst, make_scheduler
from readme_jax.serving.work import Batch, Room, Sequence

EXPERTS = 5
COSTS = Costs(fixed=0.005, token=3e-5, expert=0.0015, load=0.09)
POLICIES = ("decode_first", "prefill_first", "algorithm1", "lookahead")


def sequence(id: int, routes: list[int], prompt: int = 0, arrival: float = 0.0, computed: int = 0) -> Sequence:
    made = Sequence(id, arrival, prompt or len(routes), [(e,) for e in routes])
    made.computed, made.running = computed, computed > 0
    return made


def decode(id: int, expert: int, arrival: float = 0.0) -> Sequence:
    return sequence(id, [expert] * 4, prompt=3, arrival=arrival, computed=3)


def run(batch: Batch, now: float, next_expert=lambda s: s.routes[-1][0]) -> None:
    for chunk in batch.chunks:
        chunk.sequence.running = True
        chunk.sequence.computed += chunk.count
        chunk.sequence.last_run = now
        if chunk.sequence.pending == 0:
            chunk.sequence.routes.append((next_expert(chunk.sequence),))


def taken(batch: Batch) -> list[tuple[int, int, int]]:
    return [(c.sequence.id, c.start, c.count) for c in batch.chunks]


routes = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=30)


@given(
    st.sampled_from(POLICIES),
    st.integers(1, 40),
    st.integers(0, 6),
    st.lists(st.tuples(routes, st.integers(0, 30), st.floats(0, 20)), max_size=12),
    st.sets(st.integers(0, EXPERTS - 1)),
    st.randoms(),
)
def test_every_batch_is_well_formed(policy, budget, rows, specs, resident, random) -> None:
    """Chunks are the next tokens, fit budget and room, one a sequence; the order of sequences does not matter."""
    sequences = [
        sequence(i, found, arrival=arrival, computed=min(computed, len(found) - 1))
        for i, (found, computed, arrival) in enumerate(specs)
    ]
    scheduler = make_scheduler(policy, budget, COSTS, EXPERTS)
    batch = scheduler.pick(sequences, frozenset(resident), 21.0, Room(rows))
    assert batch.tokens <= budget
    assert len({c.sequence.id for c in batch.chunks}) == len(batch.chunks)
    assert sum(not c.sequence.running for c in batch.chunks) <= rows
    for chunk in batch.chunks:
        assert chunk.start == chunk.sequence.computed and 1 <= chunk.count <= chunk.sequence.pending
        needed = {e for route in chunk.sequence.routes[chunk.start :][: chunk.count] for e in route}
        assert chunk.mask == sum(1 << e for e in needed)
    if rows or any(s.running for s in sequences):
        assert bool(batch.chunks) == bool(sequences)
    random.shuffle(sequences)
    assert taken(scheduler.pick(sequences, frozenset(resident), 21.0, Room(rows))) == taken(batch)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_drains_the_queue(policy) -> None:
    """Whatever the routes, all prompts end up computed: Algorithm 1 ends too when all its queues are empty."""
    rng = np.random.default_rng(0)
    sequences = [sequence(i, rng.integers(0, EXPERTS, 1 + 7 * i).tolist()) for i in range(10)]
    scheduler = make_scheduler(policy, 16, COSTS, EXPERTS)
    for step in range(2000):
        waiting = [s for s in sequences if s.computed < s.prompt]
        if not waiting:
            break
        batch = scheduler.pick(waiting, frozenset({0, 1}), step * 0.01, Room(3 - sum(s.running for s in waiting)))
        assert batch.tokens > 0
        run(batch, step * 0.01)
    assert not waiting
    assert scheduler.pick([], frozenset(), 0.0, Room(3)).chunks == ()


def test_decode_first_and_prefill_first_serve_one_queue_before_the_other() -> None:
    queue = [sequence(9, [0] * 6, arrival=0.5), decode(1, 0), decode(2, 1, 0.1)]
    assert taken(DecodeFirst(4).pick(queue, frozenset(), 1.0, Room(1))) == [(1, 3, 1), (2, 3, 1), (9, 0, 2)]
    assert taken(PrefillFirst(7).pick(queue, frozenset(), 1.0, Room(1))) == [(9, 0, 6), (1, 3, 1)]


def test_algorithm1_takes_the_longest_queue_whole_and_stops_where_one_does_not_fit() -> None:
    queues = [decode(1, 0), decode(2, 2), decode(3, 2), decode(4, 2), decode(5, 1), decode(6, 1)]
    assert taken(Algorithm1(5).pick(queues, frozenset(), 1.0, Room(0))) == [(i, 3, 1) for i in (2, 3, 4, 5, 6)]
    assert taken(Algorithm1(4).pick(queues, frozenset(), 1.0, Room(0))) == [(i, 3, 1) for i in (2, 3, 4, 5)]


def test_algorithm1_waits_under_the_common_expert_and_cuts_where_the_route_leaves() -> None:
    prompt = sequence(1, [3, 2, 2, 2, 4, 2])
    assert taken(Algorithm1(64).pick([prompt], frozenset(), 0.0, Room(1))) == [(1, 0, 4)]
    run(Algorithm1(64).pick([prompt], frozenset(), 0.0, Room(1)), 0.0)
    assert taken(Algorithm1(64).pick([prompt], frozenset(), 0.0, Room(1))) == [(1, 4, 2)]


def test_algorithm1_starves_a_rare_expert_and_lookahead_does_not() -> None:
    """The common expert fills the budget at every step, the rare one never fits."""
    for scheduler, starves in ((Algorithm1(4), True), (Lookahead(6, COSTS, EXPERTS, patience=1.0), False)):
        rare, common = decode(9, 1), [decode(i, 0) for i in range(4)]
        for step in range(200):
            run(scheduler.pick([*common, rare], frozenset({0}), step * 0.02, Room(0)), step * 0.02)
        assert (rare.computed == 3) is starves


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_lookahead_bounds_every_wait(data) -> None:
    """patience + (E + 1) x the longest step, while the budget covers the sequences alive and each has a row.

    Routes, step times, residents, arrivals and departures are anything.
    """
    patience, longest, alive_at_most = 1.0, 0.5, 6
    scheduler = Lookahead(alive_at_most, COSTS, EXPERTS, patience=patience)
    expert = st.integers(0, EXPERTS - 1)
    alive: list[Sequence] = []
    now, ids = 0.0, 0
    for _ in range(data.draw(st.integers(10, 60))):
        if alive and data.draw(st.booleans()) and len(alive) == alive_at_most:
            alive.pop(data.draw(st.integers(0, len(alive) - 1)))
        while len(alive) < alive_at_most and (not alive or data.draw(st.booleans())):
            alive.append(sequence(ids, data.draw(st.lists(expert, min_size=1, max_size=8)), arrival=now))
            ids += 1
        rows = alive_at_most - sum(s.running for s in alive)
        batch = scheduler.pick(alive, frozenset(data.draw(st.sets(expert))), now, Room(rows))
        for chunk in batch.chunks:
            assert now - chunk.sequence.last_run <= patience + EXPERTS * longest
        now += data.draw(st.sampled_from([0.001, 0.1, longest]))
        run(batch, now, lambda s: data.draw(expert))
        assert all(now - s.last_run <= patience + (EXPERTS + 1) * longest for s in alive)


def test_lookahead_stays_on_resident_experts_while_a_load_is_not_worth_it() -> None:
    here, away = [decode(i, 0) for i in range(8)], decode(9, 3)
    scheduler = Lookahead(64, COSTS, EXPERTS, patience=1e3)
    assert scheduler.pick([*here, away], frozenset({0, 1}), 0.01, Room(0)).experts == {0}
    away.last_run = -90.0  # waiting makes it worth its load
    assert scheduler.pick([*here, away], frozenset({0, 1}), 0.01, Room(0)).experts == {0, 3}


def test_lookahead_runs_everything_when_everything_is_resident() -> None:
    decodes = [decode(i, i % EXPERTS) for i in range(10)]
    batch = Lookahead(64, COSTS, EXPERTS).pick(decodes, frozenset(range(EXPERTS)), 0.0, Room(0))
    assert len(batch.chunks) == 10


def test_lookahead_with_all_resident_lets_prompts_go_first_until_a_decode_has_stood_still_too_long() -> None:
    decodes = [decode(i, i % EXPERTS) for i in range(20)]
    alive = [*decodes, *(sequence(100 + i, [1] * 3000) for i in range(4))]

    def ids(budget: int, now: float) -> set[int]:
        batch = Lookahead(budget, COSTS, EXPERTS, stall=0.1).pick(alive, frozenset(range(EXPERTS)), now, Room(4))
        assert batch.tokens == min(budget, 12_020)
        return {c.sequence.id for c in batch.chunks}

    assert ids(6000, 0.05) == {100, 101}, "whole prompts, no decode beside them"
    assert ids(6000, 0.1) == {*range(20), 100, 101}
    assert ids(20_000, 0.05) == {*range(20), *range(100, 104)}, "the budget has room for all"


def test_lookahead_with_many_missing_experts_considers_nested_sets() -> None:
    decodes = [sequence(i, [i, i], prompt=1, computed=1) for i in range(12)]
    batch = Lookahead(64, COSTS, 12).pick(decodes, frozenset({0}), 0.0, Room(0))
    assert 0 in batch.experts


@pytest.mark.parametrize("policy", ["decode_first", "algorithm1", "lookahead"])
def test_top_two_routes_count_all_experts_of_a_token(policy) -> None:
    twice = Sequence(1, 0.0, 3, [(0, 1), (0, 1), (1, 2)])
    scheduler = make_scheduler(policy, 64, COSTS, 3)
    seen = set()
    while twice.computed < 3:
        batch = scheduler.pick([twice], frozenset({0, 1}), 0.0, Room(1))
        run(batch, 0.0, lambda s: 0)
        seen |= batch.experts
    assert seen == {0, 1, 2}


def test_room_counts_rows_and_pages() -> None:
    room = Room(rows=2, pages=5, page_size=4)
    assert room.admit(sequence(1, [0] * 9)) and not room.admit(sequence(2, [0] * 9))
    assert room.admit(sequence(3, [0] * 8)) and not room.admit(sequence(4, [0]))
    assert room.admit(decode(5, 0))  # holds a row already


def test_preempted_sequence_is_prefilled_with_its_own_output() -> None:
    preempted = sequence(1, [0, 1, 2, 2, 1], prompt=2, computed=4)
    assert preempted.decoding and preempted.first_use(1) == 4
    preempted.computed, preempted.running = 0, False
    assert not preempted.decoding and preempted.first_use(1) == 1
    assert taken(DecodeFirst(64).pick([preempted], frozenset(), 0.0, Room(1))) == [(1, 0, 5)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("fifo", 64), "fifo"), (("algorithm1", 0), "budget = 0"), (("lookahead", 64), "costs")],
)
def test_bad_settings_name_themselves(arguments, says) -> None:
    with pytest.raises(ConfigError, match=says):
        make_scheduler(*arguments)
