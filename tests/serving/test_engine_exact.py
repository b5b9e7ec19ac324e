"""The engine's tokens and log-probabilities against one request alone, over schedulers, slots, policies and sizes.

Every two settings meet in some case here; `make sweep` goes on with combinations drawn anew each time.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alone import Ask, Bench, run_out
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from masked_model import Masked
from pairwise import all_pairs, pairs_of, pairwise

from readme_jax import config
from readme_jax.serving.buckets import Limits
from readme_jax.serving.programs import Programs
from readme_jax.serving.request import Request, SamplingParams
from readme_jax.serving.store import ExpertStore

pytestmark = pytest.mark.usefixtures("quickly_compiled")
EXPERTS, ROWS, LENGTH, CHUNKS = 7, 4, 48, (3, 8, 16)
CLOSE = 1e-4  # of log-probabilities; where the two best are closer, rounding may choose
REQUESTS = 64
KINDS = {1: "top1", 2: "top2"}
FACTORS = {
    "scheduler": ["decode_first", "prefill_first", "algorithm1", "lookahead"],
    "slots": [1, 2, 3, 5, 7],
    "policy": ["belady", "lru", "random"],
    "prefetch": [False, True],
    "chunk": list(CHUNKS),
    "page_size": [1, 3, 8],
    "top_k": [1, 2],
    "staging": [0, 1],
    "ahead": [False, True],
    "budget": [5, 40],
    "scarce": [False, True],  # so few pages that sequences are preempted
    "by_span": [True, False],  # how a decode call runs where nothing streams
}
CASES = pairwise(FACTORS, seed=5)


@pytest.fixture(scope="module")
def bench(tiny_model):
    @functools.cache
    def build(kind: str) -> Bench:
        jax.config.update("jax_disable_most_optimizations", True)
        rng = random.Random(kind)
        shared = [rng.randrange(260) for _ in range(13)]
        prompts = [[rng.randrange(260) for _ in range(rng.randrange(1, 30))] for _ in range(REQUESTS)]
        prompts = [shared + p[:10] if i % 4 == 3 else p for i, p in enumerate(prompts)]
        counts = [rng.randrange(1, 16) for _ in prompts]
        model = tiny_model(kind, experts=EXPERTS)
        return Bench(model, Limits(ROWS, LENGTH, chunks=CHUNKS, decode=(ROWS,)), prompts, counts, CLOSE)

    return build


def serving(**chosen: Any) -> config.Serving:
    return config.Serving(**{"rows": ROWS, "length": LENGTH, "queue": 1000, **chosen})


def check(bench: Any, chosen: dict[str, Any], seed: int) -> None:
    """All requests in a random order, arriving while others run, every eighth cancelled at some time."""
    chosen, rng = dict(chosen), random.Random(seed)
    top_k = chosen.pop("top_k")
    chosen["staging"] = max(chosen["staging"], top_k - chosen["slots"])  # a token's experts have to fit
    if chosen.pop("scarce"):
        chosen["pages"] = -(-LENGTH // chosen["page_size"])
    model, order = bench(KINDS[top_k]), rng.sample(range(REQUESTS), REQUESTS)
    arrivals = {i: rng.randrange(120) for i in order if i % 2}
    cancelled = {i: arrivals.get(i, 0) + rng.randrange(40) for i in order[::8]}
    with patch.object(Programs, "by_span", chosen.pop("by_span")):
        engine = model.engine(serving(**chosen))
        assert model.check(engine, order, arrivals, cancelled) <= model.places
    assert (engine.stats().misses > 0) == (chosen["slots"] < EXPERTS)


def test_the_cases_cover_every_pair():
    assert all_pairs(FACTORS) == set().union(*(pairs_of(case) for case in CASES))


@pytest.mark.parametrize("number", range(len(CASES)))
def test_tokens_and_logprobs_are_those_of_the_request_alone(bench, number):
    check(bench, CASES[number], number)


SETTINGS = st.fixed_dictionaries(
    {
        **{name: st.sampled_from(values) for name, values in FACTORS.items()},
        "slots": st.integers(1, EXPERTS),
        "staging": st.integers(0, 3),
        "page_size": st.integers(1, 20),
        "budget": st.integers(1, 60),
    }
)
ANY = dict(deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])


@settings(max_examples=5, derandomize=True, **ANY)
@given(SETTINGS, st.integers(0, 2**32))
def test_other_settings(bench, chosen, seed):
    check(bench, chosen, seed)


@pytest.mark.sweep
@settings(max_examples=200, **ANY)
@given(SETTINGS, st.integers(0, 2**32))
def test_many_other_settings(bench, chosen, seed):
    check(bench, chosen, seed)


def test_the_sizes_above_do_preempt_share_and_miss(bench):
    model = bench("top1")
    engine = model.engine(serving(page_size=3, pages=16, budget=40, chunk=16, slots=2, scheduler="decode_first"))
    model.check(engine, range(REQUESTS))
    stats = engine.stats()
    assert stats.preemptions > 0 and stats.shared_tokens > 0 and stats.missing > 0 and stats.loads > 0


def test_where_rounding_chose_the_comparison_goes_on_from_the_reference(bench):
    """Two tokens of equal logits: the one that is not taken may be wanted, a third one may not."""
    model = copy.copy(bench("dense"))
    prompt, first = model.asks[0].prompt, model.asks[0].tokens[0]
    twin = (first + 1) % 260
    table = "lm_head" if "lm_head" in model.model.params else "embed"
    rows = np.array(model.model.params[table])
    rows[max(first, twin)] = rows[min(first, twin)] = rows[first]
    model.model = dataclasses.replace(model.model, params={**model.model.params, table: jnp.asarray(rows)})
    model.programs = copy.copy(model.programs)
    model.programs.weights = model.programs._place(model.model, ExpertStore(model.model))
    masked = Masked(model.model, LENGTH)

    def wanting(start: int) -> int:
        tokens = [start]
        for _ in range(5):
            tokens.append(int(np.argmax(masked([*prompt, *tokens])[-1])))
        model.asks = [Ask(prompt, tokens, masked([*prompt, *tokens])[len(prompt) - 1 : -1])]
        return model.check(model.engine(serving()), [0])

    assert wanting(min(first, twin)) == 0 and wanting(max(first, twin)) == 1
    with pytest.raises(AssertionError):
        wanting((twin + 1) % 260)


@pytest.mark.parametrize("kind, slots", [("top1", 1), ("top2", 2), ("dense", 0)])
def test_top_twenty_logprobs_are_the_masked_models(bench, kind, slots):
    """Drawn tokens and prompts' own, too."""
    model = bench(kind)
    settings = serving(page_size=4, pages=24, budget=20, chunk=16, slots=slots, scheduler="algorithm1")
    engine, masked = model.engine(settings), Masked(model.model, LENGTH)
    params = {"logprobs": 20, "echo": True, "ignore_eos": True}
    asks = model.asks[:12]
    handles = [
        engine.submit(
            Request(a.prompt, SamplingParams(max_tokens=len(a.tokens), temperature=0.7 * (i % 2), seed=i, **params))
        )
        for i, a in enumerate(asks)
    ]
    run_out(engine)
    for i, (ask, handle) in enumerate(zip(asks, handles, strict=True)):
        done = handle.result()
        tokens = [*ask.prompt, *done.tokens]
        wanted = masked(tokens)
        assert [p.token for p in done.prompt_logprobs] == ask.prompt and done.prompt_logprobs[0].logprob is None
        for at, each in enumerate([*done.prompt_logprobs, *done.logprobs][1:]):
            assert each.token == tokens[at + 1]
            np.testing.assert_allclose(each.logprob, wanted[at, each.token], atol=CLOSE)
            np.testing.assert_allclose([p for _, p in each.top], np.sort(wanted[at])[::-1][:20], atol=CLOSE)
            np.testing.assert_allclose([p for _, p in each.top], wanted[at][[t for t, _ in each.top]], atol=CLOSE)
        if i % 2 == 0:
            assert all(p.logprob == p.top[0][1] and p.token == p.top[0][0] for p in done.logprobs)  # the same float


def test_a_seed_fixes_the_sample_whatever_else_runs(bench):
    model = bench("top1")
    prompts = [ask.prompt for ask in model.asks]
    ask = Request(prompts[5], SamplingParams(max_tokens=12, temperature=1.0, seed=7, top_p=0.9, ignore_eos=True))
    crowded = model.engine(serving(page_size=4, pages=20, budget=9, chunk=4, slots=1))
    others = [crowded.submit(Request(p, SamplingParams(max_tokens=9, temperature=1.0))) for p in prompts[:8]]
    among = crowded.submit(ask)
    run_out(crowded)
    alone = model.engine(serving(chunk=16))
    single, again = alone.submit(ask), alone.submit(ask)
    other = alone.submit(dataclasses.replace(ask, params=dataclasses.replace(ask.params, seed=8)))
    run_out(alone)
    tokens = single.result().tokens
    assert tokens == among.result().tokens == again.result().tokens != other.result().tokens
    assert all(len(o.result().tokens) for o in others)
