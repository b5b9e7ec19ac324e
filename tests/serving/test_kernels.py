"""Attention of a decode step by the GPU's kernel, interpreted, against NumPy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from readme_jax.serving.kernels import Tiles, attend_and_write
from readme_jax.serving.state import Cache

ROWS, LENGTH = 3, 256
POSITIONS, RUNS = np.array([0, 130, 255]), np.array([True, True, False])


def turned(x, position):
    """Rotary embedding of [n, h] at a position, with frequencies 1 / (1 + i)."""
    angle = position / (1 + np.arange(x.shape[-1] // 2))
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate([low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)], -1)


@pytest.mark.parametrize(
    "heads, kv_heads, width, tiles, window",
    [
        (2, 2, 16, Tiles(rows=1), None),
        (2, 2, 32, Tiles(), None),
        (2, 2, 32, Tiles(block=128), 40),
        (4, 2, 16, Tiles(block=512, programs=1), None),
        (4, 2, 16, Tiles(block=32, tokens=64), 40),
        (2, 2, 32, Tiles(block=32, tokens=64), None),
        (2, 2, 16, Tiles(block=32, tokens=64, rows=1), 40),
    ],
    ids=[
        "no tensor cores",
        "one block",
        "a window",
        "one program a row",
        "grouped, in parts",
        "in parts",
        "parts of one",
    ],
)
def test_attention_and_the_written_token(heads, kv_heads, width, tiles, window):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    keys, values = draw(ROWS, kv_heads, width, LENGTH), draw(ROWS, kv_heads, LENGTH, width)
    qkv = draw(heads + 2 * kv_heads, width, ROWS)
    angles = POSITIONS[None] / (1 + np.arange(width // 2))[:, None]
    out, cache = attend_and_write(
        jnp.asarray(qkv.reshape(-1, ROWS)), jnp.asarray(np.cos(angles), jnp.float32),
        jnp.asarray(np.sin(angles), jnp.float32), Cache((jnp.asarray(keys),), (jnp.asarray(values),)),
        jnp.asarray(POSITIONS, jnp.int32), jnp.asarray(RUNS), window, interpret=True, tiles=tiles,
    )  # fmt: skip
    out = np.asarray(out).reshape(heads, width, ROWS)
    for row, position in enumerate(POSITIONS):
        q, k, v = np.split(qkv[:, :, row], [heads, heads + kv_heads])
        q, k = turned(q, position), turned(k, position)
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(heads):
            n = head // (heads // kv_heads)
            known = np.concatenate([keys[row, n, :, first:position].T, k[n : n + 1]])
            read = np.concatenate([values[row, n, first:position], v[n : n + 1]])
            odds = np.exp(known @ q[head] / width**0.5)
            np.testing.assert_allclose(out[head, :, row], odds @ read / odds.sum(), atol=1e-4)
        if RUNS[row]:
            keys[row, :, :, position], values[row, :, position] = k, v
    np.testing.assert_allclose(cache.keys[0], keys, atol=1e-5)
    np.testing.assert_allclose(cache.values[0], values, atol=1e-5)
