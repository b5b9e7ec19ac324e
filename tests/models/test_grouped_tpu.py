"""The megablox kernels, interpreted, against each expert's plain SwiGLU, in value and gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from readme_jax.models import grouped_tpu
from readme_jax.models.grouped_tpu import grouped_swiglu

EXPERTS, WIDTH, OWN = 3, 128, 256


def plain(rows, sizes, gate, up, down):
    out, start = [], 0
    for e, size in enumerate(sizes):
        x = rows[start : start + size]
        out.append((jax.nn.silu(x @ gate[e].T) * (x @ up[e].T)) @ down[e].T)
        start += size
    return jnp.concatenate([*out, jnp.zeros_like(rows[start:])])


@pytest.mark.parametrize("size, width", [(768, 768), (4096, 1024), (2560, 640), (5632, 512), (1536, 768), (2176, 768)])
def test_tiles_pass_the_end_of_a_width_as_little_as_they_can(size, width):
    assert grouped_tpu.tile_width(size, jnp.bfloat16) == width
    assert grouped_tpu.tile_width(size, jnp.float32) <= 512


@pytest.mark.parametrize("sizes, width", [((20, 9, 11), 64), ((20, 9, 11), 192), ((0, 40, 0), 64), ((5, 0, 12), 64)])
def test_value_and_gradients_where_sizes_are_data(monkeypatch, sizes, width):
    """Segments that share tiles, experts without rows, rows of no expert here, and tiles that pass the end."""
    monkeypatch.setattr(grouped_tpu, "TILE_ROWS", 16)
    monkeypatch.setattr(grouped_tpu, "TILE_WIDTH", width)  # of float32 half
    rng = np.random.default_rng(0)
    shapes = ((40, WIDTH), (EXPERTS, OWN, WIDTH), (EXPERTS, OWN, WIDTH), (EXPERTS, WIDTH, OWN))
    rows, *weights = (jnp.asarray(rng.normal(0, 0.2, s), jnp.float32) for s in shapes)
    direction = jnp.asarray(rng.normal(size=rows.shape), jnp.float32)

    @jax.jit
    def got(sizes, rows, *weights):
        y, pull = jax.vjp(lambda *a: grouped_swiglu(a[0], sizes, *a[1:], interpret=True), rows, *weights)
        return y, pull(direction)

    y, grads = got(jnp.asarray(sizes, jnp.int32), rows, *weights)
    want, pull = jax.vjp(lambda *a: plain(a[0], sizes, *a[1:]), rows, *weights)
    np.testing.assert_allclose(y, want, atol=1e-4 * float(jnp.abs(want).max()))
    for a, b in zip(grads, pull(direction), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))
