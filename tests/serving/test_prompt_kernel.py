"""The GPU kernel of a chunk's attention, interpreted, against NumPy in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from readme_jax.serving.prompt_kernel import Tiles, attend_chunk
from readme_jax.serving.state import Cache

TILES = Tiles(queries=32, keys=32)


def expected(q, keys, values, start, window):
    """[C, H * h] of q [C, H, h] over one row's keys [K, h, S] and values [K, S, h]."""
    count, heads, width = q.shape
    group = heads // keys.shape[0]
    out = np.zeros((count, heads, width))
    for i in range(count):
        last = min(start + i, keys.shape[2] - 1)
        first = 0 if window is None else max(0, start + i - window + 1)
        for n in range(heads):
            logits = q[i, n] @ keys[n // group][:, first : last + 1] / np.sqrt(width)
            odds = np.exp(logits - logits.max())
            out[i, n] = odds @ values[n // group][first : last + 1] / odds.sum()
    return out.reshape(count, -1)


@pytest.mark.parametrize("dtype, close", [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    "count, heads, kv_heads, start, window",
    [(64, 2, 2, 0, None), (64, 6, 2, 37, None), (48, 4, 1, 100, None), (64, 2, 2, 0, 20), (32, 6, 2, 75, 50)],
    ids=["a whole prompt", "grouped heads after others", "ends at the row's end", "window", "window after others"],
)
def test_value(dtype, close, count, heads, kv_heads, start, window):
    rng = np.random.default_rng(0)
    rows, width, length = 3, 16, 160

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    q, keys, values = (
        normal(count, heads, width),
        normal(rows, kv_heads, width, length),
        normal(rows, kv_heads, length, width),
    )
    cache = Cache((keys,), (values,))
    out = attend_chunk(q, cache, jnp.int32(1), jnp.int32(start), window, tiles=TILES, interpret=True)
    exact = (np.asarray(x, np.float64) for x in (q, keys[1], values[1]))
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), expected(*exact, start, window), atol=close)


def test_what_lies_behind_the_chunk_changes_nothing():
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.normal(size=(32, 2, 16)), jnp.float32)
    keys, values = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(1, 2, 16, 96), (1, 2, 96, 16)])
    found = [
        attend_chunk(
            q,
            Cache((keys.at[..., 42:].set(fill),), (values.at[:, :, 42:].set(fill),)),
            jnp.int32(0),
            jnp.int32(10),
            tiles=TILES,
            interpret=True,
        )
        for fill in (0.0, 1e4)
    ]
    np.testing.assert_array_equal(*found)
