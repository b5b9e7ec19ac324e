"""Discrete-event simulation of serving: the engine's own loop, scheduler and expert cache on a clock of modelled steps.

Only the calls are simulated: what they would sample is known from the request, how long they take from a cost model, or
from an engine's log. So the simulation sees what the engine sees, also where a step is dispatched before the last one
is read, and makes its decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from readme_jax.errors import ConfigError
from readme_jax.serving.cost import CostModel
from readme_jax.serving.expert_cache import ExpertCache, Plan
from readme_jax.serving.flight import Call, plan_calls
from readme_jax.serving.live import Emitted, Live
from readme_jax.serving.loop import Logged, Loop
from readme_jax.serving.pages import Pages
from readme_jax.serving.request import FinishReason, SamplingParams, TokenLogprob
from readme_jax.serving.residency import Places, Residency
from readme_jax.serving.rollout import Future
from readme_jax.serving.rows import Placement, Rows
from readme_jax.serving.scheduler import Scheduler
from readme_jax.serving.timeline import Prefetch, StepTime, Timeline
from readme_jax.serving.traffic import Request
from readme_jax.serving.work import Batch, Route


@dataclass(frozen=True)
class Setup:
    """How the simulated server is set up, beside its scheduler, cache and model.

    Attributes:
        rows: sequences that run at once.
        prefetch: how far ahead loads start.
        future: what the cache's policy sees of later batches.
        horizon: steps of roll-out.
        swaps: whether residents are swapped in the background.
        ahead: whether a step is dispatched before the last one is read.
        chunk: tokens of the longest prefill call.
        page_size: tokens a page, `pages` how many there are (0: one a row).
        buckets: rows that decode calls are compiled for, ascending (empty: all of them).
        top_k: experts a token.
        load_seconds: what swaps are weighed with (None: the model's).
    """

    rows: int = 64
    prefetch: Prefetch = "batch"
    future: Future = "rollout"
    horizon: int = 8
    swaps: bool = True
    ahead: bool = False
    chunk: int = 1 << 30
    page_size: int = 1 << 30
    pages: int = 0
    buckets: tuple[int, ...] = ()
    top_k: int = 1
    load_seconds: float | None = None


@dataclass
class Served:
    """What happened to a request, in seconds of the simulation."""

    request: Request
    produced: int = 0  # tokens
    first_token: float = 0.0
    done: float = 0.0
    longest_wait: float = 0.0  # longest time in which nothing of it ran


@dataclass
class Outcome:
    """What a simulation saw; lists have an entry a batch, `served` one a request in order of completion."""

    served: list[Served] = field(default_factory=list)
    chunks: list[tuple[tuple[int, int, int], ...]] = field(default_factory=list)  # (id, start, count) of each batch
    masks: list[int] = field(default_factory=list)  # its experts
    tokens: list[int] = field(default_factory=list)
    misses: list[int] = field(default_factory=list)  # experts that travelled for it
    starts: list[float] = field(default_factory=list)  # seconds
    steps: list[StepTime] = field(default_factory=list)
    log: list[Logged] = field(default_factory=list)  # also of steps that only read
    swaps: int = 0
    preemptions: int = 0
    missing: int = 0  # tokens that ran again because their step, dispatched ahead, lacked the expert

    @property
    def unique_experts(self) -> float:
        """Mean number of experts in a batch."""
        return float(np.mean([m.bit_count() for m in self.masks]))

    @property
    def moved(self) -> int:
        """Experts that travelled, swaps included, each through all layers."""
        return sum(self.misses) + self.swaps

    def latency(self) -> np.ndarray:
        """Seconds from arrival to last token, a generated token, of each request."""
        return np.array([(s.done - s.request.arrival) / s.request.output for s in self.served])

    def first_token(self) -> np.ndarray:
        """Seconds from arrival to first token of each request."""
        return np.array([s.first_token - s.request.arrival for s in self.served])

    def throughput(self) -> float:
        """Requests a second until nine tenths were served: the tail, which leaves batches empty, is left out."""
        served = max(len(self.served) * 9 // 10, 1)
        return served / self.served[served - 1].done


def simulate(
    requests: Iterable[Request],
    scheduler: Scheduler,
    cache: ExpertCache,
    model: CostModel,
    setup: Setup | None = None,
    times: Iterable[Logged] | None = None,
) -> Outcome:
    """Serve requests until all are done, or `times` is over.

    Args:
        requests: in order of arrival.
        scheduler: picks the batches.
        cache: decides which experts stay; changed.
        model: what steps cost.
        setup: of the server.
        times: of each step, as an engine or another simulation logged them, in place of modelled ones.

    Raises ConfigError when nothing can run although requests wait.
    """
    return _Simulation(list(requests), scheduler, cache, model, setup or Setup()).run(times)


def replay_decisions(
    requests: Iterable[Request],
    log: Iterable[Logged],
    scheduler: Scheduler,
    cache: ExpertCache,
    model: CostModel,
    setup: Setup | None = None,
) -> list[tuple[tuple[int, int, int], ...]]:
    """The batches, as (id, start, count) of their chunks, that are picked when steps begin and end as an engine logged.

    Equal to the engine's own when it was given the same requests and set up alike, from its first step on. Where
    prompts share pages their tokens must be given.
    """
    return simulate(requests, scheduler, cache, model, setup, log).chunks


class _Clock:
    """Seconds of the simulation; `fixed` while a measured step runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.fixed = False

    def __call__(self) -> float:
        return self.now

    def advance(self, to: float) -> None:
        """Not before `to`."""
        if not self.fixed:
            self.now = max(self.now, to)


_STOP = -1  # the token that ends an answer before its limit
_GREEDY = SamplingParams()


class _Scripted(Live):
    """A request whose answer is known. Its tokens are all alike, but not those of another, where none are given."""

    __slots__ = ("clock", "request", "served", "tell")

    def __init__(self, request: Request, clock: _Clock, tell: Callable[[Served, FinishReason], None]) -> None:
        tokens = list(request.tokens[: request.prompt]) or [-2 - request.id] * request.prompt
        limit = request.limit or request.output
        stops = frozenset((self._last(request),)) if request.output < limit else frozenset[int]()
        nobody: Any = None  # reads what it says
        super().__init__(request.id, request.arrival, tokens, _GREEDY, limit, stops, nobody, nobody, seed=0)
        self.request, self.clock, self.tell = request, clock, tell
        self.served = Served(request)

    @staticmethod
    def _last(request: Request) -> int:
        return request.tokens[request.prompt + request.output - 1] if request.tokens else _STOP

    @property
    def next(self) -> tuple[int, Route]:
        """The next token and its experts."""
        at = len(self.tokens)
        if at + 1 == self.request.prompt + self.request.output:
            return self._last(self.request), self.request.routes[at]
        return self.request.tokens[at] if self.request.tokens else self.tokens[-1], self.request.routes[at]

    def take(self, token: int, route: Route) -> None:
        """See `Live.take`."""
        super().take(token, route)
        self.served.produced += 1
        if self.served.produced == 1:
            self.served.first_token = self.clock.now
        self.served.done = self.clock.now

    def emit(self, emitted: Emitted) -> bool:
        """See `Live.emit`."""
        return False

    def end(self, reason: FinishReason, error: str | None = None) -> None:
        """See `Live.end`."""
        self.tell(self.served, reason)


class _Sampled:
    """What a call has sampled: the next tokens of scripts."""

    def __init__(self, call: Call[Any]) -> None:
        self._lives = {index: live for index, live, _ in call.rows}

    def row(self, index: int, alternatives: int | None) -> tuple[int, Route, TokenLogprob | None]:
        """See `Read.row`."""
        return (*self._lives[index].next, None)


class _Caller:
    """Calls that only take time: of the device, which runs one step after another, and of the link."""

    def __init__(self, residency: Residency[Places], model: CostModel, setup: Setup, clock: _Clock) -> None:
        assert residency.cache is not None
        self.residency, self.model, self.setup, self.clock = residency, model, setup, clock
        self.cache = residency.cache
        self.timeline = Timeline(model.shape.num_layers, model.load, self.cache.staging, setup.prefetch)
        self.outcome = Outcome()
        self.seconds = 0.0
        self.free = 0.0  # the device, from then on
        self.now = self.before = 0.0  # start of this step, and of the one before
        self._swap_left = 0.0  # seconds of the link that the swap under way still needs

    @property
    def resident(self) -> frozenset[int]:
        """See `Calls.resident`."""
        return self.residency.resident

    def route(self, live: Live, keep: bool) -> None:
        """See `Calls.route`."""
        assert isinstance(live, _Scripted)
        live.routes.extend(live.request.routes[len(live.routes) : len(live.tokens)])

    def forget(self, live: Live) -> None:
        """Nothing is kept."""

    def place(self, live: Live, placement: Placement, shared: int) -> None:
        """Costs nothing."""

    def move(self, live: Live, source: int, target: int) -> None:
        """Costs nothing."""

    def echoed(self, live: Live, call: Call[Live]) -> list[TokenLogprob]:
        """Nobody asks for a prompt's log-probabilities."""
        return []

    def run(self, batch: Batch, ahead: bool) -> list[Call[Live]]:
        """See `Calls.run`."""
        self._watch_swap()
        now = self.now
        for chunk in batch.chunks:
            served = chunk.sequence.served  # type: ignore[attr-defined]
            served.longest_wait = max(served.longest_wait, now - chunk.sequence.last_run)
        plan = self.residency.plan
        assert plan is not None
        flying, start = self.free, max(now, self.free)
        samples = sum(1 for c in batch.chunks if c.start + c.count >= c.sequence.known)
        known = self._known(batch, plan, now)
        time = self.timeline.run(start, known, self.model.layer(batch), plan, self.model.head(samples))
        self.free = start + time.total
        self._record(batch, plan, time, now)
        calls = [self._call(p, ahead) for p in plan_calls(batch, self.residency, self.setup.chunk)[0]]
        self.swap_on(time.total - time.transfer)
        self.before = now
        self.clock.advance(flying if ahead else self.free)
        return calls

    def proceed(self) -> None:
        """See `Calls.proceed`: nothing is left."""

    def _call(self, planned: Any, ahead: bool) -> Call[Live]:
        """A planned call, whose results are there when the device is free of it."""
        given = frozenset(planned.given)
        if planned.piece is None:
            lives = [c.sequence for c in planned.decodes]
            call: Call[Live] = Call([(i, s, s.epoch) for i, s in enumerate(lives)], self.free, given)
        else:
            live, last = planned.piece.live, planned.piece.stop == len(planned.piece.live.tokens)
            lives = [live] if last else []
            call = Call([(0, live, live.epoch)], self.free if last else None, planned.piece.experts)
        for live in lives:
            live.dispatched(ahead)
        return call

    def read(self, call: Call[Live]) -> _Sampled | None:
        """See `Calls.read`."""
        if call.sampled is None:
            return None
        self.clock.advance(call.sampled)
        return _Sampled(call)

    def _known(self, batch: Batch, plan: Plan, now: float) -> float:
        """Seconds since when the batch's loads are known: the start of the step before, where routes repeat."""
        if not plan.misses:
            return now
        since: dict[int, float] = {}
        for chunk in batch.chunks:
            sequence: Any = chunk.sequence
            decodes = chunk.count == 1 and sequence.primed
            if decodes and sequence.routes[chunk.start] != sequence.routes[chunk.start - 1]:
                seen = now
            else:
                seen = max(self.before, sequence.arrival)
            for expert in range(self.cache.experts):
                if chunk.mask >> expert & 1:
                    since[expert] = min(seen, since.get(expert, now))
        missing = [*plan.streams, *(move.expert for loads in plan.wave_loads for move in loads)]
        return max(since[e] for e in missing)

    def _record(self, batch: Batch, plan: Plan, time: StepTime, now: float) -> None:
        out = self.outcome
        out.chunks.append(tuple((c.sequence.id, c.start, c.count) for c in batch.chunks))
        out.masks.append(batch.mask)
        out.tokens.append(batch.tokens)
        out.misses.append(plan.misses)
        out.starts.append(now)
        out.steps.append(time)

    # --- background swaps ---

    def _watch_swap(self) -> None:
        """A swap that has begun needs the link for a load's time."""
        places, swapping = self.residency.store, self.cache.swapping
        if self.clock.fixed:
            return
        if swapping is None:
            places.coming = None
        elif places.coming != swapping.expert and self._swap_left <= 0:
            places.coming = swapping.expert
            self._swap_left = self.model.load * self.model.shape.num_layers

    def swap_on(self, idle: float) -> None:
        """Let the swap under way use the link for `idle` seconds."""
        if self.clock.fixed or self.cache.swapping is None or idle <= 0:
            return
        self._swap_left -= idle
        if self._swap_left <= 0:
            self.residency.store.coming = None


class _Simulation:
    def __init__(
        self, requests: list[Request], scheduler: Scheduler, cache: ExpertCache, model: CostModel, setup: Setup
    ) -> None:
        self.arriving = iter(requests)
        self.next = next(self.arriving, None)
        self.setup, self.clock = setup, _Clock()
        load = model.load * model.shape.num_layers if setup.load_seconds is None else setup.load_seconds
        places = Places(cache.experts, 0 if cache.all_resident else cache.slots, cache.staging, setup.top_k)
        residency = Residency(places, cache, load_seconds=load if setup.swaps else None)
        self.caller = _Caller(residency, model, setup, self.clock)
        self.outcome = self.caller.outcome
        pages, rows = Pages(setup.pages or max(setup.rows, 1), setup.page_size), setup.buckets or (setup.rows,)
        self.loop = Loop(self.caller, scheduler, Rows(setup.rows, rows), pages, self.clock, setup.ahead)
        self.loop.future, self.loop.horizon, self.loop.log = setup.future, setup.horizon, self.outcome.log.append

    def run(self, times: Iterable[Logged] | None) -> Outcome:
        if times is None:
            self._model()
        else:
            for step in times:
                self._replay(step)
        counters, out = self.loop.counters, self.outcome
        out.swaps, out.preemptions, out.missing = counters.swaps, counters.preemptions, counters.missing
        return out

    def _model(self) -> None:
        while self.next is not None or self.loop.busy:
            if not self.loop.busy and self.next is not None and self.next.arrival > self.clock.now:
                self.caller.swap_on(self.next.arrival - self.clock.now)
                self.clock.now = self.next.arrival
            self._arrive()
            self.caller.now = self.clock.now
            if not self.loop.step(self.clock.now):
                waiting = len(self.loop.sequences)
                raise ConfigError(f"nothing can run of {waiting} requests with {self.setup.rows} rows")

    def _replay(self, step: Logged) -> None:
        """A step whose seconds are given."""
        self.clock.now = self.caller.now = step.now
        self._arrive()
        for id in step.cancelled:
            self.loop.cancel(id)
        cache, places = self.caller.cache, self.caller.residency.store
        places.coming = None if step.arrived or cache.swapping is None else cache.swapping.expert
        self.clock.now, self.clock.fixed = step.ended, True
        self.loop.step(step.now)

    def _arrive(self) -> None:
        while self.next is not None and self.next.arrival <= self.clock.now:
            self.loop.add(_Scripted(self.next, self.clock, self._ended))
            self.next = next(self.arriving, None)

    def _ended(self, served: Served, reason: FinishReason) -> None:
        if reason != "cancelled":
            self.outcome.served.append(served)
