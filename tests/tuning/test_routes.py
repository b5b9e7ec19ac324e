from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import EXPERTS, ROUTER

from readme_jax.models.router import Router
from readme_jax.tuning.routes import CommonRoutes, DomainRoutes, OverlapTable, RandomRoutes, RouterRoutes, TableRoutes


def all_routes(router, top_k):
    table = np.random.default_rng(0).random((256, EXPERTS)).astype(np.float32)
    return {
        "router": RouterRoutes(router, ROUTER, top_k),
        "domain": DomainRoutes(EXPERTS, top_k),
        "common": CommonRoutes(jnp.array([3, 9, 1]), top_k),
        "random": RandomRoutes(7, EXPERTS, top_k),
        "table": TableRoutes(jnp.asarray(table), 0.8, top_k),
    }


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", ["router", "domain", "common", "random", "table"])
def test_routes_are_distinct_experts_whose_weights_sum_to_one(router, batch, name, top_k):
    routes = all_routes(router, top_k)[name]
    experts, weights = jax.jit(lambda r, t, d: r(t, d))(routes, batch["tokens"], batch["domain"])
    assert experts.shape == weights.shape == (*batch["tokens"].shape, top_k) and experts.dtype == jnp.int32
    assert ((experts >= 0) & (experts < EXPERTS)).all()
    assert top_k == 1 or (experts[..., 0] != experts[..., 1]).all()
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("name", ["router", "random", "table"])
def test_routes_of_a_token_depend_on_the_past_alone(router, batch, name):
    routes, tokens = all_routes(router, 1)[name], jnp.asarray(batch["tokens"])
    changed, apply = tokens.at[:, 8:].set(0), jax.jit(lambda r, t: r(t)[0])
    np.testing.assert_array_equal(apply(routes, tokens)[:, :8], apply(routes, changed)[:, :8])


def test_router_routes_are_the_router_argmax(router, batch):
    experts, _ = RouterRoutes(router, ROUTER)(batch["tokens"])
    logits, _ = Router(ROUTER).apply({"params": router}, batch["tokens"])
    np.testing.assert_array_equal(experts[..., 0], np.argmax(logits, -1))


def test_domain_and_common_routes(batch):
    experts, _ = DomainRoutes(EXPERTS)(batch["tokens"], batch["domain"])
    np.testing.assert_array_equal(experts[..., 0], np.broadcast_to(batch["domain"][:, None], batch["tokens"].shape))
    with pytest.raises(ValueError, match="domain"):
        DomainRoutes(EXPERTS)(batch["tokens"])
    experts, _ = CommonRoutes(jnp.array([3, 9, 1]), 2)(batch["tokens"])
    np.testing.assert_array_equal(np.unique(experts[..., 0]), [1])
    np.testing.assert_array_equal(np.unique(experts[..., 1]), [0])


def test_random_routes_are_even_and_repeatable():
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 256, (16, 64)))
    draw = jax.jit(lambda seed, tokens: RandomRoutes(seed, EXPERTS)(tokens)[0])
    first = draw(1, tokens)
    np.testing.assert_array_equal(first, draw(1, tokens))
    np.testing.assert_array_equal(first[2:5, :9], draw(1, tokens[2:5, :9]))
    assert (first != draw(2, tokens)).mean() > 0.5
    assert np.abs(np.bincount(np.ravel(first)) / first.size - 1 / EXPERTS).max() < 0.06


def test_table_routes_equal_a_loop():
    rng = np.random.default_rng(2)
    table, tokens = rng.random((256, EXPERTS)).astype(np.float32), rng.integers(0, 256, (2, 20))
    experts, _ = TableRoutes(jnp.asarray(table), 0.7)(jnp.asarray(tokens))
    for b in range(2):
        for t in range(20):
            blend = sum(0.7 ** (t - s) * table[tokens[b, s]] for s in range(t + 1))
            assert experts[b, t, 0] == np.argmax(blend)


def test_overlap_table_means():
    table = OverlapTable(4, 2)
    with pytest.raises(ValueError, match="no calibration tokens"):
        table.mean()
    scores = np.array([[[[1.0, 0], [3, 2]]], [[[1, 0], [1, 0]]]])  # two layers, tokens 1 and 2
    table.add(np.array([[1, 2]]), scores)
    table.add(np.array([[2]]), np.array([[[[0.0, 0]]], [[[0, 0]]]]))
    np.testing.assert_allclose(table.mean(), [[2, 2 / 3], [2, 0], [2, 1], [2, 2 / 3]])
