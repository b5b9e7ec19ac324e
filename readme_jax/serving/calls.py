"""The jitted calls of a batch, as `flight.plan_calls` cuts it, and their results on the host.

# B rows of a decode call, C tokens of a prefill call, Kx experts a token
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from readme_jax.serving.flight import DENSE, Call, Piece, Planned, plan_calls
from readme_jax.serving.live import Live
from readme_jax.serving.programs import Programs, Routed
from readme_jax.serving.request import TokenLogprob
from readme_jax.serving.residency import Residency
from readme_jax.serving.rows import Placement
from readme_jax.serving.sampling import Samplings
from readme_jax.serving.store import ExpertStore
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

    def run(self, batch: Batch, ahead: bool) -> list[Call[Live]]:
        """Dispatch a batch."""
        planned = plan_calls(batch, self.residency, self.limits.chunks[-1], lambda: self.state.token)
        return [self._decode(p, ahead) if p.piece is None else self._prefill(p.piece, p.given, ahead) for p in planned]

    def _decode(self, planned: Planned, ahead: bool) -> Call[Live]:
        lives = [_live(c.sequence) for c in planned.decodes]
        rows = max(s.row for s in lives) + 1
        size = next(b for b in self.limits.decode if b >= rows)
        active = np.zeros(size, bool)
        active[[s.row for s in lives]] = True
        sampling = Samplings(*(a[:size] for a in self._samplings))
        began = time.perf_counter()
        present = self.residency.store.present(planned.given)
        self.state, sampled = self.programs.decode(self.state, active, planned.given, present, sampling)
        self.seconds += time.perf_counter() - began
        call = Call([(s.row, s, s.epoch) for s in lives], sampled, frozenset(planned.given))
        for live in lives:
            live.dispatched(ahead)
        return call

    def _prefill(self, piece: Piece, given: tuple[int, ...], ahead: bool) -> Call[Live]:
        live, start, stop = _live(piece.live), piece.start, piece.stop
        count = stop - start
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

    def read(self, call: Call[Live]) -> Read | None:
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

    def echoed(self, live: Live, call: Call[Live]) -> list[TokenLogprob]:
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


def _live(sequence: Sequence) -> Live:
    assert isinstance(sequence, Live)
    return sequence


def _top(tokens: np.ndarray, logprobs: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    pairs = zip(tokens[:count].tolist(), logprobs[:count].tolist(), strict=True)
    return tuple((int(t), float(p)) for t, p in pairs if p > -np.inf)
