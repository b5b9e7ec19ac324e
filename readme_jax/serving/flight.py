"""What is dispatched and not yet read, and how a batch becomes calls: alike in engine and simulation. Pure Python.

A step may be dispatched before the last one is read. Its sequences then count as one token longer, with a route that
repeats the last one's; reading puts that right. Where the guess was wrong and the call lacks the expert, the call has
reported the row as missing without computing anything, and the token runs again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Generic, NamedTuple, TypeVar

from readme_jax.serving.residency import Moves, Residency
from readme_jax.serving.work import Batch, Chunk, Route, experts_in
from readme_jax.serving.work import Sequence as Work

DENSE: Route = (0,)  # what policies see of a token of a model without experts


class Flying(Work):
    """A sequence that steps in flight extend; its `routes` and `computed` include them.

    Attributes, beside those of `Sequence`:
        limit: most new tokens.
        settled: tokens that are known: the prompt and what was sampled and read.
        primed: whether its last token, position and experts are on the device, so that it can decode.
        ahead: steps in flight that will sample a token for it.
        epoch: goes up when it is preempted: what is in flight from before does not count.
    """

    __slots__ = ("ahead", "epoch", "limit", "primed", "settled")

    def __init__(self, id: int, arrival: float, prompt: int, routes: Iterable[Route], limit: int) -> None:
        super().__init__(id, arrival, prompt, routes)
        self.limit, self.settled = limit, prompt
        self.primed = False
        self.ahead, self.epoch = 0, 0

    @property
    def generated(self) -> int:
        """New tokens that are known."""
        return self.settled - self.prompt

    @property
    def written(self) -> int:
        """Tokens whose keys are known to be written, without steps in flight that may yet report the row missing."""
        return min(self.computed, self.settled)

    def dispatched(self, guess: bool) -> None:
        """A step that samples its next token is under way. With `guess` the token after that may be scheduled."""
        self.primed = True
        self.ahead += 1
        if guess and self.generated + self.ahead < self.limit:
            self.routes.append(self.routes[-1])

    def settle(self, route: Route) -> None:
        """The oldest step in flight was read: it sampled a token whose experts are `route`."""
        self.ahead -= 1
        at = self.settled
        guessed = max(len(self.routes) - at, 1)
        del self.routes[at:]
        self.routes.extend([route] * guessed)
        self.settled += 1
        self._forget(at)

    def missed(self) -> None:
        """The step in flight after the one just read does not compute this row: its token is to run again."""
        self.ahead -= 1
        self.computed -= 1
        del self.routes[self.settled :]
        self._forget(self.settled)

    def preempted(self) -> None:
        """Row and pages are gone: everything known is prefilled again, what is in flight is sampled again."""
        self.running, self.primed = False, False
        self.computed, self.ahead = 0, 0
        self.epoch += 1
        del self.routes[self.settled :]
        self._forget(0)

    def _forget(self, known: int) -> None:
        """Routes from index `known` on have changed or gone: so must what `Sequence` keeps of them."""
        self._seen = min(self._seen, known)
        self._first.clear()


S = TypeVar("S", bound=Flying)


@dataclass
class Call(Generic[S]):
    """A call in flight. `rows`: (index in `sampled`, sequence, its epoch) of each that it runs.

    `sampled` is None for a prefill that does not reach its sequence's end. `experts` it was given. `missed`: indices
    known not to have run. `echo`: scores of a prompt's tokens from `start` on, `count` of them.
    """

    rows: list[tuple[int, S, int]]
    sampled: Any
    experts: frozenset[int]
    missed: set[int] = field(default_factory=set)
    echo: Any = None
    start: int = 0
    count: int = 0

    def __post_init__(self) -> None:
        self._of = {live.id: (index, epoch) for index, live, epoch in self.rows} if self.sampled is not None else {}

    def lacks(self, live: Flying, route: Route) -> bool:
        """Whether this call, dispatched on a guess, cannot run a sequence's token with `route`; remembered if so."""
        index, epoch = self._of.get(live.id, (-1, -1))
        if epoch != live.epoch or self.experts.issuperset(route):
            return False
        self.missed.add(index)
        return True


class Piece(NamedTuple):
    """Tokens of a chunk that run in one call, with all their experts."""

    live: Any
    start: int
    stop: int
    experts: frozenset[int]


class Planned(NamedTuple):
    """A call to make: one decode step of `decodes`, or a `piece` of a prompt; with the experts it is `given`, after
    `moves` in each span."""

    decodes: list[Chunk]
    piece: Piece | None
    given: tuple[int, ...]
    moves: Moves


def plan_calls(batch: Batch, residency: Residency, longest: int) -> tuple[list[Planned], Moves]:
    """The calls of a batch, one after another in each span: the decode rows in groups whose experts fit on the device
    at once, then prompts in pieces of at most `longest` tokens. Also the moves after the last one."""
    decodes = [c for c in batch.chunks if _decodes(c)]
    prompts = [c for c in batch.chunks if not _decodes(c)]
    rest = [(c.sequence, c.start, c.start + c.count) for c in prompts]
    calls = []
    while decodes:
        needs = [experts_in(c.mask) for c in decodes]
        group = residency.group(needs)
        experts = frozenset[int]().union(*(needs[i] for i in group))
        left = [i for i in range(len(decodes)) if i not in group]
        soon = sorted(frozenset[int]().union(*(needs[i] for i in left)))
        moves = residency.bring(experts, chain(soon, _in_order(*rest)))
        calls.append(Planned([decodes[i] for i in group], None, _given(residency, experts, residency.here), moves))
        decodes = [decodes[i] for i in left]
    for number, chunk in enumerate(prompts):
        start, end = chunk.start, chunk.start + chunk.count
        while start < end:
            piece = _cut(chunk.sequence, start, min(end, start + longest), residency)
            start = piece.stop
            moves = residency.bring(piece.experts, _in_order((chunk.sequence, start, end), *rest[number + 1 :]))
            calls.append(Planned([], piece, _given(residency, piece.experts), moves))
    return calls, residency.settle()


def _decodes(chunk: Chunk) -> bool:
    assert isinstance(chunk.sequence, Flying)
    return chunk.count == 1 and chunk.sequence.primed


def _in_order(*tokens: tuple[Work, int, int]) -> Iterator[int]:
    """The experts of tokens start .. stop of each sequence in turn, those first that are used first; worked out as they
    are asked for, which is only where something streams."""
    for sequence, start, stop in tokens:
        masks = sequence.masks[start:stop]
        first = {e: int((masks >> e & 1).argmax()) for e in experts_in(sequence.mask(start, stop - start))}
        yield from sorted(first, key=first.__getitem__)


def _cut(sequence: Work, start: int, stop: int, residency: Residency) -> Piece:
    """A piece of a prompt from `start` on: up to `stop`, or as far as its experts fit on the device at once.

    Residents give way: were they to stay, a prompt that goes back and forth between others would be cut, and wait for a
    load, at every turn.
    """
    experts = experts_in(sequence.mask(start, stop - start))
    if not residency.fit(experts, stay=False):
        experts = frozenset(sequence.routes[start])
        at = start + 1
        while at < stop and residency.fit(experts.union(sequence.routes[at]), stay=False):
            experts = experts.union(sequence.routes[at])
            at += 1
        stop = at
    return Piece(sequence, start, stop, experts)


def _given(residency: Residency, experts: frozenset[int], spare: frozenset[int] = frozenset()) -> tuple[int, ...]:
    """The experts of a call, in order; places that padding would fill go to `spare` ones on the device."""
    if not residency.store.num_experts:
        return ()
    order = sorted(experts)
    places = len(residency.store.padded(order))
    for expert in sorted(spare - experts):
        if len(order) == places:
            break
        if len(residency.store.padded([*order, expert])) == places:
            order.append(expert)
    return tuple(order)
