"""Generation against a slow recompute of the whole sequence, token by token."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from readme_jax import config
from readme_jax.errors import ConfigError
from readme_jax.generate import Generator, Sampling, sample
from readme_jax.models.experts import plan_batch
from readme_jax.models.llama import Llama, head_weight
from readme_jax.models.router import Router, choose
from readme_jax.models.runtime import Runtime
from readme_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("quickly_compiled")
PROMPTS = [[5, 3, 8, 1, 13, 2], [7], list(range(20))]


LENGTH = 32  # of the recompute: what comes after a position does not change it


class Recompute:
    """Greedy tokens and their experts from one whole forward pass a token, without caches, plans by masking."""

    def __init__(self, model) -> None:
        mixture = getattr(model, "mixture", None)
        backbone = Llama(model.config, mixture, Runtime(segments="masked"))

        @jax.jit
        def forward(ids):
            plan, chosen = None, jnp.zeros((1, LENGTH, 0), jnp.int32)
            if mixture:
                logits, _ = Router(model.router_config).apply({"params": model.router}, ids)
                chosen, weights = choose(logits, mixture.top_k)
                plan = plan_batch(chosen, mixture.num_experts, weights)
            hidden, _ = backbone.apply({"params": model.params}, ids, plan, getattr(model, "channels", None))
            return jnp.argmax(hidden[0] @ head_weight(model.params).T, axis=-1), chosen[0]

        self.forward = forward

    def __call__(self, prompt: list[int], count: int) -> tuple[list[int], list[tuple[int, ...]]]:
        tokens = list(prompt)
        with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
            for _ in range(count):
                tokens.append(int(self._run(tokens)[0][len(tokens) - 1]))
            chosen = self._run(tokens)[1]
        new = [tuple(int(e) for e in row) for row in np.asarray(chosen)[len(prompt) : len(tokens)]]
        return tokens[len(prompt) :], [e for e in new if e]

    def _run(self, tokens: list[int]):
        return self.forward(jnp.asarray([tokens + [0] * (LENGTH - len(tokens))]))


@pytest.fixture(scope="module")
def generator(tiny_model):
    """One a kind of model, compiled once."""
    return functools.cache(lambda kind: Generator(tiny_model(kind)))


@pytest.mark.parametrize("kind", ["dense", "top1", "top2", "tied", "own_rows"])
def test_batch_with_padding_equals_recompute_token_by_token(tiny_model, generator, kind):
    out, recompute = generator(kind).generate(PROMPTS, 12), Recompute(tiny_model(kind))
    for row, prompt in enumerate(PROMPTS):
        tokens, experts = recompute(prompt, 12)
        assert out.tokens[row] == tokens
        assert out.experts[row] == experts
    if kind != "dense":
        assert len({e for row in out.experts for e in row}) > 1  # routes do differ


def test_sliding_window_is_kept_when_decoding(tiny_model):
    model = tiny_model("dense")
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, sliding_window=4))
    assert Generator(model).generate(PROMPTS[:1], 10).tokens[0] == Recompute(model)(PROMPTS[0], 10)[0]


def test_stops_at_a_stop_token_row_by_row(generator):
    free = generator("top1").generate(PROMPTS, 12).tokens
    stop = free[0][3]
    stopped = generator("top1").generate(PROMPTS, 12, stop=[stop])
    for row, tokens in enumerate(free):
        expected = tokens[: tokens.index(stop)] if stop in tokens else tokens
        assert stopped.tokens[row] == expected
        assert len(stopped.experts[row]) == len(expected)


def test_seed_fixes_the_sample_and_a_tiny_nucleus_is_greedy(generator):
    def run(**settings):
        return generator("dense").generate(PROMPTS[:1], 16, Sampling(**settings)).tokens

    assert run(temperature=1.5, seed=1) == run(temperature=1.5, seed=1)
    assert run(temperature=1.5, seed=1) != run(temperature=1.5, seed=2)
    assert run(temperature=1.5, top_p=1e-6) == run()


def test_sample_draws_from_the_nucleus_in_proportion():
    logits = jnp.log(jnp.asarray([0.5, 0.05, 0.3, 0.15]))
    rows = jnp.broadcast_to(logits, (4000, 4))
    drawn = np.bincount(sample(rows, jax.random.key(0), jnp.float32(1.0), jnp.float32(0.8)), minlength=4) / 4000
    np.testing.assert_allclose(drawn, [0.625, 0, 0.375, 0], atol=0.03)  # 0.5 and 0.3 reach 0.8
    drawn = np.bincount(sample(rows, jax.random.key(0), jnp.float32(1.0), jnp.float32(1.0)), minlength=4) / 4000
    np.testing.assert_allclose(drawn, [0.5, 0.05, 0.3, 0.15], atol=0.03)


@pytest.mark.parametrize(
    "prompts, count, said",
    [([[]], 4, "empty prompt"), ([], 4, "empty prompt"), ([[1]], 0, "max_tokens"), ([[1] * 60], 500, "500 new ones")],
)
def test_bad_requests_are_named(generator, prompts, count, said):
    with pytest.raises(ConfigError, match=said):
        generator("dense").generate(prompts, count)


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_p": 0.0}, {"temperature": float("nan")}])
def test_bad_sampling_is_named(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Sampling(**settings)
