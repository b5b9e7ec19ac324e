"""The router against Table 1 and a slow NumPy version of it, whole, padded and token by token."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from readme_jax import config
from readme_jax.config import ModelConfig, RouterConfig
from readme_jax.models.router import Router, choose, config_for, router_cache, start_router

SMALL = RouterConfig(vocab_size=37, num_experts=5, dim=24, num_heads=3, head_dim=8, mlp_dim=20, rope_theta=500.0)


def random_router(cfg, seed=0):
    """Parameters with biases and norms away from their starting values."""
    shapes = jax.eval_shape(lambda: nn.unbox(Router(cfg).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0.3, 0.4, s.shape), s.dtype), shapes["params"])


def slow_logits(p, cfg, tokens):
    """Table 1 for one unpadded sequence [T], a query at a time, in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
    heads, width = cfg.num_heads, cfg.head_dim
    divisor = cfg.logit_divisor or np.sqrt(width)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * scale

    def affine(x, layer):
        return x @ layer["w"].T + layer["b"]

    def turn(x, position):
        out = x.copy()
        for i in range(width // 2):
            angle = position * cfg.rope_theta ** (-2 * i / width)
            a, b = x[..., i], x[..., i + width // 2]
            out[..., i] = a * np.cos(angle) - b * np.sin(angle)
            out[..., i + width // 2] = b * np.cos(angle) + a * np.sin(angle)
        return out

    x = p["embed"][tokens]
    y = norm(x, p["attn_norm"])
    q, k, v = (affine(y, p[n]).reshape(-1, heads, width) for n in "qkv")
    q, k = (np.stack([turn(z[t], t) for t in range(len(tokens))]) for z in (q, k))
    attended = np.zeros_like(q)
    for t in range(len(tokens)):
        for h in range(heads):
            scores = np.exp(k[: t + 1, h] @ q[t, h] / divisor)
            attended[t, h] = scores @ v[: t + 1, h] / scores.sum()
    x = x + affine(attended.reshape(len(tokens), -1), p["o"])
    up = affine(norm(x, p["mlp_norm"]), p["up"])
    x = x + affine(up / (1 + np.exp(-up)), p["down"])
    return affine(norm(x, p["final_norm"]), p["head"])


def test_table_1_has_17965063_parameters():
    cfg = RouterConfig(vocab_size=32000, num_experts=7)
    shapes = jax.eval_shape(lambda: Router(cfg).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    assert sum(x.size for x in jax.tree.leaves(nn.unbox(shapes))) == 17_965_063


@pytest.mark.parametrize("divisor", [None, 1.0])
def test_forward_equals_slow_version(divisor):
    cfg = RouterConfig(**{**config.to_dict(SMALL), "logit_divisor": divisor})
    p = random_router(cfg)
    tokens = np.random.default_rng(1).integers(0, 37, (2, 11))
    logits, cache = Router(cfg).apply({"params": p}, jnp.asarray(tokens))
    assert cache is None and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, [slow_logits(p, cfg, row) for row in tokens], atol=2e-5)


def test_divisors_differ():
    p = random_router(SMALL)
    tokens = np.arange(11)
    one = RouterConfig(**{**config.to_dict(SMALL), "logit_divisor": 1.0})
    assert np.abs(slow_logits(p, SMALL, tokens) - slow_logits(p, one, tokens)).max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    p = random_router(SMALL)
    rng = np.random.default_rng(2)
    rows = [rng.integers(0, 37, n) for n in (9, 4, 1)]
    tokens, valid = np.full((3, 9), 36), np.zeros((3, 9), bool)
    for i, row in enumerate(rows):
        place = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        tokens[i, place], valid[i, place] = row, True
    logits, _ = Router(SMALL).apply({"params": p}, jnp.asarray(tokens), jnp.asarray(valid))
    for i, row in enumerate(rows):
        np.testing.assert_allclose(logits[i][valid[i]], slow_logits(p, SMALL, row), atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_token_by_token_equals_the_whole_sequence(side):
    """A padded prompt read in two chunks, then single tokens: each logit is the unpadded sequence's."""
    p = random_router(SMALL)
    rng = np.random.default_rng(3)
    prompts, following = [rng.integers(0, 37, n) for n in (6, 3)], rng.integers(0, 37, (2, 5))
    tokens, valid = np.zeros((2, 6), int), np.zeros((2, 6), bool)
    for i, row in enumerate(prompts):
        place = slice(6 - len(row), 6) if side == "left" else slice(0, len(row))
        tokens[i, place], valid[i, place] = row, True
    step = jax.jit(lambda t, m, c: Router(SMALL).apply({"params": p}, t, m, c))
    cache, logits = router_cache(SMALL, 2, 12), []
    for chunk in (slice(0, 4), slice(4, 6)):
        out, cache = step(tokens[:, chunk], valid[:, chunk], cache)
        logits.append(out)
    for t in range(5):
        out, cache = step(following[:, t : t + 1], None, cache)
        logits.append(out)
    seen = np.concatenate([valid, np.ones((2, 5), bool)], axis=1)
    got = np.concatenate(logits, axis=1)
    for i, row in enumerate(prompts):
        want = slow_logits(p, SMALL, np.concatenate([row, following[i]]))
        np.testing.assert_allclose(got[i][seen[i]], want, atol=2e-5)


def test_choose_takes_the_best_and_renormalises_over_them():
    logits = jnp.asarray(np.random.default_rng(4).normal(size=(2, 3, 5)), jnp.float32)
    experts, weights = choose(logits, 1)
    np.testing.assert_array_equal(experts[..., 0], logits.argmax(-1))
    np.testing.assert_array_equal(weights, 1.0)
    experts, weights = choose(logits, 3)
    assert experts.dtype == jnp.int32
    for b in range(2):
        for t in range(3):
            order = np.argsort(-np.asarray(logits[b, t]))[:3]
            np.testing.assert_array_equal(experts[b, t], order)
            raised = np.exp(np.asarray(logits[b, t])[order])
            np.testing.assert_allclose(weights[b, t], raised / raised.sum(), rtol=1e-5)


@pytest.mark.parametrize("width", [16, 24, 40])
def test_embedding_starts_as_the_backbone_columns(width):
    backbone = jnp.asarray(np.random.default_rng(5).normal(size=(37, width)), jnp.float32)
    embed = start_router(jax.random.key(0), SMALL, backbone)["embed"]
    kept = min(24, width)
    np.testing.assert_array_equal(embed[:, :kept], backbone[:, :kept])
    rest = np.asarray(embed[:, kept:])
    assert rest.shape == (37, 24 - kept)
    if rest.size:
        assert 0.01 < rest.std() < 0.03


def test_config_takes_vocabulary_and_rope_base_from_the_backbone():
    backbone = ModelConfig(99, 32, 2, 4, 2, 8, 48, rope_theta=123.0)
    made = config_for(config.Router(dim=64, logit_divisor=1.0), backbone, 7)
    assert made == RouterConfig(99, 7, dim=64, rope_theta=123.0, logit_divisor=1.0)
