"""The backbone: cache, padding and chunks against the whole sequence; layouts, remat and number formats."""

from __future__ import annotations

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from readme_jax.config import MixtureConfig, Model, Remat
from readme_jax.models import attention
from readme_jax.models.experts import plan_batch
from readme_jax.models.layout import scan, to_layout, unroll
from readme_jax.models.llama import Llama
from readme_jax.models.runtime import Runtime, runtime_for

pytestmark = pytest.mark.usefixtures("quick_compile")
MIXTURE = MixtureConfig(num_experts=3, expert=10, permanent=6, top_k=2)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", [None, 4])
def test_padding_and_cache_change_nothing(tiny, random_params, side, window):
    """Padded prompts read whole, or in chunks and token by token from a cache, give the unpadded hidden states."""
    config = dataclasses.replace(tiny, sliding_window=window)
    params = random_params(config)
    rng = np.random.default_rng(0)
    prompts, following = [rng.integers(0, 61, n) for n in (9, 4, 1)], rng.integers(0, 61, (3, 3))
    tokens, valid = np.full((3, 9), 60), np.zeros((3, 9), bool)
    for i, row in enumerate(prompts):
        place = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        tokens[i, place], valid[i, place] = row, True
    run = jax.jit(lambda t, m=None: Llama(config).apply({"params": params}, t, valid=m)[0])
    unpadded = np.zeros((3, 12), int)  # what follows a row's own tokens changes nothing before it
    for i, row in enumerate(prompts):
        unpadded[i, : len(row) + 3] = np.concatenate([row, following[i]])
    want = np.asarray(run(unpadded))

    whole = run(tokens, valid)
    for i, row in enumerate(prompts):
        np.testing.assert_allclose(whole[i][valid[i]], want[i][: len(row)], atol=2e-5)

    step = jax.jit(lambda t, m, c: Llama(config).apply({"params": params}, t, valid=m, cache=c))
    cache = attention.empty_cache(2, 3, config.num_kv_heads, config.head_dim, 16, jnp.float32)
    outs = []
    for chunk in (slice(0, 8), slice(8, 9)):
        out, cache = step(tokens[:, chunk], valid[:, chunk], cache)
        outs.append(out)
    for t in range(3):
        out, cache = step(following[:, t : t + 1], np.ones((3, 1), bool), cache)
        outs.append(out)
    seen = np.concatenate([valid, np.ones((3, 3), bool)], axis=1)
    got = np.concatenate(outs, axis=1)
    for i, row in enumerate(prompts):
        np.testing.assert_allclose(got[i][seen[i]], want[i][: len(row) + 3], atol=2e-5)
    np.testing.assert_array_equal(cache.positions, [12, 7, 4])


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("mixture", [None, MIXTURE], ids=["dense", "mixture"])
def test_layouts_and_remat_agree_in_value_and_gradient(tiny, random_params, mixture):
    params = random_params(tiny, mixture)
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, 61, (2, 9)))
    plan = None
    if mixture is not None:
        weights = jax.nn.softmax(jnp.asarray(rng.normal(size=(2, 9, 2)), jnp.float32))
        plan = plan_batch(jnp.asarray(rng.integers(0, 3, (2, 9, 2)), jnp.int32), 3, weights)
    direction = jnp.asarray(rng.normal(size=(2, 9, 32)), jnp.float32)

    def value_and_grad(runtime, params):
        def loss(params):
            return (Llama(tiny, mixture, runtime).apply({"params": params}, tokens, plan)[0] * direction).sum()

        return jax.jit(jax.value_and_grad(loss))(params)

    want, want_grads = value_and_grad(Runtime(), params)
    for runtime in (Runtime(remat="full"), *(Runtime(layout="scanned", remat=policy) for policy in get_args(Remat))):
        value, grads = value_and_grad(runtime, to_layout(params, runtime.layout))
        np.testing.assert_allclose(value, want, rtol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * float(np.abs(b).max())),
            unroll(grads),
            want_grads,
        )


@pytest.mark.parametrize("mixture", [None, MIXTURE], ids=["dense", "mixture"])
def test_layout_round_trip(tiny, random_params, mixture):
    tiny = dataclasses.replace(tiny, num_layers=11)  # layers_10 sorts after layers_9, not after layers_1
    params = jax.tree.map(np.asarray, random_params(tiny, mixture))
    stacked = scan(params)
    assert not [k for k in stacked if k.startswith("layers_")] and stacked["layers"]["q"].shape[0] == 11
    np.testing.assert_array_equal(stacked["layers"]["q"][10], params["layers_10"]["q"])
    if mixture is not None:
        gates = stacked["layers"]["experts"]["gate"]
        np.testing.assert_array_equal(gates[10, 2], params["layers_10"]["experts_2"]["gate"])
    for again in (unroll(stacked), unroll(params)):
        jax.tree.map(np.testing.assert_array_equal, again, params)
    jax.tree.map(np.testing.assert_array_equal, scan(stacked), stacked)


def test_layout_round_trip_of_channels():
    channels = {
        f"layers_{i}": {"permanent": np.arange(i, i + 4), "experts": np.arange(6).reshape(3, 2) + i} for i in range(3)
    }
    stacked = scan(channels)
    assert stacked["layers"]["experts"].shape == (3, 3, 2)
    jax.tree.map(np.testing.assert_array_equal, unroll(stacked), channels)


def test_scanned_layout_has_no_cache(tiny, random_params):
    cache = attention.empty_cache(2, 1, 2, 8, 4, jnp.float32)
    model = Llama(tiny, None, Runtime(layout="scanned"))
    with pytest.raises(ValueError, match="unrolled"):
        model.apply({"params": scan(random_params(tiny))}, jnp.zeros((1, 2), jnp.int32), cache=cache)


def test_bfloat16_compute_leaves_parameters_and_gradients_in_float32(tiny, random_params):
    params = random_params(tiny)
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 61, (2, 9)))
    model = Llama(tiny, None, Runtime(dtype=jnp.bfloat16))
    low, _ = jax.jit(model.apply)({"params": params}, tokens)
    assert low.dtype == jnp.bfloat16
    exact = np.asarray(jax.jit(Llama(tiny).apply)({"params": params}, tokens)[0])
    assert np.linalg.norm(np.asarray(low, np.float32) - exact) < 0.1 * np.linalg.norm(exact)
    grads = jax.jit(jax.grad(lambda p: model.apply({"params": p}, tokens)[0].astype(jnp.float32).sum()))(params)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


def test_runtime_of_each_platform():
    assert runtime_for(Model(), "cpu") == Runtime()
    assert runtime_for(Model(compute_dtype="bfloat16"), "tpu").segments == "gmm"
    low = runtime_for(Model(compute_dtype="bfloat16", layout="scanned", remat="dots"), "gpu")
    assert (low.attention, low.layout, low.remat, low.dtype) == ("cudnn", "scanned", "dots", jnp.bfloat16)
    assert runtime_for(Model(), "gpu").attention == "blocks"
