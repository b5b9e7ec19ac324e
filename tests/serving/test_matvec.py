"""Products of few columns by the GPU's kernels, interpreted, against NumPy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from readme_jax.serving.matvec import Normed, Tiles, gated, matvec

EPS = 1e-5


def normed(x, scale):
    """RMSNorm over the first axis."""
    return x / np.sqrt((x * x).mean(axis=0) + EPS) * scale[:, None]


@pytest.mark.parametrize("tiles", [Tiles(), Tiles(1, 16, 1), Tiles(8, 64, 2)], ids=["model's", "small", "masked"])
@pytest.mark.parametrize("out, inputs, columns", [(24, 96, 1), (6, 40, 3)])
def test_a_layer_of_few_columns(tiles, out, inputs, columns):
    rng = np.random.default_rng(0)
    w, u = rng.normal(size=(2, out, inputs)).astype(np.float32)
    x, add = rng.normal(size=(inputs, columns)).astype(np.float32), rng.normal(size=(out, columns)).astype(np.float32)
    scale = rng.normal(size=inputs).astype(np.float32)
    given = [jnp.asarray(a) for a in (w, u, x)]
    lazy = Normed(given[2], jnp.asarray(scale), EPS)

    def check(found, wanted):
        np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=1e-4)

    check(matvec(given[0], given[2], interpret=True, tiles=tiles), w @ x)
    check(matvec(given[0], lazy, jnp.asarray(add), interpret=True, tiles=tiles), w @ normed(x, scale) + add)
    gate = w @ normed(x, scale)
    wanted = gate / (1 + np.exp(-gate)) * (u @ normed(x, scale))
    check(gated(given[0], given[1], lazy, interpret=True, tiles=tiles), wanted)


def test_sums_are_those_of_float32():
    rng = np.random.default_rng(1)
    w, y = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((4, 2048), (2048, 1)))
    wanted = np.asarray(w, np.float64) @ np.asarray(y, np.float64)
    found = np.asarray(matvec(w, y, interpret=True), np.float64)
    np.testing.assert_allclose(found, wanted, rtol=2**-8)  # one rounding, to bfloat16
