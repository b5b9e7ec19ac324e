"""Requests through an engine against each of them alone: the generator's tokens, the masked model's scores."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from fake_programs import COSTS, Ticks
from masked_model import Masked

from readme_jax import config
from readme_jax.generate import Generator
from readme_jax.serving.buckets import Limits
from readme_jax.serving.build import residency_of, slots_of
from readme_jax.serving.calls import Caller
from readme_jax.serving.engine import Engine
from readme_jax.serving.programs import Programs
from readme_jax.serving.request import Completion, Request, SamplingParams
from readme_jax.serving.scheduler import make_scheduler
from readme_jax.serving.store import ExpertStore

MOST_STEPS = 20_000


class Ask(NamedTuple):
    """A prompt, the new tokens that it gets alone, and what the reference thinks: [new tokens, V] log-probabilities."""

    prompt: list[int]
    tokens: list[int]
    scores: np.ndarray


def engine_over(compiled: Programs, model: Any, serving: config.Serving, **options: Any) -> Engine:
    """An engine of its own store and residency over programs that others use too, of which it calls those that fit
    `serving.chunk`."""
    store = ExpertStore(model, slots_of(model, serving, np.float32), serving.staging, mesh=compiled.mesh)
    programs = copy.copy(compiled)
    programs.store = store
    scheduler = make_scheduler(serving.scheduler, serving.budget, COSTS, max(store.num_experts, 1))
    caller = Caller(programs, residency_of(store, serving))
    chunks = tuple(c for c in compiled.limits.chunks if c <= serving.chunk)
    caller.limits = dataclasses.replace(compiled.limits, chunks=chunks)
    options.setdefault("clock", Ticks())
    return Engine(caller, scheduler, serving, model.config.vocab_size, model.tokenizer, **options)


class Bench:
    """A model with programs compiled once for all engines over it, and what each of some requests gets alone.

    `close`: of log-probabilities; where the two best are closer, rounding may choose.
    """

    def __init__(
        self, model: Any, limits: Limits, prompts: Sequence[list[int]], counts: Sequence[int], close: float
    ) -> None:
        self.model, self.close = model, close
        self.programs = Programs(model, ExpertStore(model), limits)
        generator, masked = Generator(model), Masked(model, limits.length)
        self.asks = []
        for prompt, count in zip(prompts, counts, strict=True):
            tokens = generator.generate([prompt], max(counts)).tokens[0][:count]
            self.asks.append(Ask(prompt, tokens, masked([*prompt, *tokens])[len(prompt) - 1 : -1]))

    @property
    def places(self) -> int:
        """New tokens whose choice is too close to call."""
        return sum(_gap(scores) < self.close for ask in self.asks for scores in ask.scores)

    def engine(self, serving: config.Serving, **options: Any) -> Engine:
        """See `engine_over`."""
        return engine_over(self.programs, self.model, serving, **options)

    def check(
        self,
        engine: Engine,
        order: Sequence[int],
        arrivals: Mapping[int, int] | None = None,
        cancelled: Mapping[int, int] | None = None,
    ) -> int:
        """Run the requests `order` through an engine: each arrives before the step that `arrivals` says (0 where it
        does not), and some are cancelled before a step. Assert that everyone's tokens and top-20 log-probabilities are
        the reference's, and that nothing is left; how many places there were where rounding chose."""
        arrivals, cancelled = arrivals or {}, cancelled or {}
        coming: dict[int, list[int]] = {}
        for i in order:
            coming.setdefault(arrivals.get(i, 0), []).append(i)
        handles: dict[int, Any] = {}
        for step in range(MOST_STEPS):
            for i in coming.pop(step, []):
                handles[i] = self._submit(engine, self.asks[i].prompt, len(self.asks[i].tokens))
            for i in (i for i, at in cancelled.items() if at == step and i in handles):
                handles[i].cancel()
            if not engine.step() and not coming:
                break
        close = 0
        for i in order:
            got, (prompt, tokens, scores) = handles[i].result(), self.asks[i]
            if got.finish_reason == "cancelled":
                assert i in cancelled
                tokens = tokens[: len(got.tokens)]
            else:
                assert got.finish_reason == "length"
            close += self._agree(engine, prompt, got, tokens, scores)
        assert_nothing_left(engine)
        return close

    def _agree(self, engine: Engine, prompt: list[int], got: Completion, wanted: list[int], scores: Any) -> int:
        """Assert equal tokens and scores; where the two best are too close go on from what was wanted. How many such
        places."""
        assert len(got.tokens) == len(wanted) == len(got.logprobs)
        for at, (token, other) in enumerate(zip(got.tokens, wanted, strict=True)):
            self._scored(token, got.logprobs[at], scores[at])
            if token == other:
                continue
            assert abs(scores[at, other] - scores[at, token]) < self.close and _gap(scores[at]) < self.close
            rest = wanted[at + 1 :]
            if not rest:
                return 1
            forced = prompt + wanted[: at + 1]
            handle = self._submit(engine, forced, len(rest))
            run_out(engine)
            return 1 + self._agree(engine, forced, handle.result(), rest, scores[at + 1 :])
        return 0

    def _scored(self, token: int, found: Any, scores: np.ndarray) -> None:
        tokens, logprobs = (np.asarray(x) for x in zip(*found.top, strict=True))
        assert (token, found.logprob) == found.top[0] and len(set(tokens.tolist())) == 20  # the identical float
        np.testing.assert_allclose(logprobs, np.sort(np.partition(scores, -20)[-20:])[::-1], atol=self.close, rtol=0)
        np.testing.assert_allclose(logprobs, scores[tokens], atol=self.close, rtol=0)

    @staticmethod
    def _submit(engine: Engine, prompt: list[int], count: int) -> Any:
        return engine.submit(Request(prompt, SamplingParams(max_tokens=count, logprobs=20, ignore_eos=True)))


def run_out(engine: Engine) -> None:
    """Step until there is nothing to do."""
    for _ in range(MOST_STEPS):
        if not engine.step():
            return
    raise AssertionError(engine.stats())


def assert_nothing_left(engine: Engine) -> None:
    """No request, row, page, routed prompt or step is held."""
    stats, loop = engine.stats(), engine._loop
    assert (stats.waiting, stats.running) == (0, 0)
    assert (stats.free_rows, stats.free_pages) == (loop.rows.count, loop.pages.total)
    assert not loop.sequences and not loop.caller._routed and not loop._flight


def _gap(scores: np.ndarray) -> float:
    """Between the two best of log-probabilities [V]."""
    second, first = np.partition(scores, -2)[-2:]
    return float(first - second)
