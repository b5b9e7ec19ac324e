"""The GPU's grouped kernels, interpreted, against every expert over every row, in value and gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from readme_jax.models.grouped_gpu import Tiles, _side_by_side, _tile, grouped_swiglu, tiles_for
from readme_jax.models.segments import Expert, grouped_ffn, plan_routes

TILES = Tiles(rows=64, columns=32, depth=32, group=2)


@pytest.mark.parametrize(
    "tokens, top_k, experts, used, width, own",
    [
        (150, 1, 3, (0, 2), 64, 96),
        (100, 2, 4, (0, 1, 2, 3), 64, 32),
        (64, 1, 2, (1,), 32, 64),
        (90, 1, 2, (0, 1), 72, 88),
        (90, 1, 2, (0, 1), 288, 288),
    ],
    ids=[
        "an expert without rows",
        "two a token",
        "one full block",
        "widths that tiles do not divide",
        "a tile past the end",
    ],
)
def test_value_and_gradients(tokens, top_k, experts, used, width, own):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32)

    weights = [Expert(normal(own, width), normal(own, width), normal(width, own)) for _ in range(experts)]
    routes = np.stack([rng.permutation(used)[:top_k] for _ in range(tokens)]).astype(np.int32)
    plan, x, direction = plan_routes(jnp.asarray(routes), experts), normal(tokens, width), normal(tokens, width)

    def kernel(x, weights):
        pairs = grouped_swiglu(x, plan.slots, plan.inverse, plan.sizes, weights, TILES, True)
        return pairs.reshape(tokens, top_k, width).sum(1)

    y, pull = jax.vjp(kernel, x, weights)
    want, pull_want = jax.vjp(lambda x, w: grouped_ffn(x, plan, w, "masked"), x, weights)
    np.testing.assert_allclose(y, want, atol=1e-5 * float(jnp.abs(want).max()))
    for a, b in zip(jax.tree.leaves(pull(direction)), jax.tree.leaves(pull_want(direction)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_gradients_of_few_rows_are_of_their_own_experts():
    """Blocks of fewer rows than a step of the forward kernels is deep."""
    rng, tiles = np.random.default_rng(2), tiles_for(40)
    assert tiles.rows < tiles.depth
    weights = [Expert(*(jnp.asarray(rng.normal(0, 0.3, s), jnp.float32) for s in [(64, 64)] * 3)) for _ in range(3)]
    x, direction = (jnp.asarray(rng.normal(size=(40, 64)), jnp.float32) for _ in range(2))
    plan = plan_routes(jnp.asarray(rng.integers(0, 3, (40, 1)), jnp.int32), 3)

    def kernel(x, weights):
        return grouped_swiglu(x, plan.slots, plan.inverse, plan.sizes, weights, tiles, True)

    y, pull = jax.vjp(kernel, x, weights)
    want, pull_want = jax.vjp(lambda x, w: grouped_ffn(x, plan, w, "masked"), x, weights)
    for a, b in zip(jax.tree.leaves((y, pull(direction))), jax.tree.leaves((want, pull_want(direction))), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


@settings(deadline=None)
@example(576, 64, 2)  # SmolLM2's width in float32
@example(5504, 128, 2)  # half of Llama-2-7B's feed-forward width
@given(st.integers(1, 8192), st.sampled_from([32, 64, 128, 256]), st.sampled_from([1, 2]))
def test_tiles_cover_each_column_once_and_reach_no_other(size, most, side):
    """Interpreted, a read or write past an array's end is moved inside, where it does no harm; on a GPU it is not."""
    tile, parts = _tile(size, most, side)
    seen = np.zeros(size, int)
    for j in range(-(-size // (tile * parts))):
        for columns in _side_by_side(j, tile, parts, size):
            mask = columns.mask((tile,), 0)
            here = columns.first + np.arange(tile)
            np.add.at(seen, here if mask is None else here[np.asarray(mask)], 1)  # an index past the end is an error
    assert (seen == 1).all()


def test_pairs_that_sizes_do_not_cover_add_nothing():
    rng = np.random.default_rng(1)
    weights = [Expert(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(32, 32)] * 3)) for _ in range(2)]
    x = jnp.asarray(rng.normal(size=(90, 32)), jnp.float32)
    routes = jnp.asarray(rng.integers(0, 3, (90, 1)), jnp.int32)  # expert 2 is elsewhere
    plan = plan_routes(routes, 2)

    def kernel(x):
        return grouped_swiglu(x, plan.slots, plan.inverse, plan.sizes, weights, TILES, True)

    y, pull = jax.vjp(kernel, x)
    (dx,) = pull(jnp.ones_like(y))
    here = np.asarray(routes[:, 0] < 2)
    assert not np.asarray(y)[~here].any() and not np.asarray(dx)[~here].any()
    assert (np.abs(np.asarray(y)[here]).max(1) > 0).all() and (np.abs(np.asarray(dx)[here]).max(1) > 0).all()
