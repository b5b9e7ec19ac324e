"""Sampling against plain NumPy definitions, and its independence of the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from readme_jax.serving.sampling import TOP, Samplings, best, choose_tokens

ROWS, VOCAB = 3, 600
chosen = jax.jit(choose_tokens)


def kept_by_definition(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    order = np.argsort(-logits, kind="stable")
    p = np.exp((logits - logits.max()) / temperature)[order].astype(np.float64)
    keep = np.arange(len(p)) < (top_k or len(p))
    share = p * keep / (p * keep).sum()
    if top_p < 1:
        keep &= np.cumsum(share) - share < top_p
    keep &= p >= min_p * p[0]
    return set(order[keep].tolist())


def random_logits(seed: int, rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, VOCAB)).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000),
    st.floats(0.3, 3),
    st.sampled_from([0, 1, 3, 40, 300, 10_000]),
    st.sampled_from([1e-6, 0.3, 0.9, 1.0]),
    st.sampled_from([0.0, 0.05, 0.5]),
)
def test_draws_are_of_the_kept_tokens_and_reach_most_of_them(seed, temperature, top_k, top_p, min_p):
    logits = random_logits(seed, 1)
    kept = kept_by_definition(logits[0], temperature, top_k, top_p, min_p)
    many = 200
    rows = Samplings.of([(temperature, top_k, top_p, min_p, seed)] * many)
    drawn = np.asarray(chosen(jnp.tile(logits, (many, 1)), rows, jnp.arange(many)).tokens)
    # At the border rounding decides: the sums of top_p are taken in another order.
    likely = np.argsort(-logits[0])[: len(kept) + 1]
    assert set(drawn.tolist()) <= set(likely.tolist())
    if len(kept) == 1 and top_p in (1e-6, 1.0):
        assert set(drawn.tolist()) == kept


def test_equal_logits_at_the_border_are_all_kept():
    logits = jnp.asarray([[4.0] * 3 + [1.0] * (VOCAB - 3)])
    rows = Samplings.of([(1.0, 5, 1.0, 0.0, s) for s in range(400)])
    drawn = set(np.asarray(chosen(jnp.tile(logits, (400, 1)), rows, jnp.arange(400)).tokens).tolist())
    assert {0, 1, 2} < drawn and max(drawn) > 300  # past the best tokens that are looked at first


def test_draws_follow_the_probabilities():
    p = np.asarray([0.5, 0.05, 0.3, 0.15])
    many = 6000
    logits = jnp.tile(jnp.log(jnp.asarray(p, jnp.float32)), (many, 1))

    def shares(*row: float) -> np.ndarray:
        drawn = chosen(logits, Samplings.of([(*row, 7)] * many), jnp.arange(many)).tokens
        return np.bincount(np.asarray(drawn), minlength=4) / many

    np.testing.assert_allclose(shares(1.0, 0, 1.0, 0.0), p, atol=0.03)
    np.testing.assert_allclose(shares(1.0, 0, 0.8, 0.0), [0.625, 0, 0.375, 0], atol=0.03)
    np.testing.assert_allclose(shares(1.0, 3, 1.0, 0.0), np.asarray([0.5, 0, 0.3, 0.15]) / 0.95, atol=0.03)
    np.testing.assert_allclose(shares(1.0, 0, 1.0, 0.2), np.asarray([0.5, 0, 0.3, 0.15]) / 0.95, atol=0.03)
    np.testing.assert_allclose(shares(0.5, 0, 1.0, 0.0), p**2 / (p**2).sum(), atol=0.03)


def test_a_draw_is_a_function_of_seed_and_position_alone():
    logits = jnp.tile(random_logits(0, 1), (4, 1))
    rows = Samplings.of([(2.0, 0, 1.0, 0.0, s) for s in (3, 3, 4, 2**32 + 3)])
    tokens = np.asarray([chosen(logits, rows, jnp.asarray([p, p, p, p])).tokens for p in range(30)])
    assert (tokens[:, 0] == tokens[:, 1]).all() and (tokens[:, 0] == tokens[:, 3]).all()
    assert (tokens[:, 0] != tokens[:, 2]).mean() > 0.5
    assert len(set(tokens[:, 0].tolist())) > 5
    single = chosen(logits[:1], Samplings.of([(2.0, 0, 1.0, 0.0, 3)]), jnp.asarray([9]))
    assert int(single.tokens[0]) == tokens[9, 0]


def test_greedy_rows_beside_drawn_ones_carry_the_identical_float():
    logits = random_logits(5)
    rows = Samplings.of([(0.0, 5, 0.1, 0.0, 1), (1.0, 0, 1.0, 0.0, 1), (0.0, 0, 1.0, 0.0, 1)])
    out = jax.tree.map(np.asarray, chosen(logits, rows, jnp.arange(3)))
    for row in (0, 2):
        assert out.tokens[row] == out.top_tokens[row, 0] == np.argmax(logits[row])
        assert out.logprob[row].tobytes() == out.top_logprobs[row, 0].tobytes()
    log_softmax = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(out.logprob, log_softmax[np.arange(3), out.tokens], atol=1e-5)
    np.testing.assert_allclose(out.top_logprobs, -np.sort(-log_softmax)[:, :TOP], atol=1e-5)


@pytest.mark.parametrize("vocab", [7, 20, 256, 257, 6000])
def test_best_equals_a_sort_with_ties_by_token(vocab):
    logits = np.random.default_rng(vocab).integers(0, 12, (4, vocab)).astype(np.float32)
    values, tokens = (np.asarray(x) for x in best(jnp.asarray(logits)))
    count = min(TOP, vocab)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(values[:, :count], np.take_along_axis(logits, order, 1))
    np.testing.assert_array_equal(tokens[:, :1], order[:, :1])
    np.testing.assert_array_equal(np.take_along_axis(logits, tokens[:, :count], 1), values[:, :count])
    assert all(len(set(row.tolist())) == count for row in tokens[:, :count])
    assert np.isneginf(values[:, count:]).all()


def test_padding_adds_greedy_rows():
    rows = Samplings.of([(1.0, 2, 0.5, 0.1, 3)]).padded(3)
    assert rows.temperature.tolist() == [1.0, 0.0, 0.0] and rows.seed.dtype == np.uint32
    assert rows.padded(3) is rows
