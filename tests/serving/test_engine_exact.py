"""The engine's tokens and log-probabilities against one request alone, over schedulers, slots, policies and sizes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from fake_programs import COSTS, Ticks
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
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

pytestmark = pytest.mark.usefixtures("quickly_compiled")
ROWS, LENGTH, CHUNKS = 4, 48, (4, 16)
CLOSE = 1e-4  # of log-probabilities; where the two best are closer, rounding may choose
REQUESTS = 24


@dataclass
class Bench:
    """A model with programs compiled once, and what each request gets alone."""

    model: Any
    programs: Programs
    prompts: list[list[int]]
    counts: list[int]
    alone: list[list[int]]

    def engine(self, serving: config.Serving) -> Engine:
        """An engine of its own store and residency over the shared programs."""
        store = ExpertStore(self.model, slots_of(self.model, serving, np.float32), serving.staging)
        programs = copy.copy(self.programs)
        chunks = tuple(c for c in CHUNKS if c <= serving.chunk)
        programs.store, programs.limits = store, dataclasses.replace(self.programs.limits, chunks=chunks)
        scheduler = make_scheduler(serving.scheduler, serving.budget, COSTS, max(store.num_experts, 1))
        caller = Caller(programs, residency_of(store, serving))
        return Engine(caller, scheduler, serving, self.model.config.vocab_size, self.model.tokenizer, clock=Ticks())


@pytest.fixture(scope="module")
def bench(tiny_model):
    @functools.cache
    def build(kind: str) -> Bench:
        jax.config.update("jax_disable_most_optimizations", True)
        model = tiny_model(kind)
        limits = Limits(ROWS, LENGTH, chunks=CHUNKS, decode=(ROWS,))
        programs = Programs(model, ExpertStore(model), limits)
        rng = random.Random(kind)
        shared = [rng.randrange(260) for _ in range(13)]
        prompts = [[rng.randrange(260) for _ in range(rng.randrange(1, 30))] for _ in range(REQUESTS)]
        prompts = [shared + p[:10] if i % 4 == 3 else p for i, p in enumerate(prompts)]
        counts = [rng.randrange(1, 16) for _ in prompts]
        generator = Generator(model)
        alone = [generator.generate([p], 16).tokens[0] for p in prompts]
        return Bench(model, programs, prompts, counts, alone)

    return build


def run_out(engine: Engine, most: int = 5000) -> None:
    for _ in range(most):
        if not engine.step():
            return
    raise AssertionError(engine.stats())


def check_exact(bench: Bench, engine: Engine, indices: list[int], cancelled: dict[int, int]) -> int:
    """Run requests, some cancelled at a step; the number of places where the two best tokens were too close to call."""
    handles = {}
    for i in indices:
        params = SamplingParams(max_tokens=bench.counts[i], logprobs=2, ignore_eos=True)
        handles[i] = engine.submit(Request(bench.prompts[i], params))
    for step in range(5000):
        for i in (i for i, at in cancelled.items() if at == step):
            handles[i].cancel()
        if not engine.step():
            break
    close = 0
    for i in indices:
        got, wanted = handles[i].result(), bench.alone[i][: bench.counts[i]]
        if got.finish_reason == "cancelled":
            assert i in cancelled
            wanted = wanted[: len(got.tokens)]
        close += agree(engine, bench.prompts[i], got, wanted)
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.free_rows) == (0, 0, ROWS)
    assert stats.free_pages == engine._loop.pages.total
    return close


def agree(engine: Engine, prompt: list[int], got: Completion, wanted: list[int]) -> int:
    """Assert equal tokens; where the two best are too close go on from what was wanted. How many such places."""
    for at, (token, other) in enumerate(zip(got.tokens, wanted, strict=True)):
        if token == other:
            continue
        first, second = got.logprobs[at].top
        assert other == second[0] and first[1] - second[1] < CLOSE, (at, got.logprobs[at], other)
        rest = wanted[at + 1 :]
        if not rest:
            return 1
        again = prompt + wanted[: at + 1]
        handle = engine.submit(Request(again, SamplingParams(max_tokens=len(rest), logprobs=2, ignore_eos=True)))
        run_out(engine)
        return 1 + agree(engine, again, handle.result(), rest)
    return 0


SETTINGS = st.fixed_dictionaries(
    {
        "scheduler": st.sampled_from(["decode_first", "prefill_first", "algorithm1", "lookahead"]),
        "slots": st.sampled_from([0, 1, 2]),  # of three experts
        "staging": st.sampled_from([0, 1]),
        "policy": st.sampled_from(["belady", "lru", "random"]),
        "prefetch": st.booleans(),
        "ahead": st.booleans(),
        "chunk": st.sampled_from([4, 16]),
        "page_size": st.sampled_from([1, 3, 8]),
        "budget": st.sampled_from([5, 40]),
        "scarce": st.booleans(),  # so few pages that sequences are preempted
    }
)


@pytest.mark.parametrize("kind", ["top1", "top2"])
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
@given(chosen=SETTINGS, data=st.data())
def test_tokens_are_those_of_the_request_alone(bench, kind, chosen, data):
    model = bench(kind)
    chosen = dict(chosen)
    if kind == "top2" and 0 < chosen["slots"] + chosen["staging"] < 2:
        chosen["slots"] = 2  # a token's experts have to fit
    if chosen.pop("scarce"):
        chosen["pages"] = -(-LENGTH // chosen["page_size"])
    serving = config.Serving(rows=ROWS, length=LENGTH, queue=1000, **chosen)
    indices = data.draw(st.permutations(range(REQUESTS)))
    cancelled = data.draw(st.dictionaries(st.integers(0, REQUESTS - 1), st.integers(0, 40), max_size=6))
    assert check_exact(model, model.engine(serving), indices, cancelled) <= 2


def test_the_sizes_above_do_preempt_share_and_miss(bench):
    model = bench("top1")
    serving = config.Serving(
        rows=ROWS, length=LENGTH, page_size=3, pages=16, budget=40, chunk=16, slots=2, scheduler="decode_first"
    )
    engine = model.engine(serving)
    check_exact(model, engine, list(range(REQUESTS)), {})
    stats = engine.stats()
    assert stats.preemptions > 0 and stats.shared_tokens > 0 and stats.missing > 0 and stats.loads > 0


@pytest.mark.parametrize("kind, slots", [("top1", 1), ("top2", 2), ("dense", 0)])
def test_top_twenty_logprobs_are_the_masked_models(bench, kind, slots):
    model = bench(kind)
    serving = config.Serving(
        rows=ROWS, length=LENGTH, page_size=4, pages=24, budget=20, chunk=16, slots=slots, scheduler="algorithm1"
    )
    engine, masked = model.engine(serving), Masked(model.model, LENGTH)
    params = {"logprobs": 20, "echo": True, "ignore_eos": True}
    handles = [
        engine.submit(Request(p, SamplingParams(max_tokens=n, temperature=0.7 * (i % 2), seed=i, **params)))
        for i, (p, n) in enumerate(zip(model.prompts[:12], model.counts, strict=False))
    ]
    run_out(engine)
    for i, (prompt, handle) in enumerate(zip(model.prompts, handles, strict=False)):
        done = handle.result()
        tokens = [*prompt, *done.tokens]
        wanted = masked(tokens)
        assert [p.token for p in done.prompt_logprobs] == prompt and done.prompt_logprobs[0].logprob is None
        for at, each in enumerate([*done.prompt_logprobs, *done.logprobs][1:]):
            assert each.token == tokens[at + 1]
            np.testing.assert_allclose(each.logprob, wanted[at, each.token], atol=CLOSE)
            np.testing.assert_allclose([p for _, p in each.top], np.sort(wanted[at])[::-1][:20], atol=CLOSE)
            np.testing.assert_allclose([p for _, p in each.top], wanted[at][[t for t, _ in each.top]], atol=CLOSE)
        if i % 2 == 0:
            assert all(p.logprob == p.top[0][1] and p.token == p.top[0][0] for p in done.logprobs)  # the same float


def test_a_seed_fixes_the_sample_whatever_else_runs(bench):
    model = bench("top1")
    ask = Request(model.prompts[5], SamplingParams(max_tokens=12, temperature=1.0, seed=7, top_p=0.9, ignore_eos=True))
    crowded = model.engine(config.Serving(rows=ROWS, length=LENGTH, page_size=4, pages=20, budget=9, chunk=4, slots=1))
    others = [crowded.submit(Request(p, SamplingParams(max_tokens=9, temperature=1.0))) for p in model.prompts[:8]]
    among = crowded.submit(ask)
    run_out(crowded)
    alone = model.engine(config.Serving(rows=ROWS, length=LENGTH, chunk=16))
    single, again = alone.submit(ask), alone.submit(ask)
    other = alone.submit(dataclasses.replace(ask, params=dataclasses.replace(ask.params, seed=8)))
    run_out(alone)
    tokens = single.result().tokens
    assert tokens == among.result().tokens == again.result().tokens != other.result().tokens
    assert all(len(o.result().tokens) for o in others)
