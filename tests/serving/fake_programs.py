"""A model whose next token is a hash of all tokens before it, behind the interface of `Programs` and `ExpertStore`.

Its cache holds token ids, so a key that is not written, not copied or written too early changes every later token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from readme_jax import config
from readme_jax.serving.buckets import Limits
from readme_jax.serving.calls import Caller
from readme_jax.serving.cost import Costs
from readme_jax.serving.decode import Sampled
from readme_jax.serving.engine import Engine
from readme_jax.serving.expert_cache import ExpertCache
from readme_jax.serving.prefill import Scores
from readme_jax.serving.programs import Routed
from readme_jax.serving.residency import Residency
from readme_jax.serving.sampling import Samplings
from readme_jax.serving.scheduler import make_scheduler

LAYERS = 2
COSTS = Costs(fixed=0.01, token=1e-3, expert=2e-3, load=0.01)
NOTHING = -1


class FakeModel:
    """Tokens and routes by hashing. `switch`: the route may change every so many tokens."""

    def __init__(self, vocab: int = 256, experts: int = 4, top_k: int = 1, switch: int = 3) -> None:
        self.vocab, self.experts, self.top_k, self.switch = vocab, experts, top_k, switch

    def route(self, tokens: Any) -> tuple[int, ...]:
        """The experts of the last one of `tokens`."""
        tokens = tuple(int(t) for t in tokens)
        kept = tokens[: max(1, (len(tokens) - 1) // self.switch * self.switch)]
        first = hash((7, *kept))
        return tuple((first // 3 + i) % self.experts for i in range(self.top_k))

    def next(self, tokens: Any, sampling: tuple[float, int]) -> int:
        """The token after `tokens`, by (temperature, seed)."""
        temperature, seed = sampling
        tokens = tuple(int(t) for t in tokens)
        assert NOTHING not in tokens, "attention to a key that was never written"
        return hash((seed if temperature else 0, *tokens)) // 5 % self.vocab

    def generate(self, prompt: list[int], count: int, sampling: tuple[float, int] = (0.0, 0)) -> list[int]:
        """What a request alone would get."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(self.next(tokens, sampling))
        return tokens[len(prompt) :]

    def logprob(self, tokens: Any, token: int) -> float:
        """Of `token` after `tokens`."""
        return -(hash((11, token, *(int(t) for t in tokens))) % 1000) / 100


@dataclass(frozen=True)
class FakeState:
    keys: np.ndarray  # [R, S] token ids
    routed: np.ndarray  # [R, S] those that the router has seen
    token: np.ndarray  # [R]
    position: np.ndarray
    experts: np.ndarray  # [R, K]


class FakeStore:
    """Counts places as the real one does, and refuses what it refuses."""

    expert_bytes = 100
    num_layers = LAYERS
    fence = None  # nothing is in flight

    def __init__(self, experts: int, slots: int = 0, staging: int = 0) -> None:
        self.num_experts = experts
        self.resident = not 0 < slots < experts
        self.slots = experts if self.resident else slots
        self.staging = 0 if self.resident else staging
        self.spans = tuple(slice(i, i + 1) for i in range(LAYERS))
        self.loads = self.bytes_loaded = 0
        self._held = [set(range(experts)) if self.resident else set[int]() for _ in self.spans]

    def load(self, span: int, expert: int) -> None:
        assert expert not in self._held[span]
        self._held[span].add(expert)
        assert sum(len(held) for held in self._held) <= LAYERS * self.slots + self.staging
        self.loads += 1

    def drop(self, span: int, expert: int) -> None:
        assert not self.resident
        self._held[span].remove(expert)

    def clear(self) -> None:
        for held in self._held:
            held.clear()

    def on_device(self, span: int = 0) -> frozenset[int]:
        return frozenset(self._held[span])

    def arrays(self, span: int, expert: int) -> None:
        assert expert in self._held[span]

    def arrived(self, expert: int) -> bool:
        return all(expert in held for held in self._held)

    def used(self, span: int, done: Any) -> None:
        """Nothing is in flight."""

    def ready(self, arrays: Any) -> bool:
        return True

    def wait(self, arrays: Any) -> None:
        """See `used`."""

    def padded(self, experts: Any) -> tuple[int, ...]:
        size = next(n for n in (0, 1, 2, 4, self.num_experts) if n >= len(experts))
        return (*experts, *[experts[0]] * (size - len(experts)))

    def present(self, experts: Any, span: int | None = None) -> list[tuple[int, ...]]:
        order = self.padded(experts)
        held = self._held if span is None else [self._held[span]]
        assert all(each.issuperset(order) for each in held)
        return [order] * len(held)


class FakePass:
    """A call that computes everything at its end. It must have run every span in order, with its experts."""

    done = None

    def __init__(self, programs: FakePrograms, given: Any, compute: Any) -> None:
        self.programs, self.given, self.compute = programs, given, compute
        self.spans: list[int] = []
        self.sampled = self.scores = None

    def run(self, state: FakeState, span: int, weights: Any) -> FakeState:
        assert weights == [self.programs.store.padded(self.given)]
        self.spans.append(span)
        return state

    def finish(self, state: FakeState) -> FakeState:
        assert self.spans == list(range(LAYERS))
        state, self.sampled, self.scores = self.compute(state)
        return state

    def whole(self, state: FakeState, weights: Any) -> FakeState:
        for span in range(LAYERS):
            self.run(state, span, weights[span : span + 1])
        return self.finish(state)


class FakePrograms:
    compilations = 0

    def __init__(self, model: FakeModel, store: FakeStore, limits: Limits) -> None:
        self.model, self.store, self.limits = model, store, limits
        self.shape = SimpleNamespace(top_k=model.top_k)
        self.prefilled = self.decoded = 0  # tokens

    def warm_up(self, progress: Any = None) -> int:
        return 0

    def new_state(self) -> FakeState:
        rows, length, k = self.limits.rows, self.limits.length, self.model.top_k
        empty = np.full((rows, length), NOTHING, np.int64)
        zeros = np.zeros(rows, np.int64)
        return FakeState(empty, empty.copy(), zeros, zeros.copy(), np.zeros((rows, k), np.int64))

    def route(self, tokens: Any) -> Routed:
        experts = np.asarray([self.model.route(tokens[: i + 1]) for i in range(len(tokens))], np.int32)
        return Routed(experts, np.ones(experts.shape, np.float32), np.asarray(tokens), None)

    def insert(self, state: FakeState, row: int, routed: Routed) -> FakeState:
        state = _copy(state)
        state.routed[row, : len(routed.keys)] = routed.keys
        return state

    def copy_row(self, state: FakeState, source: int, target: int, length: int) -> FakeState:
        state = _copy(state)
        state.keys[target] = state.routed[target] = NOTHING
        state.keys[target, :length] = state.keys[source, :length]
        state.routed[target, : length + 1] = state.routed[source, : length + 1]
        state.token[target], state.experts[target] = state.token[source], state.experts[source]
        state.position[target] = min(length, state.position[source])
        return state

    def prefill_pass(
        self, row, tokens, start, routes, route_weights, experts, sampling=None, last=False, targets=None
    ) -> FakePass:
        about = (row, tokens, start, routes, route_weights, experts, sampling, last, targets)
        return FakePass(self, experts, lambda state: self._prefill(state, *about))

    def _prefill(self, state, row, tokens, start, routes, route_weights, experts, sampling, last, targets):
        assert len(tokens) <= self.limits.chunks[-1] and len(route_weights) == len(routes) == len(tokens)
        state, stop = _copy(state), start + len(tokens)
        assert NOTHING not in state.keys[row, :start]
        state.keys[row, start:stop] = tokens
        state.position[row] = stop
        self.prefilled += len(tokens)
        known = state.keys[row, :stop]
        for i, route in enumerate(routes):
            assert tuple(route) == self.model.route(known[: start + i + 1])
            assert set(route.tolist()) <= set(experts)
        sampled = scores = None
        if last:
            sampled = self._sample(state, [row], sampling)
        if targets is not None:
            scores = self._score(known, start, targets)
        return state, sampled, scores

    def decode_pass(self, active, experts, sampling) -> FakePass:
        return FakePass(self, experts, lambda state: self._decode(state, active, experts, sampling))

    def _decode(self, state, active, experts, sampling):
        assert len(active) in self.limits.decode and len(sampling.seed) == len(active)
        state = _copy(state)
        runs = [r for r in np.flatnonzero(active) if set(state.experts[r].tolist()) <= set(experts)]
        for row in runs:
            state.keys[row, state.position[row]] = state.token[row]
            state.position[row] += 1
            self.decoded += 1
        sampled = self._sample(state, runs, sampling, len(active), decode=True)
        missing = np.asarray(active).copy()
        missing[runs] = False
        return state, sampled._replace(missing=missing), None

    def _sample(
        self, state: FakeState, rows: list[int], sampling: Samplings, size: int = 1, decode: bool = False
    ) -> Sampled:
        """The next token of `rows`, in the results at their own index, or at 0 of one."""
        out = Sampled(*(np.zeros(s) for s in (size, size, (size, 20), (size, 20), (size, self.model.top_k), size)))
        out = out._replace(tokens=out.tokens.astype(int), experts=out.experts.astype(int), missing=np.zeros(size, bool))
        for row in rows:
            at, position = (row if decode else 0), state.position[row]
            known = state.keys[row, :position]
            token = self.model.next(known, (float(sampling.temperature[at]), int(sampling.seed[at])))
            assert list(state.routed[row, :position]) == list(known)
            if position < self.limits.length:
                state.routed[row, position] = token
            state.token[row] = out.tokens[at] = token
            state.experts[row] = out.experts[at] = self.model.route([*known, token])
            out.logprob[at] = self.model.logprob(known, token)
            out.top_tokens[at] = (token + np.arange(20)) % self.model.vocab
            out.top_logprobs[at] = [self.model.logprob(known, int(t)) for t in out.top_tokens[at]]
        return out

    def _score(self, known: np.ndarray, start: int, targets: np.ndarray) -> Scores:
        tops = [(int(t) + np.arange(20)) % self.model.vocab for t in targets]
        logprobs = [[self.model.logprob(known[: start + i + 1], int(t)) for t in top] for i, top in enumerate(tops)]
        return Scores(np.asarray([x[0] for x in logprobs]), np.asarray(tops), np.asarray(logprobs))


def _copy(state: FakeState) -> FakeState:
    return replace(state, **{k: v.copy() for k, v in vars(state).items()})


class Ticks:
    """A clock that moves a little each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-3
        return self.now


def fake_engine(
    settings: config.Serving,
    model: FakeModel | None = None,
    tokenizer: Any = None,
    load_seconds: float | None = None,
    **options: Any,
) -> Engine:
    """An engine over the fake model, with background swaps where `load_seconds` are given."""
    model = model or FakeModel()
    store = FakeStore(model.experts, settings.slots, settings.staging)
    limits = Limits(settings.rows, settings.length, chunks=(settings.chunk,))
    cache = None if store.resident else ExpertCache(model.experts, store.slots, store.staging, settings.policy)
    programs: Any = FakePrograms(model, store, limits)
    residency: Residency = Residency(store, cache, settings.prefetch, load_seconds)
    scheduler = make_scheduler(settings.scheduler, settings.budget, COSTS, model.experts)
    options.setdefault("clock", Ticks())
    return Engine(Caller(programs, residency), scheduler, settings, model.vocab, tokenizer, **options)
