"""A step's calls through the layers, span by span, while the experts of the next span arrive; where none comes or goes,
call by call, but on demand.

Where experts stream, all calls of a step go through one span before the next. A call's loads begin when the call before
it has been dispatched, into places that earlier calls have left. So one span runs while the experts of the next one
travel, and a place is never in use twice.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

from readme_jax.serving.flight import Planned
from readme_jax.serving.passes import Pass
from readme_jax.serving.residency import Moves, Residency
from readme_jax.serving.state import State
from readme_jax.serving.store import ExpertStore


class Coming(NamedTuple):
    """Copies on their way to a call, each expert's arrays; `before`: a result of the call before it; when the load was
    decided on."""

    experts: list[Any]
    before: Any
    since: float


class Streams:
    """Follows a residency's moves on its store.

    A load that was decided on at least the load's time before its call could begin, because the call before it had
    ended, and has not arrived by then, is `late`, out of those `foreseen` as long. Routes are exact, so no load is ever
    wrong. Both are counted where the host notices that a call has ended, and only where loads are ahead of need.
    """

    def __init__(self, residency: Residency[ExpertStore], clock: Callable[[], float] = time.perf_counter) -> None:
        self.residency, self.clock = residency, clock
        self.foreseen = self.late = 0
        self._last: Any = None  # a result of the last call
        self._coming: deque[Coming] = deque()
        self._own: list[Any] = []  # results of the calls of this step so far
        self.restore()

    def restore(self) -> None:
        """Have the policy's residents on the device and nothing else, as at the start."""
        store, resident = self.residency.store, self.residency.resident
        self._last = None
        self._coming.clear()
        if self.residency.cache is not None:
            store.clear()
            for span in range(len(store.spans)):
                for expert in sorted(resident):
                    store.load(span, expert)
        self.residency.held = resident

    def run(
        self, state: State, passes: Sequence[Pass], calls: Sequence[Planned], after: Moves
    ) -> Generator[None, None, State]:
        """Dispatch a step's calls, each with the experts that it is given; returns the state. Uses `state` up.

        Yields before each wait for a call of this step: all of the step before has run by then, or soon will have.
        """
        store = self.residency.store
        if self.residency.cache is None or (self.residency.prefetch and not _any_moves(calls, after)):
            return self._still(state, passes, calls)
        decided, self._own = self.clock(), []
        for span in range(len(store.spans)):
            for each, call in zip(passes, calls, strict=True):
                yield from self._move(span, call.moves, decided)
                state = each.run(state, span, store.present(call.given, span))
                self._last = each.done
                self._own.append(each.done)
                store.used(span, each.done)
            yield from self._move(span, after)
        for each in passes:
            state = each.finish(state)
        return state

    def _still(self, state: State, passes: Sequence[Pass], calls: Sequence[Planned]) -> State:
        """See `run`, of a step that neither drops nor loads."""
        store = self.residency.store
        for each, call in zip(passes, calls, strict=True):
            state = each.whole(state, store.present(call.given))
            self._last = each.done
            for span in range(len(store.spans)):
                store.used(span, each.done)
        return state

    def _move(self, span: int, moves: Moves, decided: float | None = None) -> Iterator[None]:
        """Drop experts and begin loads; those that were `decided` on for a call are watched, or waited for."""
        store = self.residency.store
        for expert in moves.drop:
            store.drop(span, expert)
        if not moves.load:
            return
        if not self.residency.prefetch:
            if self._own:
                yield
            store.wait(self._last)
        for expert in moves.load:
            fence = store.fence
            if any(fence is done for done in self._own):
                yield
            store.wait(fence)
            self.look()
            store.load(span, expert)
        if not self.residency.prefetch:
            store.wait(store.present(moves.load, span))
        elif decided is not None:
            self._coming.append(Coming([store.arrays(span, e) for e in moves.load], self._last, decided))

    def look(self) -> None:
        """Count the loads of calls that may have begun by now."""
        store, seconds = self.residency.store, self.residency.load_seconds
        while self._coming and store.ready(self._coming[0].before):
            experts, _, since = self._coming.popleft()
            if seconds is not None and self.clock() - since >= seconds / len(store.spans):
                self.foreseen += len(experts)
                self.late += sum(not store.ready(arrays) for arrays in experts)


def _any_moves(calls: Sequence[Planned], after: Moves) -> bool:
    """Whether a step drops or loads an expert."""
    return any(moves.drop or moves.load for moves in (*(call.moves for call in calls), after))
