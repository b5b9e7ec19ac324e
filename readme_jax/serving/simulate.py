"""Discrete-event simulation of serving: the engine's scheduler and expert cache on a clock of modelled steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from readme_jax.errors import ConfigError
from readme_jax.serving.cost import CostModel
from readme_jax.serving.expert_cache import ExpertCache, Plan
from readme_jax.serving.rollout import queue_future, roll_out
from readme_jax.serving.scheduler import Scheduler
from readme_jax.serving.timeline import Prefetch, StepTime, Timeline
from readme_jax.serving.traffic import Request
from readme_jax.serving.work import Batch, Room, Sequence

Future = Literal["none", "queue", "rollout"]  # what the cache is told of later batches


@dataclass(frozen=True)
class Setup:
    """How the simulated server is set up, beside its scheduler, cache and model.

    Attributes:
        rows: sequences that run at once.
        prefetch: how far ahead loads start.
        future: what the cache's policy sees of later batches.
        horizon: steps of roll-out.
        swaps: whether residents are swapped in the background.
    """

    rows: int = 64
    prefetch: Prefetch = "batch"
    future: Future = "rollout"
    horizon: int = 8
    swaps: bool = True


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
    """What a simulation saw; lists have an entry a step, `served` one a request in order of completion."""

    served: list[Served] = field(default_factory=list)
    chunks: list[tuple[tuple[int, int, int], ...]] = field(default_factory=list)  # (id, start, count) of each batch
    masks: list[int] = field(default_factory=list)  # its experts
    tokens: list[int] = field(default_factory=list)
    misses: list[int] = field(default_factory=list)  # experts that travelled for it
    starts: list[float] = field(default_factory=list)  # seconds
    steps: list[StepTime] = field(default_factory=list)
    swaps: int = 0

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
    times: Iterable[tuple[float, float]] | None = None,
) -> Outcome:
    """Serve requests until all are done.

    Args:
        requests: in order of arrival.
        scheduler: picks the batches.
        cache: decides which experts stay; changed.
        model: what steps cost.
        setup: of the server.
        times: (start, seconds) of each step as an engine measured them, in place of modelled ones.

    Raises ConfigError when nothing can run although requests wait.
    """
    return _Simulation(list(requests), scheduler, cache, model, setup or Setup(), times).run()


def replay_decisions(
    requests: Iterable[Request],
    times: Iterable[tuple[float, float]],
    scheduler: Scheduler,
    cache: ExpertCache,
    model: CostModel,
    setup: Setup | None = None,
) -> list[tuple[tuple[int, int, int], ...]]:
    """The batches, as (id, start, count) of their chunks, that are picked when steps start and last as `times` says.

    Equal to an engine's own when it saw the same requests, ran the same scheduler and cache, and nobody was cancelled
    or preempted.
    """
    return simulate(requests, scheduler, cache, model, setup, times).chunks


class _Simulation:
    def __init__(
        self,
        requests: list[Request],
        scheduler: Scheduler,
        cache: ExpertCache,
        model: CostModel,
        setup: Setup,
        times: Iterable[tuple[float, float]] | None,
    ) -> None:
        self.scheduler, self.cache, self.model, self.setup = scheduler, cache, model, setup
        self.times: Iterator[tuple[float, float]] | None = None if times is None else iter(times)
        self.arriving = iter(requests)
        self.next = next(self.arriving, None)
        self.alive: dict[int, Sequence] = {}
        self.progress: dict[int, Served] = {}
        self.running = 0
        self.timeline = Timeline(model.shape.num_layers, model.load, cache.staging, setup.prefetch)
        self.swap_left = 0.0  # seconds of the link that the swap under way still needs
        self.outcome = Outcome()
        self.now = self.before = 0.0  # this step's start, and the one's before
        self.last = 0.0  # seconds of the step before

    def run(self) -> Outcome:
        while self.next is not None or self.alive:
            if self.times is None:
                if not self.alive and self.next is not None and self.next.arrival > self.now:
                    self._swap_on(self.next.arrival - self.now)
                    self.now = self.next.arrival
                seconds = None
            else:
                step = next(self.times, None)
                if step is None:
                    break
                self.now, seconds = step
            self._arrive()
            self._step(seconds)
        return self.outcome

    def _arrive(self) -> None:
        while self.next is not None and self.next.arrival <= self.now:
            self.alive[self.next.id] = self.next.sequence()
            self.progress[self.next.id] = Served(self.next)
            self.next = next(self.arriving, None)

    def _step(self, seconds: float | None) -> None:
        if self.setup.swaps:
            self._consider_swap()
        room = Room(self.setup.rows - self.running)
        resident = self.cache.resident
        batch = self.scheduler.pick(self.alive.values(), resident, self.now, room)
        if not batch.chunks:
            raise ConfigError(f"nothing can run of {len(self.alive)} requests with {self.setup.rows} rows")
        was_swapping = self.cache.swapping
        plan = self.cache.step(batch.experts, self._future(batch, resident, room))
        if was_swapping is not None and self.cache.swapping is None:
            self.swap_left = 0.0
        time = self._time(batch, plan)
        total = time.total if seconds is None else seconds
        self._record(batch, plan, time)
        self._advance(batch, self.now + total)
        self._swap_on(total - time.transfer)
        self.before, self.now, self.last = self.now, self.now + total, total

    def _future(self, batch: Batch, resident: frozenset[int], room: Room) -> Iterable[int]:
        if self.setup.future == "none" or self.cache.all_resident:
            return ()
        if self.setup.future == "queue":
            return queue_future(self.alive.values(), batch)
        return roll_out(
            self.scheduler, self.alive.values(), batch, resident, self.now, room, self.setup.horizon, self.last
        )

    def _time(self, batch: Batch, plan: Plan) -> StepTime:
        samples = sum(1 for c in batch.chunks if c.start + c.count >= c.sequence.known)
        return self.timeline.run(
            self.now, self._known(batch, plan), self.model.layer(batch), plan, self.model.head(samples)
        )

    def _known(self, batch: Batch, plan: Plan) -> float:
        """Seconds since when the batch's loads are known: the start of the step before, where routes repeat."""
        if not plan.misses:
            return self.now
        since: dict[int, float] = {}
        for chunk in batch.chunks:
            sequence = chunk.sequence
            if chunk.decoding and sequence.routes[chunk.start] != sequence.routes[chunk.start - 1]:
                seen = self.now
            else:
                seen = max(self.before, sequence.arrival)
            for expert in range(self.cache.experts):
                if chunk.mask >> expert & 1:
                    since[expert] = min(seen, since.get(expert, self.now))
        missing = [*plan.streams, *(move.expert for loads in plan.wave_loads for move in loads)]
        return max(since[e] for e in missing)

    def _record(self, batch: Batch, plan: Plan, time: StepTime) -> None:
        out = self.outcome
        out.chunks.append(tuple((c.sequence.id, c.start, c.count) for c in batch.chunks))
        out.masks.append(batch.mask)
        out.tokens.append(batch.tokens)
        out.misses.append(plan.misses)
        out.starts.append(self.now)
        out.steps.append(time)

    def _advance(self, batch: Batch, end: float) -> None:
        for chunk in batch.chunks:
            sequence = chunk.sequence
            served = self.progress[sequence.id]
            self.running += not sequence.running
            sequence.running = True
            served.longest_wait = max(served.longest_wait, self.now - sequence.last_run)
            sequence.computed += chunk.count
            sequence.last_run = end
            if sequence.computed == len(sequence.routes):
                self._sampled(sequence, served, end)

    def _sampled(self, sequence: Sequence, served: Served, end: float) -> None:
        request = served.request
        served.produced += 1
        if served.produced == 1:
            served.first_token = end
        if served.produced < request.output:
            sequence.routes.append(request.routes[request.prompt + served.produced - 1])
            return
        served.done = end
        self.outcome.served.append(served)
        del self.alive[sequence.id], self.progress[sequence.id]
        self.running -= 1

    # --- background swaps ---

    def _consider_swap(self) -> None:
        if self.cache.all_resident or self.cache.swapping is not None:
            return
        waiting, active = [0.0] * self.cache.experts, [0.0] * self.cache.experts
        for sequence in self.alive.values():
            for expert in sequence.routes[sequence.computed]:
                waiting[expert] += self.now - sequence.last_run
                active[expert] += 1
        load = self.model.load * self.model.shape.num_layers
        if self.cache.swap(waiting, active, load) is not None:
            self.swap_left = load
            self.outcome.swaps += 1

    def _swap_on(self, idle: float) -> None:
        """Let the swap under way use the link for `idle` seconds."""
        if self.cache.swapping is None or idle <= 0:
            return
        self.swap_left -= idle
        if self.swap_left <= 0:
            self.cache.finish_swap()
