"""The engine: requests in from any thread, events out, one thread that owns the loop.

    engine = Engine.build(model, config.Serving())
    engine.start()
    for event in engine.submit(Request("Once upon a time")):
        print(event.text, end="")
    engine.stop()

Tests, and whoever wants no thread, call `step` instead of `start`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from readme_jax import config
from readme_jax.checkpoints.tokenizer import Tokenizer
from readme_jax.errors import ReadMeError
from readme_jax.serving.calls import Caller
from readme_jax.serving.live import Listener, Live
from readme_jax.serving.loop import Logged, Loop
from readme_jax.serving.pages import Pages
from readme_jax.serving.request import (
    Completion,
    Event,
    Overloaded,
    Request,
    RequestError,
    check_tokens,
    complete,
)
from readme_jax.serving.rows import Rows
from readme_jax.serving.scheduler import Scheduler
from readme_jax.serving.text import Transcript
from readme_jax.serving.work import Route

log = logging.getLogger(__name__)
STALLED = 60.0  # seconds of one step after which the engine counts as stalled
RECENT = 32  # finished requests from which the pace is estimated


class Draining(Overloaded):
    """The engine is shutting down, or has failed for good, and takes no new requests."""


class _Stopped(Exception):
    """The engine was stopped in its warm-up."""


@dataclass(frozen=True)
class Stats:
    """How the engine is doing."""

    waiting: int  # requests without a row, those not yet routed included
    running: int
    free_rows: int
    free_pages: int
    steps: int
    last_step: float  # seconds it took
    idle: bool
    since_step: float  # seconds since the last one ended, or since the engine began to wait
    tokens: int  # run, prompts' and new ones
    sampled: int
    missing: int  # rows run again because their expert was not there
    preemptions: int
    shared_tokens: int
    finished: int
    refused: int
    failures: int  # steps that raised
    resident: tuple[int, ...]  # experts on the device
    loads: int  # copies of an expert of a layer to the device
    bytes_loaded: int
    hits: int  # experts of batches that were resident
    misses: int
    swaps: int  # residents replaced in the background
    foreseen: int  # loads for a call's layers, decided on at least their time before the call could begin
    late: int  # those of them that had not arrived then
    overhead: float  # share of the steps' time outside jitted calls
    compilations: int


@dataclass(frozen=True)
class PromptRoute:
    """Which experts a prompt's tokens will use, and what bringing the missing ones to the device would move."""

    tokens: list[int]
    experts: list[Route]
    load: tuple[int, ...]  # experts that are not on the device
    load_bytes: int  # of these in all layers


class Handle:
    """A request under way: iterate its events as they come, or wait for the `result`."""

    def __init__(self, id: int, cancel: Callable[[int], None]) -> None:
        self.id = id
        self._cancel = cancel
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[Event]:
        """Events up to and with the one that has a finish reason. Iterate once."""
        while True:
            event = self._events.get()
            yield event
            if event.finish_reason is not None:
                return

    def result(self) -> Completion:
        """Wait for the end. In place of iterating."""
        return complete(list(self))

    def cancel(self) -> None:
        """Give up; harmless after the end. The last event, "cancelled", comes within a step."""
        self._cancel(self.id)


class Engine:
    """Serves one model. All methods may be called from any thread; `step` only where `start` was not."""

    def __init__(
        self,
        caller: Caller,
        scheduler: Scheduler,
        settings: config.Serving,
        vocab_size: int,
        tokenizer: Tokenizer | None = None,
        clock: Callable[[], float] = time.monotonic,
        step_log: Callable[[Logged], None] | None = None,
    ) -> None:
        """See `build`. `clock` is read for arrivals and steps, `step_log` is told of each decision."""
        limits = caller.limits
        pages = Pages(settings.pages or -(-limits.rows * limits.length // settings.page_size), settings.page_size)
        rows = Rows(limits.rows, limits.decode)
        self.settings, self.tokenizer, self.vocab_size = settings, tokenizer, vocab_size
        self.context = min(limits.length, pages.total * pages.size)  # tokens of the longest prompt and answer
        self._loop = Loop(caller, scheduler, rows, pages, clock, settings.ahead, step_log)
        self._caller, self._clock = caller, clock
        self._wake = threading.Condition()
        self._inbox: deque[Live] = deque()
        self._cancelled: deque[int] = deque()
        self._thread: threading.Thread | None = None
        self._stopping, self._draining, self._warm, self._dead = False, False, False, False
        self._next_id, self._queued = 0, 0
        self._finished, self._refused, self._failures = 0, 0, 0
        self._ends: deque[float] = deque([clock()], maxlen=RECENT)
        self._last_step, self._step_end, self._stepping = 0.0, clock(), False
        self._seeds = np.random.default_rng()

    @classmethod
    def build(cls, model: Any, settings: config.Serving | None = None, **options: Any) -> Engine:
        """An engine over a `Dense` or `Mixture`; `options` are those of `__init__`.

        Raises ConfigError where the settings do not fit the model, CheckpointError for a mixture without its router.
        """
        from readme_jax.serving.build import build_engine

        return build_engine(cls, model, config.Serving() if settings is None else settings, **options)

    # --- for callers ---------------------------------------------------------------------------------------------

    def submit(self, request: Request, listener: Listener | None = None) -> Handle:
        """Take in a request; returns at once.

        `listener` is told each event on the engine's thread, in place of the handle's queue: it must return at once.
        Raises RequestError, naming the field, for a request that can never be served; Overloaded when the queue is
        full; Draining after `drain` or `stop`, and once the engine has failed for good.
        """
        self.check_room()
        tokens = self._tokens(request.prompt, request.special)
        limit = self._limit(tokens, request)
        params = request.params
        stops = self._stops(request)
        if params.stop and self.tokenizer is None:
            raise RequestError("stop", "the model has no tokenizer: give stop_ids")
        with self._wake:
            self._check_queue()
            self._next_id += 1
            id = self._next_id
            handle = Handle(id, self.cancel)
            seed = int(self._seeds.integers(2**32)) if params.seed is None else params.seed % 2**32
            transcript: Transcript[Any] = Transcript(self.tokenizer, params.stop)
            tell = listener or handle._events.put
            live = Live(id, self._clock(), tokens, params, limit, stops, transcript, self._counting(tell), seed)
            self._inbox.append(live)
            self._queued += 1
            self._wake.notify_all()
        return handle

    def check_room(self) -> None:
        """Raise Overloaded or Draining where `submit` would: before any work is done for a request."""
        with self._wake:
            self._check_queue()

    def cancel(self, id: int) -> None:
        """End a request, by its handle's id, within a step."""
        with self._wake:
            self._cancelled.append(id)
            self._wake.notify_all()

    def route(self, prompt: str | list[int], special: bool = True) -> PromptRoute:
        """The experts of a prompt, without generating anything. Raises RequestError as `submit` does."""
        tokens = self._tokens(prompt, special)
        if len(tokens) > self.context:
            raise RequestError("prompt", f"{len(tokens)} tokens: at most {self.context}")
        experts = [tuple(row) for row in self._caller.programs.route(tokens).experts.tolist()]
        residency = self._caller.residency
        missing = {e for route in experts for e in route} - residency.here
        size = residency.store.expert_bytes * residency.store.num_layers
        return PromptRoute(tokens, experts, tuple(sorted(missing)), len(missing) * size)

    def stats(self) -> Stats:
        """Figures of now; cheap."""
        loop, residency = self._loop, self._caller.residency
        store, cache = residency.store, residency.cache
        alive = list(loop.sequences.values())
        running = sum(s.running for s in alive)
        c = loop.counters
        return Stats(
            waiting=self._queued + len(alive) - running,
            running=running,
            free_rows=loop.rows.free,
            free_pages=loop.pages.free,
            steps=c.steps,
            last_step=self._last_step,
            idle=not self._stepping,
            since_step=self._clock() - self._step_end,
            tokens=c.tokens,
            sampled=c.sampled,
            missing=c.missing,
            preemptions=c.preemptions,
            shared_tokens=c.shared,
            finished=self._finished,
            refused=self._refused,
            failures=self._failures,
            resident=tuple(sorted(self._caller.residency.here)),
            loads=store.loads,
            bytes_loaded=store.bytes_loaded,
            hits=cache.hits if cache else 0,
            misses=cache.misses if cache else 0,
            swaps=c.swaps,
            foreseen=self._caller.streams.foreseen,
            late=self._caller.streams.late,
            overhead=1 - c.calling / c.stepping if c.stepping else 0.0,
            compilations=self._caller.programs.compilations,
        )

    @property
    def ready(self) -> bool:
        """Whether requests are served: programs are compiled, the thread lives, no step hangs."""
        alive = self._thread is not None and self._thread.is_alive()
        return alive and self._warm and not self._draining and self.healthy

    @property
    def healthy(self) -> bool:
        """Whether the engine has made a step lately, or is idle or still compiling; not once its thread has died."""
        return not self._dead and (not self._stepping or self._clock() - self._step_end < STALLED)

    # --- running -------------------------------------------------------------------------------------------------

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Compile all programs, `progress(done, total)` after each; returns how many there are."""
        count = self._caller.programs.warm_up(progress)
        self._warm = True
        return count

    def start(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Start the thread. It compiles first: `ready` says when that is done; requests may queue meanwhile."""
        if self._thread is not None:
            raise ReadMeError("the engine was started before")
        self._thread = threading.Thread(target=self._live, args=(progress,), name="engine", daemon=True)
        self._thread.start()

    def step(self) -> bool:
        """Take in what is new, run one step; False when there was nothing to do."""
        with self._wake:
            arrived, cancelled = list(self._inbox), list(self._cancelled)
            self._inbox.clear()
            self._cancelled.clear()
            self._stepping, began = True, self._clock()  # whoever is taken in has arrived before it
        gone = set(cancelled)
        for live in arrived:
            self._take_in(live, live.id in gone)
        for id in cancelled:
            self._loop.cancel(id)
        worked = self._loop.step(began)
        self._step_end = self._clock()
        self._last_step = self._step_end - began
        self._stepping = self._loop.busy
        return worked or bool(arrived) or bool(cancelled)

    def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests and wait until those taken in have ended; False when `timeout` seconds did not do."""
        with self._wake:
            self._draining = True
            self._wake.notify_all()
            return self._wake.wait_for(self._empty, timeout)

    def stop(self) -> None:
        """End the thread; requests that are still alive end as cancelled."""
        with self._wake:
            self._draining = self._stopping = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
        for live in [*self._inbox, *self._loop.abandon()]:
            live.end("cancelled")
        self._inbox.clear()
        self._queued = 0

    # --- inside --------------------------------------------------------------------------------------------------

    def _live(self, progress: Callable[[int, int], None] | None) -> None:
        """The thread's life: nobody waits for it in vain, however it ends."""
        try:
            self._serve(progress)
        except _Stopped:
            pass
        except Exception as error:  # in the warm-up, or in beginning anew after a failed step
            log.exception("the engine cannot go on")
            with self._wake:
                self._dead, self._stepping, self._queued = True, False, 0
                lost = [*self._inbox, *self._loop.abandon()]
                self._inbox.clear()
                self._wake.notify_all()  # whoever drains
            for live in lost:
                live.end("error", _failure(error))

    def _serve(self, progress: Callable[[int, int], None] | None) -> None:
        def compiled(done: int, total: int) -> None:
            if progress is not None:
                progress(done, total)
            if self._stopping and done < total:
                raise _Stopped

        self.warm_up(compiled)
        while True:
            with self._wake:
                self._wake.notify_all()  # whoever drains
                self._wake.wait_for(lambda: self._stopping or not self._empty() or self._cancelled)
                if self._stopping:
                    return
                self._step_end = self._clock()
            try:
                self.step()
            except Exception as error:
                log.exception("a step failed; its requests end with an error and the engine goes on")
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failures += 1
        self._stepping = False
        for live in self._loop.abandon():
            live.end("error", _failure(error))
        traceback.clear_frames(error.__traceback__)  # which hold the step's caches
        self._caller.reset()

    def _take_in(self, live: Live, cancelled: bool) -> None:
        try:
            if cancelled:
                live.end("cancelled")
            else:
                self._loop.add(live)
        except Exception as error:  # of the device: the request has its last event whatever happens
            log.exception("a prompt could not be routed")
            live.end("error", _failure(error))
        with self._wake:
            self._queued -= 1

    def _empty(self) -> bool:
        return not self._inbox and not self._loop.busy

    def _counting(self, tell: Listener) -> Listener:
        def count(event: Event) -> None:
            if event.finish_reason is not None:
                self._finished += 1
                self._ends.append(self._clock())
            try:
                tell(event)
            except Exception:  # the listener's trouble, for instance a closed connection, is not the engine's
                log.exception("a listener failed")

        return count

    def _check_queue(self) -> None:
        """Raise where no request is taken in; under the lock."""
        if self._dead:
            raise Draining("the engine has failed: see the server's log", 1.0)
        if self._draining:
            raise Draining("the server is shutting down", 1.0)
        waiting = self._queued + self._loop.waiting
        if waiting >= self.settings.queue:
            self._refused += 1
            pace = (self._clock() - self._ends[0]) / len(self._ends)
            retry = min(max(pace, 1.0), 60.0)
            raise Overloaded(f"{waiting} requests are waiting: try again in {retry:.0f} s", retry)

    def _tokens(self, prompt: Any, special: bool) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("prompt", "the model has no tokenizer: give token ids")
            tokens = self.tokenizer.encode(prompt, special)
        elif isinstance(prompt, list | tuple | np.ndarray):
            tokens = list(prompt)
        else:
            raise RequestError("prompt", f"{type(prompt).__name__}: must be text or a list of token ids")
        if not tokens:
            raise RequestError("prompt", "it is empty: give at least one token")
        if len(tokens) > self.context:
            raise RequestError("prompt", f"{len(tokens)} tokens: the context holds {self.context}")
        return check_tokens("prompt", tokens, self.vocab_size)

    def _limit(self, tokens: list[int], request: Request) -> int:
        """Most new tokens."""
        left = self.context - len(tokens)
        wanted = request.params.max_tokens
        if wanted is None and left < 1:
            raise RequestError("prompt", f"{len(tokens)} tokens fill the context of {self.context}: no room to answer")
        if wanted is not None and wanted > left:
            raise RequestError(
                "max_tokens",
                f"{wanted} after a prompt of {len(tokens)} tokens: the context holds {self.context}",
            )
        return left if wanted is None else wanted

    def _stops(self, request: Request) -> frozenset[int]:
        own = check_tokens("stop_ids", request.params.stop_ids, self.vocab_size)
        ends = () if self.tokenizer is None or request.params.ignore_eos else self.tokenizer.eos_ids
        return frozenset((*own, *ends))


def _failure(error: Exception) -> str:
    return f"the engine failed: {type(error).__name__}"
