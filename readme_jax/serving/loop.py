"""One engine step after another: pick, make room, run, and read what the step before has sampled.

Single-threaded and without clocks of its own but the one it is given; `engine.py` puts a thread and a queue around it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from readme_jax.serving.flight import DENSE, Call
from readme_jax.serving.live import Emitted, Live
from readme_jax.serving.pages import Pages
from readme_jax.serving.request import FinishReason, TokenLogprob
from readme_jax.serving.residency import Residency
from readme_jax.serving.rollout import Future, queue_future, roll_out
from readme_jax.serving.rows import Placement, Rows
from readme_jax.serving.scheduler import Scheduler
from readme_jax.serving.work import Batch, Chunk, Room, Route, Sequence

ROLLED = 8  # steps that the scheduler is played ahead for the eviction policy


class Logged(NamedTuple):
    """A step's decision: when it was made, its chunks as (sequence, start, count), and when the step ended.

    `preempted` sequences lost their row to it. `cancelled` were given up by their users before it; `arrived`: a
    background swap was found to be complete. With these a simulation makes the same decisions again.
    """

    now: float
    chunks: tuple[tuple[int, int, int], ...]
    preempted: tuple[int, ...]
    ended: float
    cancelled: tuple[int, ...] = ()
    arrived: bool = False

    @property
    def seconds(self) -> float:
        """How long the step took."""
        return self.ended - self.now


class Calls(Protocol):
    """What the loop asks of whoever makes its calls: the engine's `Caller`, or a simulation's."""

    residency: Residency
    seconds: float  # spent in calls

    @property
    def resident(self) -> frozenset[int]:
        """Experts on the device, as the scheduler sees them."""

    def route(self, live: Live, keep: bool) -> None:
        """Route all known tokens of a sequence."""

    def forget(self, live: Live) -> None:
        """Free what `route` kept."""

    def place(self, live: Live, placement: Placement, shared: int) -> None:
        """Put a sequence into a row."""

    def move(self, live: Live, source: int, target: int) -> None:
        """Move a running sequence to another row."""

    def run(self, batch: Batch, ahead: bool) -> list[Call[Live]]:
        """Begin to dispatch a batch."""

    def proceed(self) -> None:
        """Dispatch what is left of it, once the step before has been read."""

    def read(self, call: Call[Live]) -> Result | None:
        """Wait for a call's results."""

    def echoed(self, live: Live, call: Call[Live]) -> list[TokenLogprob]:
        """Log-probabilities of the prompt's tokens of a scored call."""


class Result(Protocol):
    """What a call has sampled."""

    def row(self, index: int, alternatives: int | None) -> tuple[int, Route, TokenLogprob | None]:
        """Token, route and, where wanted, log-probability of a row."""


@dataclass
class Counters:
    """What has happened since the start."""

    steps: int = 0
    tokens: int = 0  # that ran, prompts' and new ones
    sampled: int = 0  # new tokens that were read
    missing: int = 0  # rows run again because their expert was not given
    preemptions: int = 0
    swaps: int = 0  # residents replaced in the background
    shared: int = 0  # tokens of prompts that another request's pages held
    calling: float = 0.0  # seconds spent in jitted calls and waiting for them
    stepping: float = 0.0  # of all steps


@dataclass
class Loop:
    """All requests that are alive, the rows and pages they hold, and the step in flight."""

    caller: Calls
    scheduler: Scheduler
    rows: Rows
    pages: Pages
    clock: Callable[[], float]
    ahead: bool = True
    log: Callable[[Logged], None] | None = None
    future: Future = "rollout"
    horizon: int = ROLLED
    sequences: dict[int, Live] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    last_seconds: float = 0.0  # of the last step, by `clock`
    _flight: list[Call[Live]] = field(default_factory=list)
    _preempted: list[int] = field(default_factory=list)
    _cancelled: list[int] = field(default_factory=list)
    _arrived: bool = False

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.sequences or self._flight)

    @property
    def waiting(self) -> int:
        """Requests that hold no row."""
        return sum(not s.running for s in list(self.sequences.values()))  # other threads ask, too

    def add(self, live: Live) -> None:
        """A new request: its prompt is routed at once."""
        self.caller.route(live, keep=self.waiting < self.rows.count)
        self.sequences[live.id] = live

    def end(self, live: Live, reason: FinishReason, error: str | None = None) -> None:
        """Forget a request and free all it holds."""
        del self.sequences[live.id]
        self._vacate(live)
        self.caller.forget(live)
        live.end(reason, error)

    def cancel(self, id: int) -> None:
        """A user gives a request up; nothing where it has ended."""
        self._cancelled.append(id)
        if id in self.sequences:
            self.end(self.sequences[id], "cancelled")

    def abandon(self) -> list[Live]:
        """Forget all requests, which are returned, and what is in flight, after an error in a step."""
        lost = list(self.sequences.values())
        for live in lost:
            self.pages.release(live.id)
        self.sequences.clear()
        self._flight = []
        self.rows = Rows(self.rows.count, self.rows.buckets)
        return lost

    def step(self, began: float | None = None) -> bool:
        """Dispatch the next step and read the one before it; False when there was neither, nor a sequence that made
        room for a later step. `began`: now, by `clock`."""
        began, started = self.clock() if began is None else began, time.perf_counter()
        self._preempted, self._arrived = [], False
        calls_before = self.caller.seconds
        batch = self._pick(began)
        flight = self.caller.run(batch, self.ahead) if batch.chunks else []
        before, self._flight = self._flight, flight if self.ahead else []
        self._read(before)
        self.caller.proceed()
        if not self.ahead:
            self._read(flight)
        self._compact()
        if not batch.chunks and not before and not self._preempted:
            return False
        ended = self.clock()
        for chunk in batch.chunks:
            chunk.sequence.last_run = ended
        self.counters.steps += 1
        self.last_seconds = ended - began
        self.counters.tokens += batch.tokens
        self.counters.stepping += time.perf_counter() - started
        self.counters.calling += self.caller.seconds - calls_before
        if self.log is not None:
            chunks = tuple((c.sequence.id, c.start, c.count) for c in batch.chunks)
            self.log(Logged(began, chunks, tuple(self._preempted), ended, tuple(self._cancelled), self._arrived))
        self._cancelled = []
        return True

    # --- choosing what runs, and making room for it ------------------------------------------------------------------

    def _pick(self, now: float) -> Batch:
        """The scheduler's batch, less what finds no room."""
        self._swap(now)
        if self.rows.free:  # else nobody gets one, and what could be shared may change before somebody does
            for live in self.sequences.values():
                if not live.running:
                    live.computed = self._shared(live)
        chunks = self._with_room(self.scheduler.pick(self.sequences.values(), self.caller.resident, now, self._room()))
        if not chunks:  # what waits for room must not hold up what has it
            running = [s for s in self.sequences.values() if s.running]
            chunks = self._with_room(self.scheduler.pick(running, self.caller.resident, now, Room(0)))
        batch = Batch(tuple(chunks.values()))
        self.caller.residency.decide(batch.experts, self._future(batch, now, self._room()))
        for chunk in batch.chunks:
            chunk.sequence.computed += chunk.count
        return batch

    def _swap(self, now: float) -> None:
        """Let residents change in the background, by how long sequences wait for each expert and how many use it."""
        residency = self.caller.residency
        if not residency.swaps or not self.sequences:
            return
        waiting, active = np.zeros(residency.store.num_experts), np.zeros(residency.store.num_experts)
        for sequence in self.sequences.values():
            if sequence.pending:
                experts = list(sequence.routes[sequence.computed])
                waiting[experts] += max(now - sequence.last_run, 0.0)
                active[experts] += 1
        self._arrived, began = residency.swap(waiting.tolist(), active.tolist())
        self.counters.swaps += began

    def _with_room(self, picked: Batch) -> dict[int, Chunk]:
        """The chunks of a batch, by sequence, that get the pages and rows they need."""
        chunks: dict[int, Chunk] = {c.sequence.id: c for c in picked.chunks}
        for chunk in picked.chunks:  # those that run first: they may need a page from one that does not yet
            if chunk.sequence.running and chunk.sequence.id in chunks:
                self._reserve(chunk, chunks)
        for chunk in picked.chunks:
            live = self._live(chunk.sequence)
            if not live.running and live.id in chunks and not self._admit(live):
                del chunks[live.id]
        return chunks

    def _room(self) -> Room:
        return Room(self.rows.free, self.pages.free, self.pages.size)

    def _future(self, batch: Batch, now: float, room: Room) -> Iterable[int]:
        """Experts of later batches, as bit masks: worked out only if the policy asks."""
        alive, resident = self.sequences.values(), self.caller.resident
        if self.future == "none":
            return ()
        if self.future == "queue":
            return queue_future(alive, batch)
        return roll_out(self.scheduler, alive, batch, resident, now, room, self.horizon, self.last_seconds)

    def _reserve(self, chunk: Chunk, chunks: dict[int, Chunk]) -> None:
        """Pages for a chunk of a running sequence; while there are too few the newest running one is preempted."""
        while not self.pages.reserve(chunk.sequence.id, chunk.start + chunk.count):
            running = [s for s in self.sequences.values() if s.running]
            newest = max(running, key=lambda s: (s.arrival, s.id))
            self._vacate(newest)
            newest.preempted()
            self.caller.forget(newest)
            self.counters.preemptions += 1
            self._preempted.append(newest.id)
            chunks.pop(newest.id, None)
            if newest is chunk.sequence:
                return

    def _shared(self, live: Live) -> int:
        """Tokens at the start of a waiting sequence that some row holds. Its last one always runs: it predicts."""
        if live.wants_prompt or len(live.tokens) <= self.pages.size:
            return 0
        if live.names and not self.rows.index.holds(live.names[0]):
            return 0
        names = live.page_names(self.pages.size, len(live.tokens) - 1)
        return self.rows.index.find(names)[0] * self.pages.size

    def _admit(self, live: Live) -> bool:
        """Give a waiting sequence a row and pages; False where there are none, or its prefix is gone since the pick.

        One token more than it has must fit, so that it gets on before it can be preempted again.
        """
        tokens = min(len(live.tokens) + 1, live.prompt + live.limit)
        if not self.rows.free or not self.pages.reserve(live.id, tokens):
            return False
        names = live.page_names(self.pages.size, live.computed)
        placement = self.rows.take(live.id, names)
        live.running, live.row = True, placement.row
        self.caller.place(live, placement, placement.pages * self.pages.size)
        if placement.pages < len(names):  # another one has just taken the row it was in
            live.computed = placement.pages * self.pages.size
        if not live.generated:
            live.cached = live.computed
            self.counters.shared += live.computed
        return placement.pages == len(names)

    def _vacate(self, live: Live) -> None:
        """Free the row and pages of a sequence; what the row holds stays known."""
        if live.running:
            self._remember(live)
            self.rows.release(live.row)
        self.pages.release(live.id)

    def _remember(self, live: Live) -> None:
        """Let others find the pages that a row has been filled with."""
        tokens = min(live.written, len(live.tokens) - live.ahead)
        full = max(tokens, 0) // self.pages.size
        if full > self.rows.index.held(live.row):
            self.rows.index.extend(live.row, live.page_names(self.pages.size, full * self.pages.size))

    def _compact(self) -> None:
        """Move rows down where that shrinks the decode call."""
        while (move := self.rows.move()) is not None:
            source, target = move
            live = next(s for s in self.sequences.values() if s.running and s.row == source)
            live.row = target
            self.caller.move(live, source, target)

    @staticmethod
    def _live(sequence: Sequence) -> Live:
        assert isinstance(sequence, Live)
        return sequence

    # --- reading what a step has sampled -----------------------------------------------------------------------------

    def _read(self, calls: list[Call[Live]]) -> None:
        """Take in the tokens of a step's calls. A row whose sequence ended or was preempted since then is dropped."""
        for call in calls:
            result = self.caller.read(call)
            for index, live, epoch in call.rows:
                if live.id not in self.sequences or live.epoch != epoch:
                    continue
                if call.echo is not None:
                    self._echo(live, call)
                if call.sampled is None:
                    self._remember(live)
                    continue
                if index in call.missed:
                    self.counters.missing += 1
                    continue
                assert result is not None
                self._take(live, Emitted(*result.row(index, live.params.logprobs)))

    def _take(self, live: Live, new: Emitted) -> None:
        """A token was sampled for a sequence: tell its user, and end it where the token says so."""
        if live.limit == 0:
            self.end(live, "length")
            return
        route = new.experts or DENSE
        live.take(new.token, route)
        self.counters.sampled += 1
        if any(call.lacks(live, new.experts) for call in self._flight):
            live.missed()
        self._remember(live)
        if new.token in live.stops:
            self.end(live, "stop")
        elif live.emit(new):
            self._drop(live)
        elif live.generated >= live.limit:
            self.end(live, "length")

    def _drop(self, live: Live) -> None:
        """A stop string has ended a request, whose last event is out."""
        del self.sequences[live.id]
        self._vacate(live)
        self.caller.forget(live)

    def _echo(self, live: Live, call: Call[Live]) -> None:
        live.echoed.extend(self.caller.echoed(live, call))
        if len(live.echoed) >= live.prompt:
            live.tell_prompt()
