"""From a batch to jitted calls and back: chunks cut to what is compiled and what fits, rows grouped, results read.

# B rows of a decode call, C tokens of a prefill call, Kx experts a token
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from readme_jax.serving.live import Live
from readme_jax.serving.prefill import Scores
from readme_jax.serving.programs import Programs, Routed
from readme_jax.serving.request import TokenLogprob
from readme_jax.serving.residency import Residency
from readme_jax.serving.rows import Placement
from readme_jax.serving.sampling import Samplings
from readme_jax.serving.work import Batch, Chunk, Route, experts_in

DENSE: Route = (0,)  # what policies see of a token of a model without experts
GREEDY = (0.0, 0, 1.0, 0.0, 0)


class Piece(NamedTuple):
    """Tokens of a chunk that run in one call, with all their experts."""

    live: Live
    start: int
    stop: int
    experts: frozenset[int]


@dataclass
class Call:
    """A call in flight. `rows`: (index in `sampled`, sequence, its epoch) of each that it runs.

    `sampled` is None for a prefill that does not reach its sequence's end. `missed`: indices known not to have run.
    `echo`: scores of a prompt's tokens from `start` on, `count` of them.
    """

    rows: list[tuple[int, Live, int]]
    sampled: Any
    experts: frozenset[int]
    missed: set[int] = field(default_factory=set)
    echo: Scores | None = None
    start: int = 0
    count: int = 0

    def __post_init__(self) -> None:
        self._of = {live.id: (index, epoch) for index, live, epoch in self.rows} if self.sampled is not None else {}

    def lacks(self, live: Live, route: Route) -> bool:
        """Whether this call, dispatched on a guess, cannot run a sequence's token with `route`; remembered if so."""
        index, epoch = self._of.get(live.id, (-1, -1))
        if epoch != live.epoch or self.experts.issuperset(route):
            return False
        self.missed.add(index)
        return True


class Read(NamedTuple):
    """A call's results on the host; logprobs are None where nobody wants them."""

    tokens: np.ndarray
    experts: np.ndarray
    missing: np.ndarray
    logprob: np.ndarray | None
    top_tokens: np.ndarray | None
    top_logprobs: np.ndarray | None

    def row(self, index: int, alternatives: int | None) -> tuple[int, Route, TokenLogprob | None]:
        """Token, route and, where wanted, log-probability of a row."""
        token = int(self.tokens[index])
        route = tuple(self.experts[index].tolist())
        if alternatives is None or self.logprob is None:
            return token, route, None
        assert self.top_tokens is not None and self.top_logprobs is not None
        top = _top(self.top_tokens[index], self.top_logprobs[index], alternatives)
        return token, route, TokenLogprob(token, float(self.logprob[index]), top)


class Caller:
    """The programs with their state, and how each row samples. `seconds` counts time inside calls and reads."""

    def __init__(self, programs: Programs, residency: Residency) -> None:
        self.programs, self.residency = programs, residency
        self.limits = programs.limits
        self.dense = residency.store.num_experts == 0
        self.seconds = 0.0
        self.reset()

    def reset(self) -> None:
        """An empty cache."""
        self.state = self.programs.new_state()
        self._samplings = Samplings.of([GREEDY] * self.limits.rows)
        self._routed: dict[int, Routed] = {}

    @property
    def resident(self) -> frozenset[int]:
        """Experts on the device, as the scheduler sees them."""
        return frozenset(DENSE) if self.dense else self.residency.resident

    # --- rows ----------------------------------------------------------------------------------------------------

    def route(self, live: Live, keep: bool) -> None:
        """Route all known tokens of a sequence; `keep` the router's cache on the device until it gets a row."""
        routed = self.programs.route(live.tokens)
        if self.dense:
            live.routes.extend([DENSE] * (len(live.tokens) - len(live.routes)))
        live.route_prompt(routed.experts, routed.weights)
        if keep:
            self._routed[live.id] = routed

    def forget(self, live: Live) -> None:
        """Free what `route` kept."""
        self._routed.pop(live.id, None)

    def place(self, live: Live, placement: Placement, shared: int) -> None:
        """Put a sequence into a row: `shared` tokens from another one, and the router's cache of all of them."""
        if live.id not in self._routed:
            self.route(live, keep=True)
        if placement.source != placement.row and shared:
            self.state = self.programs.copy_row(self.state, placement.source, placement.row, shared)
        self.state = self.programs.insert(self.state, placement.row, self._routed.pop(live.id))
        self._sampling(placement.row, live.sampling)

    def move(self, live: Live, source: int, target: int) -> None:
        """Move a running sequence to another row, with the router's cache of tokens that have not run yet."""
        self.state = self.programs.copy_row(self.state, source, target, live.known)
        self._sampling(target, live.sampling)

    def _sampling(self, row: int, values: tuple[float, int, float, float, int]) -> None:
        """New arrays each time: a call in flight may still read the old ones."""
        new = Samplings.of([values])
        arrays = []
        for old, value in zip(self._samplings, new, strict=True):
            changed = np.array(old)
            changed[row] = value[0]
            arrays.append(changed)
        self._samplings = Samplings(*arrays)

    # --- running -------------------------------------------------------------------------------------------------

    def run(self, batch: Batch, ahead: bool) -> list[Call]:
        """Dispatch a batch: its prefill pieces and decode rows, in groups whose experts fit on the device at once."""
        decodes = [c for c in batch.chunks if self._decodes(c)]
        pieces = [p for c in batch.chunks if not self._decodes(c) for p in self._cut(c)]
        needs = [experts_in(c.mask) for c in decodes]
        needed = frozenset().union(*needs, *(p.experts for p in pieces))
        calls = []
        whole = len(needed) <= self.residency.capacity
        if whole:
            self._bring(needed, frozenset())
        groups = [list(range(len(decodes)))] if whole else self.residency.groups(needs)
        for number, group in enumerate(groups):
            if group:
                later = frozenset().union(*(needs[i] for g in groups[number + 1 :] for i in g))
                later = later.union(*(p.experts for p in pieces))
                calls.append(self._decode([decodes[i] for i in group], later, ahead))
        for number, piece in enumerate(pieces):
            later = frozenset().union(*(p.experts for p in pieces[number + 1 :]))
            calls.append(self._prefill(piece, later, ahead))
        return calls

    @staticmethod
    def _decodes(chunk: Chunk) -> bool:
        assert isinstance(chunk.sequence, Live)
        return chunk.count == 1 and chunk.sequence.primed

    def _cut(self, chunk: Chunk) -> list[Piece]:
        """A prefill chunk in pieces: each within the longest compiled call, its experts within the device's room."""
        live = chunk.sequence
        assert isinstance(live, Live)
        pieces, start, end = [], chunk.start, chunk.start + chunk.count
        while start < end:
            stop = min(end, start + self.limits.chunks[-1])
            experts = experts_in(live.mask(start, stop - start))
            if len(experts) > self.residency.capacity:
                stop, experts = self._within(live, start, stop)
            pieces.append(Piece(live, start, stop, experts))
            start = stop
        return pieces

    def _within(self, live: Live, start: int, stop: int) -> tuple[int, frozenset[int]]:
        """How far tokens from `start` get with as many experts as fit."""
        experts = frozenset[int]()
        for at in range(start, stop):
            more = experts.union(live.routes[at])
            if len(more) > self.residency.capacity:
                return at, experts
            experts = more
        return stop, experts

    def _bring(self, experts: frozenset[int], later: frozenset[int]) -> None:
        if not self.dense:
            self.residency.bring(experts, later, self.state.token)

    def _given(self, experts: frozenset[int], spare: frozenset[int] = frozenset()) -> tuple[int, ...]:
        """The experts of a call, in order; places that padding would fill go to `spare` ones on the device."""
        if self.dense:
            return ()
        order = sorted(experts)
        places = len(self.residency.store.padded(order)) - len(order)
        return (*order, *sorted(spare - experts)[:places])

    def _decode(self, chunks: Sequence[Chunk], later: frozenset[int], ahead: bool) -> Call:
        needed = frozenset().union(*(experts_in(c.mask) for c in chunks))
        self._bring(needed, later)
        given = self._given(needed, self.residency.here)
        lives = [c.sequence for c in chunks]
        assert all(isinstance(s, Live) for s in lives)
        rows = max(s.row for s in lives) + 1  # type: ignore[attr-defined]
        size = next(b for b in self.limits.decode if b >= rows)
        active = np.zeros(size, bool)
        active[[s.row for s in lives]] = True  # type: ignore[attr-defined]
        sampling = Samplings(*(a[:size] for a in self._samplings))
        began = time.perf_counter()
        present = self.residency.store.present(given)
        self.state, sampled = self.programs.decode(self.state, active, given, present, sampling)
        self.seconds += time.perf_counter() - began
        call = Call([(s.row, s, s.epoch) for s in lives], sampled, frozenset(given))  # type: ignore[attr-defined,misc]
        for live in lives:
            live.dispatched(ahead)  # type: ignore[attr-defined]
        return call

    def _prefill(self, piece: Piece, later: frozenset[int], ahead: bool) -> Call:
        live, start, stop, _ = piece
        count = stop - start
        self._bring(piece.experts, later)
        given = self._given(piece.experts)
        last = stop == len(live.tokens)
        tokens = np.asarray(live.tokens[start:stop], np.int32)
        targets = np.asarray((live.tokens[start + 1 : stop + 1] + [0])[:count], np.int32)
        assert live.weights is not None
        width = live.weights.shape[1]
        routes = np.asarray([r[:width] for r in live.routes[start:stop]], np.int32).reshape(count, width)
        row = live.row
        began = time.perf_counter()
        present = self.residency.store.present(given)
        self.state, sampled, scores = self.programs.prefill(
            self.state,
            row,
            tokens,
            start,
            routes,
            live.weights[start:stop],
            given,
            present,
            sampling=Samplings(*(a[row : row + 1] for a in self._samplings)),
            last=last,
            targets=targets if live.wants_prompt else None,
        )
        self.seconds += time.perf_counter() - began
        if last:
            live.dispatched(ahead)
        echo = scores if live.wants_prompt else None
        return Call([(0, live, live.epoch)], sampled, piece.experts, set(), echo, start, count)

    # --- reading -------------------------------------------------------------------------------------------------

    def read(self, call: Call) -> Read | None:
        """Wait for a call and bring what it sampled to the host; None where it sampled nothing."""
        if call.sampled is None:
            return None
        began = time.perf_counter()
        s = call.sampled
        scored = any(live.params.logprobs is not None for _, live, _ in call.rows)
        more = [np.asarray(a) for a in (s.logprob, s.top_tokens, s.top_logprobs)] if scored else [None] * 3
        read = Read(np.asarray(s.tokens), np.asarray(s.experts), np.asarray(s.missing), *more)
        self.seconds += time.perf_counter() - began
        return read

    def echoed(self, live: Live, call: Call) -> list[TokenLogprob]:
        """Log-probabilities of the prompt's tokens that a scored prefill call ran or predicted."""
        assert call.echo is not None
        began = time.perf_counter()
        logprob, tokens, logprobs = (np.asarray(a) for a in call.echo)
        self.seconds += time.perf_counter() - began
        wanted = live.params.logprobs or 0
        first = [TokenLogprob(live.tokens[0], None, ())] if call.start == 0 else []
        count = min(call.count, live.prompt - 1 - call.start)
        return first + [
            TokenLogprob(live.tokens[call.start + i + 1], float(logprob[i]), _top(tokens[i], logprobs[i], wanted))
            for i in range(count)
        ]


def _top(tokens: np.ndarray, logprobs: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    pairs = zip(tokens[:count].tolist(), logprobs[:count].tolist(), strict=True)
    return tuple((int(t), float(p)) for t, p in pairs if p > -np.inf)
