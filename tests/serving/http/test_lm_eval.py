"""lm-eval's `local-completions`, unmodified: log-likelihoods over HTTP equal those in process, item by item."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " London"),
    ("", "no context at all"),
    ("It costs 5 €", " or 6 €"),
    ("It is late", "."),  # the model ends after a full stop: its one new token is end-of-text
    ("It is late.", " Good night."),
    ("a" * 200, "b" * 100),
]


def requests() -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]


@pytest.fixture
def lm_eval(address, tiny_tokenizer, tmp_path):
    """lm-eval's client; its tokenizer is read by transformers."""
    tiny_tokenizer.save(tmp_path)
    return partial(
        LocalCompletionsAPI,
        model="tiny",
        base_url=f"{address}/v1/completions",
        tokenizer=str(tmp_path),
        tokenizer_backend="huggingface",
    )


@pytest.mark.parametrize("settings", [{}, {"batch_size": 3}, {"num_concurrent": 3}])
def test_loglikelihoods_equal_those_in_process(lm_eval, engine, settings):
    found = lm_eval(**settings).loglikelihood(requests(), disable_tqdm=True)
    for (context, continuation), (logprob, greedy) in zip(PAIRS, found, strict=True):
        start = engine.tokenizer.encode(context) or [engine.tokenizer.eos_ids[0]]
        tokens = start + engine.tokenizer.encode(continuation)
        rows = [(engine.model.logprobs(tokens[:i]), tokens[i]) for i in range(len(start), len(tokens))]
        assert logprob == sum(float(row[token]) for row, token in rows)
        assert greedy == all(row[token] == row.max() for row, token in rows)
    assert [params.params.max_tokens for params in engine.seen] == [1] * len(PAIRS)


def test_a_greedy_continuation_is_known_as_one(lm_eval, engine):
    context, tokens = "It was", engine.tokenizer.encode("It was")
    for _ in range(5):
        tokens.append(int(np.argmax(engine.model.logprobs(tokens))))
    continuation = engine.tokenizer.decode(tokens)[len(context) :]
    pairs = [(context, continuation), (context, continuation[:-1] + "~")]
    found = lm_eval().loglikelihood(
        [Instance("loglikelihood", {}, p, i) for i, p in enumerate(pairs)], disable_tqdm=True
    )
    assert [greedy for _, greedy in found] == [True, False]


def test_generation(lm_eval, engine):
    asked = Instance("generate_until", {}, ("Once", {"until": ["\n"], "max_gen_toks": 9}), 0)
    (text,) = lm_eval().generate_until([asked], disable_tqdm=True)
    tokens = engine.tokenizer.encode("Once")
    for _ in range(9):
        tokens.append(int(np.argmax(engine.model.logprobs(tokens))))
    assert ("Once" + text) == engine.tokenizer.decode(tokens)
