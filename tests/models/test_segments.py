"""Grouped feed-forward back ends against a loop over tokens, and against each other."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from readme_jax.errors import ConfigError
from readme_jax.models.segments import Expert, RoutePlan, grouped_ffn, plan_routes

D, WIDTH = 12, 8
BACKENDS = ("blocks", "ragged", "masked")

Routes = tuple[np.ndarray, int]  # experts [N, K] and their number
FFN = tuple[jax.Array, list[Expert], jax.Array, jax.Array]  # x [N, D], experts, weights [N, K], cotangent [N, D]


@st.composite
def routes(draw: st.DrawFn) -> Routes:
    """Routes of 1 or 40 tokens, of which some experts may get none. Few shapes: each is compiled."""
    num_experts, top_k = draw(st.sampled_from([(2, 1), (4, 2)]))
    used = draw(st.lists(st.integers(0, num_experts - 1), min_size=top_k, max_size=num_experts, unique=True))
    seed, tokens = draw(st.integers(0, 99)), draw(st.sampled_from([1, 40]))
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(used)[:top_k] for _ in range(tokens)]), num_experts


def segments(sizes: list[int], seed: int = 0) -> Routes:
    """Shuffled routes, one expert a token, that give the experts so many rows."""
    rng = np.random.default_rng(seed)
    return rng.permutation(np.repeat(np.arange(len(sizes)), sizes))[:, None], len(sizes)


def random_ffn(experts: np.ndarray, num_experts: int, dtype: Any = jnp.float32) -> FFN:
    rng = np.random.default_rng(experts.size)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(0, shape[-1] ** -0.5, shape), dtype)

    weights = [Expert(normal(WIDTH, D), normal(WIDTH, D), normal(D, WIDTH)) for _ in range(num_experts)]
    return normal(len(experts), D) * 3, weights, jnp.asarray(rng.random(experts.shape), dtype), normal(len(experts), D)


def plan_of(routes: Routes, weights: jax.Array | None = None) -> RoutePlan:
    return plan_routes(jnp.asarray(routes[0], jnp.int32), routes[1], weights)


def by_token(x: np.ndarray, experts: np.ndarray, weights: np.ndarray, ffns: list[Expert]) -> np.ndarray:
    """The definition, a token and a choice at a time, in float64."""
    out = np.zeros(x.shape)
    for n, row in enumerate(np.asarray(x, np.float64)):
        for e, weight in zip(experts[n], np.asarray(weights, np.float64)[n], strict=True):
            gate, up, down = (np.asarray(w, np.float64) for w in ffns[e])
            g = gate @ row
            out[n] += weight * (down @ (g / (1 + np.exp(-g)) * (up @ row)))
    return out


@partial(jax.jit, static_argnums=0)
def run(backend: str, chosen: jax.Array, x: jax.Array, experts: list[Expert], weights: jax.Array, ct: jax.Array) -> Any:
    def forward(x: jax.Array, experts: list[Expert], weights: jax.Array) -> jax.Array:
        return grouped_ffn(x, plan_routes(chosen, len(experts), weights), experts, backend)

    y, vjp = jax.vjp(forward, x, experts, weights)
    return y, vjp(ct)


def value_and_gradients(routes: Routes, ffn: FFN, backend: str) -> Any:
    """The output, and gradients for x, experts and weights."""
    return run(backend, jnp.asarray(routes[0], jnp.int32), *ffn)


forward = jax.jit(grouped_ffn, static_argnums=3)


def assert_close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Every array within `tolerance` of the wanted one's largest entry; zero where that is zero."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@given(routes())
@settings(max_examples=25, deadline=None)
def test_a_plan_sorts_pairs_stably_and_back(routes: Routes) -> None:
    experts, num_experts = routes
    plan = plan_of(routes)
    slots, flat = np.asarray(plan.slots), experts.reshape(-1)
    np.testing.assert_array_equal(slots, np.argsort(flat, kind="stable"))
    np.testing.assert_array_equal(np.asarray(plan.order), slots // experts.shape[1])
    np.testing.assert_array_equal(np.asarray(plan.inverse).reshape(-1)[slots], np.arange(flat.size))
    np.testing.assert_array_equal(np.asarray(plan.sizes), np.bincount(flat, minlength=num_experts))


@given(routes(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_every_back_end_computes_each_tokens_experts(routes: Routes, weighted: bool) -> None:
    x, experts, weights, _ = random_ffn(*routes)
    want = by_token(x, routes[0], np.asarray(weights) if weighted else np.ones(weights.shape), experts)
    plan = plan_of(routes, weights if weighted else None)
    for backend in BACKENDS:
        assert_close(forward(x, plan, experts, backend), want)


@given(routes())
@settings(max_examples=20, deadline=None)
def test_gradients_equal_those_of_the_masked_way(routes: Routes) -> None:
    ffn = random_ffn(*routes)
    want = value_and_gradients(routes, ffn, "masked")
    for backend in ("blocks", "ragged"):
        assert_close(value_and_gradients(routes, ffn, backend), want)


# Sizes at and around block sizes and full blocks, first, last and middle experts empty, and one expert with all rows.
@pytest.mark.parametrize(
    "sizes", [[256, 0, 257], [0, 600, 0], [1, 32, 33, 148, 149], [513, 3, 255, 0], [0, 0, 1024]], ids=str
)
def test_segments_of_many_blocks(sizes: list[int]) -> None:
    routes = segments(sizes)
    ffn = random_ffn(*routes)
    got, want = (value_and_gradients(routes, ffn, b) for b in ("blocks", "masked"))
    assert_close(got, want)
    for size, grads in zip(sizes, got[1][1], strict=True):
        if size == 0:
            assert all(not np.any(g) for g in grads)


def test_one_expert_is_a_dense_layer() -> None:
    routes = segments([9])
    x, experts, weights, _ = random_ffn(*routes)
    want = by_token(x, routes[0], weights, experts)
    text = str(jax.make_jaxpr(grouped_ffn)(x, plan_of(routes, weights), experts))
    assert_close(grouped_ffn(x, plan_of(routes, weights), experts), want)
    assert "gather" not in text and "while" not in text


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: str) -> None:
    routes = (np.zeros((0, 1), np.int64), 3)
    x, experts, weights, _ = random_ffn(*routes)
    grads = jax.grad(lambda e: grouped_ffn(x, plan_of(routes, weights), e, backend).sum())(experts)
    assert grouped_ffn(x, plan_of(routes, weights), experts, backend).shape == (0, D)
    assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_rematerialised_and_in_bfloat16() -> None:
    routes = segments([30, 0, 50])
    ffn = random_ffn(*routes, dtype=jnp.bfloat16)
    x, experts, weights, cotangent = ffn

    def loss(experts: list[Expert]) -> jax.Array:
        run = jax.checkpoint(lambda x, e: grouped_ffn(x, plan_of(routes, weights), e))
        return (run(x, experts) * cotangent).sum()

    got = jax.jit(jax.grad(loss))(experts)
    assert {g.dtype for g in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), ffn)
    assert_close(got, value_and_gradients(routes, exact, "masked")[1][1], tolerance=0.03)


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map_every_device_runs_its_own_tokens(check_vma: bool) -> None:
    """Gradients of weights that all devices hold are summed over them."""
    devices = min(jax.device_count(), 2)
    routes = segments([20, 0, 28])
    x, experts, _, cotangent = random_ffn(*routes)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def local(x: jax.Array, chosen: jax.Array, experts: list[Expert]) -> jax.Array:
        return grouped_ffn(x, plan_routes(chosen, 3), experts)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, whole), out_specs=rows, check_vma=check_vma)
    chosen = jnp.asarray(routes[0], jnp.int32)
    with jax.set_mesh(mesh):
        args = jax.device_put((x, experts), jax.NamedSharding(mesh, whole))
        y, vjp = jax.vjp(jax.jit(lambda x, e: sharded(x, chosen, e)), *args)
        got = y, vjp(jax.device_put(cotangent, jax.NamedSharding(mesh, rows)))
    ones = jnp.ones(routes[0].shape)
    y, (dx, grads, _) = value_and_gradients(routes, (x, experts, ones, cotangent), "masked")
    assert_close(got, (y, (dx, grads)))


def test_experts_plan_and_back_end_must_fit() -> None:
    routes = segments([2, 2])
    x, experts, _, _ = random_ffn(*routes)
    with pytest.raises(ConfigError, match="1 experts for a plan of 2"):
        grouped_ffn(x, plan_of(routes), experts[:1])
    with pytest.raises(ConfigError, match="'dense'"):
        grouped_ffn(x, plan_of(routes), experts, "dense")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="top_k"):
        plan_routes(jnp.zeros(4, jnp.int32), 2)
