"""A step's calls span by span: in which order experts come and go, and which loads count as late."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from readme_jax.serving.expert_cache import ExpertCache
from readme_jax.serving.flight import Planned
from readme_jax.serving.residency import Moves, Residency
from readme_jax.serving.streams import Streams

SPANS = 3


class Told:
    """A store and a call in one that write down what they are told, and are done with it when `ended` says so."""

    num_experts, slots, staging, resident = 4, 2, 1, False
    spans = tuple(slice(i, i + 1) for i in range(SPANS))

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.here: set[Any] = set()  # what has arrived or ended
        self.calls = 0
        self.left: dict[int, Any] = {}  # what each span was last used by

    def clear(self) -> None:
        self.log.append("clear")

    def load(self, span: int, expert: int) -> None:
        self.log.append(("load", span, expert))

    def drop(self, span: int, expert: int) -> None:
        self.log.append(("drop", span, expert))

    def used(self, span: int, done: Any) -> None:
        self.left[span] = done

    @property
    def fence(self) -> int | None:
        """The place longest free was left by the call before the last one."""
        return self.calls - 2 if self.calls > 1 else None

    def arrays(self, span: int, expert: int) -> Any:
        return (span, expert)

    def present(self, experts: Any, span: int | None = None) -> Any:
        return (span, tuple(experts))

    def ready(self, what: Any) -> bool:
        return what is None or what in self.here

    def wait(self, what: Any) -> None:
        if what is not None:
            self.log.append(("wait", what))

    def padded(self, experts: Any) -> Any:
        return tuple(experts)

    def run(self, state: Any, span: int, given: Any) -> Any:
        self.done = self.calls
        self.calls += 1
        self.log.append(("run", *given))
        return state

    def whole(self, state: Any, given: Any) -> Any:
        return self.run(state, *given[:1], given)

    def finish(self, state: Any) -> Any:
        self.log.append("finish")
        return state


def made(prefetch: bool = True, **options: Any) -> tuple[Streams, Told]:
    told: Any = Told()
    residency: Residency = Residency(told, ExpertCache(4, 2, 1), prefetch, **options)
    streams = Streams(residency, clock=lambda: told.now)
    told.now = 0.0
    assert told.log == ["clear", *(("load", span, expert) for span in range(SPANS) for expert in (0, 1))]
    told.log = []
    return streams, told


def step(streams: Streams, told: Any, *calls: frozenset[int], future: tuple[int, ...] = ()) -> None:
    list(dispatched(streams, told, *calls, future=future))


def dispatched(streams: Streams, told: Any, *calls: frozenset[int], future: tuple[int, ...] = ()) -> Any:
    residency = streams.residency
    residency.decide(frozenset().union(*calls), future)
    planned = [Planned([], None, tuple(sorted(c)), residency.bring(c)) for c in calls]
    state: Any = SimpleNamespace()
    return streams.run(state, [told] * len(calls), planned, residency.settle())


def test_calls_go_through_a_span_before_the_next_and_loads_follow_the_call_before() -> None:
    streams, told = made()
    step(streams, told, frozenset({0, 2}), frozenset({3}), future=(0b0011,))
    span = [
        [("load", i, 2), ("run", i, (0, 2)), ("drop", i, 2), ("load", i, 3), ("run", i, (3,)), ("drop", i, 3)]
        for i in range(SPANS)
    ]
    assert [each for each in told.log if each[0] != "wait"] == [*span[0], *span[1], *span[2], "finish", "finish"]


def test_on_demand_a_load_waits_for_the_call_before_and_its_call_for_the_load() -> None:
    streams, told = made(prefetch=False)
    step(streams, told, frozenset({2}), future=(0b0011,))
    assert told.log[:6] == [
        ("load", 0, 2), ("wait", (0, (2,))), ("run", 0, (2,)), ("drop", 0, 2), ("wait", 0), ("load", 1, 2)
    ]  # fmt: skip


def test_a_step_without_loads_runs_call_by_call_and_waits_for_nothing() -> None:
    streams, told = made()
    assert list(dispatched(streams, told, frozenset({0, 1}), frozenset({1}))) == []
    assert told.log == [("run", None, (0, 1)), ("run", None, (1,))]
    assert told.left == {span: 1 for span in range(SPANS)}, "every span's places wait for the last call"


def test_on_demand_every_step_goes_through_the_spans() -> None:
    """Steps that are not dispatched ahead take longer as one call (docs/performance.md)."""
    streams, told = made(prefetch=False)
    step(streams, told, frozenset({0, 1}))
    assert told.log == [*(("run", i, (0, 1)) for i in range(SPANS)), "finish"]


def test_a_step_that_only_drops_goes_through_the_spans() -> None:
    """What one step brought in passing leaves with the next, whose calls need no load."""
    streams, told = made()
    residency = streams.residency
    planned = [Planned([], None, (0,), residency.bring(frozenset({0})))]
    list(streams.run(SimpleNamespace(), [told], planned, Moves(drop=(1,))))  # type: ignore[arg-type]
    assert told.log == [each for i in range(SPANS) for each in (("run", i, (0,)), ("drop", i, 1))] + ["finish"]


def test_a_step_pauses_before_it_waits_for_a_call_of_its_own() -> None:
    """There is room for two spans: the third one's load waits for the first call."""
    streams, told = made()
    rest = dispatched(streams, told, frozenset({2}), future=(0b0011,))
    next(rest)
    assert [each for each in told.log if each[0] == "run"] == [("run", 0, (2,)), ("run", 1, (2,))]
    assert ("load", 1, 2) in told.log and ("wait", 0) not in told.log
    assert list(rest) == []
    assert told.log[-4:] == [("load", 2, 2), ("run", 2, (2,)), ("drop", 2, 2), "finish"] and ("wait", 0) in told.log


def test_after_an_error_the_residents_are_there_again() -> None:
    streams, told = made()
    streams.residency.held = frozenset({3})
    told.log = []
    streams.restore()
    assert told.log[0] == "clear" and len(told.log) == 1 + 2 * SPANS
    assert streams.residency.held == {0, 1}


@pytest.mark.parametrize(
    ("seconds", "arrived", "foreseen", "late"),
    [
        (0.2, False, 1, 1),  # decided on two load times before, and still on its way
        (0.2, True, 1, 0),  # in time
        (0.05, False, 0, 0),  # needed before a load could have arrived: nobody's fault
    ],
)
def test_a_load_known_a_load_time_ahead_that_has_not_arrived_is_late(seconds, arrived, foreseen, late) -> None:
    """Each span's load takes a third of the expert's. That of the first span is due with the step before, which there
    is none of here; that of the second when the first call has ended, and so on."""
    streams, told = made(load_seconds=0.3)
    step(streams, told, frozenset({2}), future=(0b0011,))
    streams.look()
    assert (streams.foreseen, streams.late) == (0, 0), "needed at once, and the first call has not ended"
    told.now = seconds
    told.here |= {0} | ({(1, 2)} if arrived else set())
    streams.look()
    assert (streams.foreseen, streams.late) == (foreseen, late)
    streams.look()
    assert (streams.foreseen, streams.late) == (foreseen, late), "each load counts once"
