"""Targets and losses against slow NumPy versions of the equations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import EXPERTS, MODEL

from readme_jax.models import layout
from readme_jax.models.experts import plan_batch
from readme_jax.models.llama import Llama, head_weight
from readme_jax.models.runtime import Runtime
from readme_jax.tuning import distill

RUNTIME = Runtime(segments="masked")


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def slow_activations(p, tokens):
    """|a| inputs [L, B, T, F] of a dense model by loops over heads and positions, float64."""
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), p)
    norm = lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + MODEL.norm_eps) * w  # noqa: E731
    length, half = tokens.shape[1], MODEL.head_dim // 2
    angles = np.arange(length)[:, None] / MODEL.rope_theta ** (np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)

    def rope(x):
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x, seen = p["embed"][tokens], []
    for i in range(MODEL.num_layers):
        w = p[f"layers_{i}"]
        y, out = norm(x, w["attn_norm"]), np.zeros((*tokens.shape, MODEL.num_heads * MODEL.head_dim))
        for h in range(MODEL.num_heads):
            at = slice(h * MODEL.head_dim, (h + 1) * MODEL.head_dim)
            g = h // (MODEL.num_heads // MODEL.num_kv_heads)
            kv = slice(g * MODEL.head_dim, (g + 1) * MODEL.head_dim)
            q, k, v = rope(y @ w["q"][at].T), rope(y @ w["k"][kv].T), y @ w["v"][kv].T
            scores = q @ k.swapaxes(1, 2) / np.sqrt(MODEL.head_dim)
            out[..., at] = softmax(np.where(np.tri(length, dtype=bool), scores, -np.inf)) @ v
        x = x + out @ w["o"].T
        y = norm(x, w["ffn_norm"])
        gate = y @ w["ffn"]["gate"].T
        a = gate / (1 + np.exp(-gate)) * (y @ w["ffn"]["up"].T)
        x = x + a @ w["ffn"]["down"].T
        seen.append(a)
    return np.stack(seen)


def slow_sets(a, rows, k):
    """|top k channels of a, and expert j's rows| for each expert, by Python sets."""
    top = set(sorted(range(len(a)), key=lambda c: (-a[c], c))[:k])
    return np.array([len(top & (set(r.tolist()) - {len(a)})) for r in rows], np.float64)


@pytest.mark.parametrize("scanned", [False, True])
def test_overlap_scores(dense, cut, batch, scanned):
    _, _, channels = cut()
    a = np.abs(slow_activations(dense, batch["tokens"]))
    rows = [channels[f"layers_{i}"]["experts"] for i in range(MODEL.num_layers)]
    half = MODEL.ffn_dim // 2
    expected = np.array([[[slow_sets(t, rows[i], half) for t in row] for row in layer] for i, layer in enumerate(a)])
    trees = (dense, channels) if not scanned else (layout.scan(dense), layout.scan(channels))
    runtime = Runtime(layout="scanned" if scanned else "unrolled")
    scores = jax.jit(distill.overlap_scores, static_argnums=(1, 2))
    got = scores(trees[0], MODEL, runtime, trees[1], batch["tokens"])
    assert (np.asarray(got) == expected).mean() > 0.999  # float32 may rank two nearly equal channels the other way
    assert np.abs(np.asarray(got) - expected).max() <= 1


def test_released_overlap():
    rng = np.random.default_rng(5)
    a = rng.normal(size=(2, 3, 40)).astype(np.float32)
    rows = np.stack([np.sort(rng.permutation(40)[:12]), np.sort(rng.permutation(40)[:12])]).astype(np.int32)
    padded = np.concatenate([rows, np.full((2, 4), 40, np.int32)], axis=1)
    n = 12
    expected = [
        [sum(slow_sets(t, rows, k) for k in (n - 1, 4 * n // 5, 3 * n // 5, 2 * n // 5, n // 5)) / (3 * n) for t in row]
        for row in a
    ]
    np.testing.assert_allclose(jax.jit(distill.released_overlap)(a, padded), expected, rtol=1e-6)


@pytest.fixture
def drawn():
    rng = np.random.default_rng(6)
    return rng.normal(size=(2, 5, EXPERTS)), rng.integers(0, 20, (4, 2, 5, EXPERTS)).astype(float)


@pytest.mark.parametrize("kl", ["router_target", "target_router"])
def test_eq4_loss(drawn, kl):
    logits, scores = drawn
    total = 0.0
    for layer in scores:
        for b, t in np.ndindex(logits.shape[:2]):
            router, target = softmax(logits[b, t]), softmax(layer[b, t] / 7.0)
            p, q = (router, target) if kl == "router_target" else (target, router)
            total += sum(p[e] * np.log(p[e] / q[e]) for e in range(EXPERTS))
    got = distill.eq4_loss(jnp.asarray(logits), jnp.asarray(scores), 7.0, kl)
    np.testing.assert_allclose(got, total / scores[..., 0].size, rtol=1e-5)


def test_released_loss(drawn):
    logits, scores = drawn
    scores = scores / 20
    total = 0.0
    for layer in scores:
        for b, t in np.ndindex(logits.shape[:2]):
            router = np.log(softmax(logits[b, t]))
            best = int(np.argmax(layer[b, t]))
            smoothed = [0.5 * (e == best) + 0.5 / EXPERTS for e in range(EXPERTS)]
            soft = softmax(10 * layer[b, t])
            total -= sum((0.75 * smoothed[e] + 0.25 * soft[e]) * router[e] for e in range(EXPERTS))
    got = distill.released_loss(jnp.asarray(logits), jnp.asarray(scores))
    np.testing.assert_allclose(got, total / scores[..., 0].size, rtol=1e-5)


def test_domain_loss(drawn):
    logits, _ = drawn
    domain = np.array([2, 0])
    expected = -np.mean([np.log(softmax(logits[b, t]))[domain[b]] for b, t in np.ndindex(2, 5)])
    np.testing.assert_allclose(distill.domain_loss(jnp.asarray(logits), jnp.asarray(domain)), expected, rtol=1e-5)


def test_switch_rate(drawn):
    logits, _ = drawn
    p = softmax(logits)
    expected = np.mean([1 - p[b, t] @ p[b, t - 1] for b in range(2) for t in range(1, 5)])
    np.testing.assert_allclose(distill.switch_rate(jnp.asarray(logits)), expected, rtol=1e-5)
    certain = jnp.asarray([[[50.0, 0, 0], [0, 50, 0], [0, 50, 0], [0, 0, 50], [0, 0, 50]]])
    np.testing.assert_allclose(distill.switch_rate(certain), 0.5, atol=1e-6)


def test_expert_losses(cut, batch, drawn):
    mixture, params, channels = cut()
    tokens = jnp.asarray(batch["tokens"])
    got = jax.jit(distill.expert_losses, static_argnums=(1, 2, 3))(params, MODEL, mixture, RUNTIME, channels, tokens)
    assert got.shape == (*tokens.shape, EXPERTS)

    @jax.jit
    def logits_under(expert):
        plan = plan_batch(jnp.full((*tokens.shape, 1), expert), EXPERTS)
        hidden, _ = Llama(MODEL, mixture, RUNTIME).apply({"params": params}, tokens, plan, channels)
        return hidden @ head_weight(params).T

    for e in range(EXPERTS):
        log_p = np.log(softmax(np.asarray(logits_under(e), np.float64)))
        expected = -np.take_along_axis(log_p[:, :-1], np.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
        np.testing.assert_allclose(got[:, :-1, e], expected, rtol=1e-3)
    assert not np.asarray(got[:, -1]).any()

    logits, losses = drawn[0], drawn[1][0]
    expected = np.mean([softmax(logits[b, t]) @ losses[b, t] for b in range(2) for t in range(4)])
    np.testing.assert_allclose(distill.expected_loss(jnp.asarray(logits), jnp.asarray(losses)), expected, rtol=1e-5)


def test_merging_an_untuned_mixture_gives_the_dense_model_back(dense, cut):
    for tied, permanent in ((False, True), (False, False), (True, True)):
        _, params, channels = cut(permanent, tied)
        merged = distill.merged_dense(dense, params, channels)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), merged, dense)


def test_merging_averages_the_copies_of_a_channel(dense, cut):
    _, params, channels = cut(permanent=False)
    silent = jax.tree.map(jnp.zeros_like, params["layers_0"]["experts_1"])
    moved = params | {"layers_0": params["layers_0"] | {"experts_1": silent}}
    merged = distill.merged_dense(dense, moved, channels)
    held = np.array([[c in set(r.tolist()) for c in range(MODEL.ffn_dim)] for r in channels["layers_0"]["experts"]])
    share = np.where(held.any(0), (held[0] * 1.0 + held[2]) / np.maximum(held.sum(0), 1), 1.0)
    got, before = merged["layers_0"]["ffn"], dense["layers_0"]["ffn"]
    np.testing.assert_allclose(got["down"], before["down"] * share, rtol=1e-5)
    np.testing.assert_allclose(got["up"], before["up"] * share[:, None], rtol=1e-5)


def test_overlap_share():
    scores = np.array([[[[3.0, 1, 1], [0, 2, 2]]], [[[0, 1, 1], [0, 1, 2]]]])
    assert distill.overlap_share(np.array([[0, 2]]), scores) == 1.0
    assert distill.overlap_share(np.array([[0, 1]]), scores) == 0.5
