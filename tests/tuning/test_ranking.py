from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from readme_jax.tuning import ranking

top_mask = jax.jit(ranking.top_mask)

WIDTH = 9
VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40]),
    st.floats(width=32, allow_nan=False, allow_subnormal=False, allow_infinity=False),
)


def slow_top(row: np.ndarray, k: int) -> np.ndarray:
    best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
    return np.isin(np.arange(len(row)), best)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(VALUES, min_size=WIDTH, max_size=WIDTH), min_size=4, max_size=4), st.integers(0, WIDTH))
def test_exactly_k_largest_first_of_ties(rows, k):
    values = np.asarray(rows, np.float32)
    values[np.abs(values) < 1e-37] = 0.0  # XLA flushes subnormals, NumPy does not
    expected = np.stack([slow_top(row, k) for row in values])
    np.testing.assert_array_equal(top_mask(jnp.asarray(values), k), expected)


def test_wide_rows_of_bfloat16_ties():
    values = jnp.asarray(np.random.default_rng(0).normal(size=(3, 1536)), jnp.bfloat16)
    expected = np.stack([slow_top(row, 768) for row in np.asarray(values, np.float32)])
    np.testing.assert_array_equal(top_mask(values, 768), expected)


def test_rows_wider_than_an_int16_counts():
    values = jnp.arange(40_000, dtype=jnp.float32)[None]
    assert np.flatnonzero(top_mask(values, 35_000)[0])[0] == 5_000
