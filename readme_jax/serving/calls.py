"""The jitted calls of a batch, as `flight.plan_calls` cuts it, and their results on the host.

# B rows of a decode call, C tokens of a prefill call, Kx experts a token
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import NamedTuple

import numpy as np

from readme_jax.serving.flight import DENSE, Call, Piece, Planned, plan_calls
from readme_jax.serving.live import Live
from readme_jax.serving.passes import Pass
from readme_jax.serving.programs import Programs, Routed
from readme_jax.serving.request import TokenLogprob
from readme_jax.serving.residency import Residency
from readme_jax.serving.rows import Placement
from readme_jax.serving.sampling import Samplings
from readme_jax.serving.state import State
from readme_jax.serving.store import ExpertStore
from readme_jax.serving.streams import Streams
from readme_jax.serving.work import Batch, Route, Sequence

GREEDY = (0.0, 0, 1.0, 0.0, 0)


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
        assert not self.missing[index]
        token = int(self.tokens[index])
        route = tuple(self.experts[index].tolist())
        if alternatives is None or self.logprob is None:
            return token, route, None
        assert self.top_tokens is not None and self.top_logprobs is not None
        top = _top(self.top_tokens[index], self.top_logprobs[index], alternatives)
        return token, route, TokenLogprob(token, float(self.logprob[index]), top)


class Caller:
    """The programs with their state, and how each row samples. `seconds` counts time inside calls and reads."""

    def __init__(self, programs: Programs, residency: Residency[ExpertStore]) -> None:
        self.programs, self.residency = programs, residency
        self.limits = programs.limits
        self.dense = residency.store.num_experts == 0
        self.streams = Streams(residency)
        self.seconds = 0.0
        self.empty()

    def reset(self) -> None:
        """As at the start, after an error in a step."""
        self.empty()
        self.streams.restore()

    def empty(self) -> None:
        """An empty cache, whose memory is that of the one before: there may be no room for two."""
        self._rest: Generator[None, None, State] | None = None
        vars(self).pop("state", None)
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

    def run(self, batch: Batch, ahead: bool) -> list[Call[Live]]:
        """Dispatch a batch, as far as that needs no waiting for its own calls: `proceed` does the rest."""
        planned, after = plan_calls(batch, self.residency, self.limits.chunks[-1])
        passes = [self._decode(p) if p.piece is None else self._prefill(p.piece, p.given) for p in planned]
        self._rest = self.streams.run(self.state, passes, planned, after)
        self._dispatch()
        return [self._call(p, each, ahead) for p, each in zip(planned, passes, strict=True)]

    def proceed(self) -> None:
        """Dispatch what `run` has left."""
        while self._rest is not None:
            self._dispatch()

    def _dispatch(self) -> None:
        assert self._rest is not None
        began = time.perf_counter()
        try:
            next(self._rest)
        except StopIteration as end:
            self.state, self._rest = end.value, None
        self.seconds += time.perf_counter() - began

    def _decode(self, planned: Planned) -> Pass:
        rows = [_live(c.sequence).row for c in planned.decodes]
        size = next(b for b in self.limits.decode if b > max(rows))
        active = np.zeros(size, bool)
        active[rows] = True
        began = time.perf_counter()
        made = self.programs.decode_pass(active, planned.given, Samplings(*(a[:size] for a in self._samplings)))
        self.seconds += time.perf_counter() - began
        return made

    def _prefill(self, piece: Piece, given: tuple[int, ...]) -> Pass:
        live, start, stop = _live(piece.live), piece.start, piece.stop
        count = stop - start
        targets = np.asarray((live.tokens[start + 1 : stop + 1] + [0])[:count], np.int32)
        assert live.weights is not None
        width = live.weights.shape[1]
        routes = np.asarray([r[:width] for r in live.routes[start:stop]], np.int32).reshape(count, width)
        return self.programs.prefill_pass(
            live.row,
            np.asarray(live.tokens[start:stop], np.int32),
            start,
            routes,
            live.weights[start:stop],
            given,
            sampling=Samplings(*(a[live.row : live.row + 1] for a in self._samplings)),
            last=stop == len(live.tokens),
            targets=targets if live.wants_prompt else None,
        )

    def _call(self, planned: Planned, ran: Pass, ahead: bool) -> Call[Live]:
        """What is in flight of a planned call."""
        piece = planned.piece
        if piece is None:
            lives = [_live(c.sequence) for c in planned.decodes]
            call = Call([(s.row, s, s.epoch) for s in lives], ran, frozenset(planned.given))
        else:
            live = _live(piece.live)
            lives = [live] if piece.stop == len(live.tokens) else []
            about = (set[int](), ran if live.wants_prompt else None, piece.start, piece.stop - piece.start)
            call = Call([(0, live, live.epoch)], ran if lives else None, piece.experts, *about)
        for live in lives:
            live.dispatched(ahead)
        return call

    # --- reading -------------------------------------------------------------------------------------------------

    def read(self, call: Call[Live]) -> Read | None:
        """Wait for a call and bring what it sampled to the host; None where it sampled nothing."""
        if call.sampled is None:
            return None
        began = time.perf_counter()
        s = call.sampled.sampled
        scored = any(live.params.logprobs is not None for _, live, _ in call.rows)
        more = [np.asarray(a) for a in (s.logprob, s.top_tokens, s.top_logprobs)] if scored else [None] * 3
        read = Read(np.asarray(s.tokens), np.asarray(s.experts), np.asarray(s.missing), *more)
        self.streams.look()
        self.seconds += time.perf_counter() - began
        return read

    def echoed(self, live: Live, call: Call[Live]) -> list[TokenLogprob]:
        """Log-probabilities of the prompt's tokens that a scored prefill call ran or predicted."""
        assert call.echo is not None
        began = time.perf_counter()
        logprob, tokens, logprobs = (np.asarray(a) for a in call.echo.scores)
        self.seconds += time.perf_counter() - began
        wanted = live.params.logprobs or 0
        first = [TokenLogprob(live.tokens[0], None, ())] if call.start == 0 else []
        count = min(call.count, live.prompt - 1 - call.start)
        return first + [
            TokenLogprob(live.tokens[call.start + i + 1], float(logprob[i]), _top(tokens[i], logprobs[i], wanted))
            for i in range(count)
        ]


def _live(sequence: Sequence) -> Live:
    assert isinstance(sequence, Live)
    return sequence


def _top(tokens: np.ndarray, logprobs: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    pairs = zip(tokens[:count].tolist(), logprobs[:count].tolist(), strict=True)
    return tuple((int(t), float(p)) for t, p in pairs if p > -np.inf)
