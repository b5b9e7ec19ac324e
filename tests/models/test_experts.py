"""The mixture against the dense model with its channels masked, token by token."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from readme_jax.config import MixtureConfig
from readme_jax.models.experts import plan_batch
from readme_jax.models.feed_forward import activations, linear
from readme_jax.models.layout import to_layout
from readme_jax.models.llama import Llama, attend, prepare, rms_norm
from readme_jax.models.runtime import Runtime

pytestmark = pytest.mark.usefixtures("quick_compile")
FFN, EXPERTS = 24, 3


def slices(permanent):
    """Channels of two layers whose true widths differ, so that one is padded with F. Exclusive rows may overlap."""
    rng = np.random.default_rng(0)
    shared = (5, 3) if permanent else (0, 0)
    channels = {}
    for layer, (p, d) in enumerate(zip(shared, (6, 8), strict=True)):
        order = rng.permutation(FFN)
        picks = [np.sort(rng.choice(order[p:], d, replace=False)) for _ in range(EXPERTS)]
        channels[f"layers_{layer}"] = {
            "permanent": np.pad(np.sort(order[:p]), (0, shared[0] - p), constant_values=FFN).astype(np.int32),
            "experts": np.stack([np.pad(e, (0, 8 - d), constant_values=FFN) for e in picks]).astype(np.int32),
        }
    return channels, MixtureConfig(num_experts=EXPERTS, expert=8, permanent=shared[0])


def take(ffn, rows):
    """Channels of a dense FFN, zeros where the index is F."""
    real = rows < FFN
    gate, up, down = (np.zeros((len(rows), 32), np.float32) for _ in range(3))
    gate[real], up[real] = np.asarray(ffn["gate"])[rows[real]], np.asarray(ffn["up"])[rows[real]]
    down[real] = np.asarray(ffn["down"]).T[rows[real]]
    return {"gate": jnp.asarray(gate), "up": jnp.asarray(up), "down": jnp.asarray(down.T)}


def untie(dense, channels, mixture):
    """Every expert with its own copy of its rows."""
    params = dict(dense)
    for name, rows in channels.items():
        layer = {k: v for k, v in dense[name].items() if k != "ffn"}
        layer |= {f"experts_{e}": take(dense[name]["ffn"], rows["experts"][e]) for e in range(mixture.num_experts)}
        if mixture.permanent:
            layer["permanent"] = take(dense[name]["ffn"], rows["permanent"])
        params[name] = layer
    return params


def masked_dense(config, dense, channels, tokens, routes, weights):
    """Hidden states of the dense model, each token with the channels of its own experts alone."""
    masks = {name: np.zeros((*tokens.shape, FFN), np.float32) for name in channels}
    for name, rows in channels.items():
        for b, t in np.ndindex(tokens.shape):
            masks[name][b, t, [c for c in rows["permanent"] if c < FFN]] += 1
            for e, w in zip(routes[b, t], weights[b, t], strict=True):
                masks[name][b, t, [c for c in rows["experts"][e] if c < FFN]] += w

    @jax.jit
    def run(dense, masks):
        ctx, x = prepare(config, tokens), dense["embed"][tokens]
        for name, mask in masks.items():
            p = dense[name]
            x, _ = attend(p, config, Runtime(), x, ctx)
            x = x + linear(activations(p["ffn"], rms_norm(x, p["ffn_norm"], config.norm_eps)) * mask, p["ffn"]["down"])
        return rms_norm(x, dense["final_norm"], config.norm_eps)

    return run(dense, masks)


def batch(top_k):
    rng = np.random.default_rng(1)
    routes = np.stack([rng.permutation(EXPERTS)[:top_k] for _ in range(14)]).reshape(2, 7, top_k).astype(np.int32)
    weights = rng.dirichlet(np.ones(top_k), (2, 7)).astype(np.float32)
    return jnp.asarray(rng.integers(0, 61, (2, 7))), routes, weights


def with_top_k(mixture, top_k, tied=False):
    return MixtureConfig(mixture.num_experts, mixture.expert, mixture.permanent, tied, top_k)


@pytest.mark.parametrize("permanent,top_k", [(True, 1), (True, 2), (False, 1), (False, 2)])
def test_sliced_model_equals_dense_model_with_masked_channels(tiny, random_params, permanent, top_k):
    """Tied and untied, unrolled and scanned, with unequal layer widths padded by zero channels: all one result."""
    dense = random_params(tiny)
    channels, mixture = slices(permanent)
    tokens, routes, weights = batch(top_k)
    want = masked_dense(tiny, dense, channels, tokens, routes, weights)
    plan = plan_batch(jnp.asarray(routes), EXPERTS, jnp.asarray(weights))
    untied = untie(dense, channels, mixture)
    for tied, layout in itertools.product([False, True], ["unrolled", "scanned"]):
        model = Llama(tiny, with_top_k(mixture, top_k, tied), Runtime(layout=layout))
        params, rows = to_layout(dense if tied else untied, layout), to_layout(channels, layout)
        got, _ = jax.jit(model.apply)({"params": params}, tokens, plan, jax.tree.map(jnp.asarray, rows))
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=f"tied={tied}, {layout}")


@pytest.mark.parametrize("tied", [False, True])
def test_width_of_all_channels_is_the_dense_model(tiny, random_params, tied):
    dense = random_params(tiny)
    rows = {
        "permanent": np.zeros(0, np.int32),
        "experts": np.broadcast_to(np.arange(FFN, dtype=np.int32), (EXPERTS, FFN)),
    }
    channels, mixture = {f"layers_{i}": rows for i in range(2)}, MixtureConfig(EXPERTS, FFN, tied=tied)
    tokens, routes, _ = batch(1)
    params = dense if tied else untie(dense, channels, mixture)
    plan = plan_batch(jnp.asarray(routes), EXPERTS)
    got, _ = jax.jit(Llama(tiny, mixture).apply)({"params": params}, tokens, plan, jax.tree.map(jnp.asarray, channels))
    want, _ = jax.jit(Llama(tiny).apply)({"params": dense}, tokens)
    np.testing.assert_allclose(got, want, atol=1e-5)


def count(jaxpr, primitive):
    """How often a primitive stands in a jaxpr, jaxprs within it included."""

    def holds_equations(value):
        return hasattr(value, "eqns") or hasattr(value, "jaxpr")

    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == primitive
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=holds_equations):
            if holds_equations(value):
                total += count(getattr(value, "jaxpr", value), primitive)
    return total


def test_tokens_are_sorted_once_a_batch_whatever_the_number_of_layers(tiny, random_params):
    mixture, tokens = MixtureConfig(EXPERTS, 8, 5), jnp.zeros((2, 7), jnp.int32)
    sorts = {}
    for layers in (1, 4):
        config = dataclasses.replace(tiny, num_layers=layers)
        params = random_params(config, mixture)

        def loss(params, experts, config=config):
            plan = plan_batch(experts, EXPERTS)
            return Llama(config, mixture, Runtime()).apply({"params": params}, tokens, plan)[0].sum()

        step = jax.make_jaxpr(jax.value_and_grad(loss))(params, jnp.zeros((2, 7, 1), jnp.int32))
        sorts[layers] = count(step.jaxpr, "sort")
    assert sorts[4] == sorts[1] > 0


def test_gradients_of_tied_experts_add_up_and_padding_never_trains(tiny, random_params):
    dense = random_params(tiny)
    channels, mixture = slices(permanent=True)
    tokens, routes, weights = batch(2)
    plan = plan_batch(jnp.asarray(routes), EXPERTS, jnp.asarray(weights))
    direction = jnp.asarray(np.random.default_rng(2).normal(size=(2, 7, 32)), jnp.float32)
    rows = jax.tree.map(jnp.asarray, channels)

    def gradients(params, tied):
        model = Llama(tiny, with_top_k(mixture, 2, tied))

        def loss(p):
            return (model.apply({"params": p}, tokens, plan, rows)[0] * direction).sum()

        return jax.jit(jax.grad(loss))(params)

    tied, untied = gradients(dense, True), gradients(untie(dense, channels, mixture), False)
    for name, named in channels.items():
        parts = {"permanent": named["permanent"]} | {f"experts_{e}": named["experts"][e] for e in range(EXPERTS)}
        for matrix, axis in (("gate", 0), ("up", 0), ("down", 1)):
            want = np.zeros((FFN, 32))
            for part, index in parts.items():
                grad = np.moveaxis(np.asarray(untied[name][part][matrix]), axis, 0)
                assert not grad[index == FFN].any() and grad[index < FFN].any()
                np.add.at(want, index[index < FFN], grad[index < FFN])
            got = np.moveaxis(np.asarray(tied[name]["ffn"][matrix]), axis, 0)
            np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
