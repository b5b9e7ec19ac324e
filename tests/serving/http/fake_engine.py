"""An engine without a model: the next token's distribution is a function of the tokens before it, and of nothing else.

It keeps the real one's promises (bounded queue, cancel, drain), one thread, and can be held between two steps.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from readme_jax import config
from readme_jax.checkpoints.tokenizer import Tokenizer
from readme_jax.serving.engine import PromptRoute
from readme_jax.serving.request import (
    Event,
    Overloaded,
    Request,
    RequestError,
    TokenLogprob,
    Usage,
    check_tokens,
)

EXPERTS = 3


class FakeModel:
    """Distributions over the byte tokenizer's ids. After a full stop comes the end of the text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.size = tokenizer.vocab_size
        self.printable = [tokenizer.encode(chr(c))[0] for c in range(32, 127)]
        self.stop, self.end = tokenizer.encode(".")[0], tokenizer.eos_ids[0]

    def logprobs(self, prefix: Sequence[int]) -> np.ndarray:
        """Log-probabilities [V] of what follows; printable bytes are likely, end-of-text is not."""
        rng = np.random.default_rng(zlib.crc32(np.asarray(prefix, np.int64).tobytes()))
        logits = rng.normal(0, 2, self.size)
        logits[self.printable] += 8
        if prefix and prefix[-1] == self.stop:
            logits[self.end] = 30
        return (logits - np.log(np.exp(logits).sum())).astype(np.float32)

    def scored(self, prefix: Sequence[int], token: int | None, top: int) -> TokenLogprob:
        """A token (None: the likeliest) with its alternatives."""
        row = self.logprobs(prefix)
        order = np.argsort(-row, kind="stable")
        token = int(order[0]) if token is None else token
        return TokenLogprob(token, float(row[token]), tuple((int(t), float(row[t])) for t in order[:top]))


class Running:
    """A request on its way."""

    def __init__(self, engine: FakeEngine, request: Request, prompt: list[int], listener: Callable[[Event], None]):
        self.engine, self.request, self.prompt, self.listener = engine, request, prompt, listener
        self.tokens: list[int] = []
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True
        self.engine.wake()


class FakeEngine:
    """See the module. `rows` run at once, `queue` more may wait."""

    def __init__(self, tokenizer: Tokenizer, rows: int = 4, queue: int = 8, context: int = 512) -> None:
        self.model, self.tokenizer = FakeModel(tokenizer), tokenizer
        self.rows, self.queue, self.context = rows, queue, context
        self.requests: list[Running] = []
        self.finished: Counter[str] = Counter()
        self.seen: list[Request] = []
        self.gate = threading.Event()  # closed: no steps
        self.gate.set()
        self.pace = 0.0  # seconds a step
        self.changed = threading.Condition()
        self.stopping = self.draining = False
        self.healthy = self.ready = True
        self.thread = threading.Thread(target=self._loop, daemon=True)

    @property
    def settings(self) -> config.Serving:
        return config.Serving(queue=self.rows + max(self.queue, 0))

    def start(self, progress: Any = None) -> None:
        self.thread.start()

    def drain(self) -> None:
        with self.changed:
            self.draining = True
            self.changed.wait_for(lambda: not self.requests)

    def stop(self) -> None:
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
        self.thread.join()

    def wake(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def check_room(self) -> None:
        if len(self.requests) >= self.rows + self.queue:
            raise Overloaded("full", 2.0)

    def route(self, prompt: Any) -> PromptRoute:
        tokens = self._tokens(prompt, True)
        experts = [(t % EXPERTS,) for t in tokens]
        load = tuple(sorted({e for (e,) in experts} - {0}))
        return PromptRoute(tokens, experts, load, 1000 * len(load))

    def submit(self, request: Request, listener: Callable[[Event], None]) -> Running:
        self.check_room()
        prompt = self._tokens(request.prompt, request.special)
        if len(prompt) + (request.params.max_tokens or 0) > self.context:
            raise RequestError("prompt", f"{len(prompt)} tokens: the context has {self.context}")
        running = Running(self, request, prompt, listener)
        with self.changed:
            self.seen.append(request)
            self.requests.append(running)
            self.changed.notify_all()
        return running

    def _tokens(self, prompt: Any, special: bool) -> list[int]:
        tokens = self.tokenizer.encode(prompt, special) if isinstance(prompt, str) else prompt
        if not tokens:
            raise RequestError("prompt", "is empty")
        return check_tokens("prompt", tokens, self.model.size)

    def _loop(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.requests or self.stopping)
                if self.stopping:
                    return
                running = self.requests[: self.rows]
            self._cancel(list(self.requests))
            if not self.gate.wait(0.01):
                continue
            time.sleep(self.pace)
            for one in running:
                if one in self.requests:
                    self._step(one)

    def _cancel(self, requests: list[Running]) -> None:
        for one in requests:
            if one.cancelled:
                self._end(one, Event(finish_reason="cancelled", usage=self._usage(one)))

    def _step(self, one: Running) -> None:
        params, first = one.request.params, not one.tokens
        prompt_logprobs: tuple[TokenLogprob, ...] = ()
        if first and params.echo:
            top = params.logprobs or 0
            later = (self.model.scored(one.prompt[:i], one.prompt[i], top) for i in range(1, len(one.prompt)))
            prompt_logprobs = (TokenLogprob(one.prompt[0], None, ()), *later)
        if params.max_tokens == 0:
            self._end(one, Event(prompt_logprobs=prompt_logprobs, finish_reason="length", usage=self._usage(one)))
            return
        found = self.model.scored([*one.prompt, *one.tokens], None, params.logprobs or 0)
        one.tokens.append(found.token)
        if found.token == self.model.end and not params.ignore_eos:
            self._end(one, Event(prompt_logprobs=prompt_logprobs, finish_reason="stop", usage=self._usage(one)))
            return
        text = self.tokenizer.decode([found.token])
        logprobs = (found,) if params.logprobs is not None else ()
        reason: Any = None
        if found.token in params.stop_ids or text in params.stop:
            text, reason = "", "stop"
        elif len(one.tokens) == (params.max_tokens or 24):
            reason = "length"
        usage = self._usage(one) if reason else None
        event = Event(text, (found.token,), ((0,),), logprobs, prompt_logprobs, reason, usage)
        if reason:
            self._end(one, event)
        else:
            one.listener(event)

    def _usage(self, one: Running) -> Usage:
        return Usage(len(one.prompt), 0, len(one.tokens))

    def _end(self, one: Running, event: Event) -> None:
        with self.changed:
            self.requests.remove(one)
            self.finished[str(event.finish_reason)] += 1
            self.changed.notify_all()
        one.listener(event)
