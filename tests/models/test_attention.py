"""Attention against a plain NumPy version, and the cache against the whole sequence."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from readme_jax.config import RopeScaling
from readme_jax.models import attention, attention_tpu


def plain_attention(q, k, v, positions, window, divisor):
    """Attention one head, one query and one key at a time; None where a query is padding."""
    batch, length, heads, width = q.shape
    group = heads // k.shape[2]
    out = np.full(q.shape, np.nan)
    for b in range(batch):
        for t in range(length):
            if positions[b, t] < 0:
                continue
            seen = [
                s
                for s in range(length)
                if 0 <= positions[b, s] <= positions[b, t]
                and (window is None or positions[b, t] - positions[b, s] < window)
            ]
            for h in range(heads):
                scores = np.array([q[b, t, h] @ k[b, s, h // group] / divisor for s in seen])
                weights = np.exp(scores - scores.max())
                out[b, t, h] = (weights / weights.sum()) @ np.stack([v[b, s, h // group] for s in seen])
    return out


def qkv(seed, batch, length, heads=4, kv_heads=2, width=8):
    rng = np.random.default_rng(seed)
    shapes = [(batch, length, n, width) for n in (heads, kv_heads, kv_heads)]
    return [rng.normal(size=s).astype(np.float32) for s in shapes]


def padded_positions(kind, batch, length):
    """Positions [B, T], -1 at padding, of rows padded by different amounts."""
    valid = np.ones((batch, length), bool)
    for b in range(batch):
        pad = 2 * b
        if kind == "left":
            valid[b, :pad] = False
        elif kind == "right":
            valid[b, length - pad :] = False
        elif kind == "middle":
            valid[b, 3 : 3 + pad] = False
    return np.where(valid, valid.cumsum(1) - 1, -1).astype(np.int32)


@pytest.mark.parametrize("window", [None, 150])
def test_splash_kernels_equal_blocks_in_value_and_gradient(monkeypatch, window):
    """Several blocks, some of which no query sees; grouped heads."""
    monkeypatch.setattr(attention_tpu, "BLOCK", 128)
    inputs = [jnp.asarray(x) for x in qkv(0, 2, 384, width=16)]
    direction = jnp.asarray(qkv(1, 2, 384, width=16)[0])
    splash = partial(attention_tpu.causal_attention, window=window, divisor=3.0, interpret=True)
    blocks = partial(attention.causal_attention, window=window, divisor=3.0)
    (got, pull), (want, pull_want) = (jax.vjp(jax.jit(f), *inputs) for f in (splash, blocks))
    np.testing.assert_allclose(got, want, atol=1e-5)
    for a, b in zip(pull(direction), pull_want(direction), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("window", [None, 1, 5, 12])
@pytest.mark.parametrize("length", [3, 8, 21])
def test_blocks_equal_plain_attention(monkeypatch, length, window):
    monkeypatch.setattr(attention, "BLOCK", 8)  # 3 and 21 are no multiple of it
    q, k, v = qkv(0, 2, length)
    positions = np.broadcast_to(np.arange(length), (2, length))
    want = plain_attention(q, k, v, positions, window, np.sqrt(8))
    got = attention.causal_attention(*map(jnp.asarray, (q, k, v)), window=window)
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kind", ["left", "right", "middle"])
def test_padding_is_left_out(monkeypatch, kind, window):
    monkeypatch.setattr(attention, "BLOCK", 8)
    q, k, v = qkv(1, 4, 13)
    positions = padded_positions(kind, 4, 13)
    want = plain_attention(q, k, v, positions, window, np.sqrt(8))
    got = np.asarray(attention.causal_attention(*map(jnp.asarray, (q, k, v, positions)), window=window))
    np.testing.assert_allclose(got[positions >= 0], want[positions >= 0], atol=2e-6)
    assert np.isfinite(got).all()  # padding rows stay finite


def test_divisor_replaces_the_root_of_the_head_width():
    q, k, v = qkv(2, 1, 6)
    want = plain_attention(q, k, v, np.arange(6)[None], None, 1.0)
    np.testing.assert_allclose(attention.causal_attention(*map(jnp.asarray, (q, k, v)), divisor=1.0), want, atol=2e-6)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_cache_filled_in_any_chunks_equals_plain_attention(data):
    """Rows with padding anywhere, split into chunks, give what the whole sequence gives."""
    batch, length = 2, 10
    valid = np.array(data.draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length)))
    valid = valid.reshape(batch, length)
    cuts = data.draw(st.sampled_from([[], [5], [4, 5], [1, 9]]))
    window = data.draw(st.sampled_from([None, 3]))
    positions = np.where(valid, valid.cumsum(1) - 1, -1)
    q, k, v = qkv(3, batch, length)
    want = plain_attention(q, k, v, positions, window, np.sqrt(8))

    cache = attention.empty_cache(1, batch, 2, 8, 16, jnp.float32)
    outs = []
    for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
        chunk = slice(start, stop)
        rotary, placed, cache = attention.place_tokens(
            jnp.zeros((batch, stop - start), jnp.int32), jnp.asarray(valid[:, chunk]), cache
        )
        np.testing.assert_array_equal(placed, positions[:, chunk])
        np.testing.assert_array_equal(rotary, np.maximum(positions[:, chunk], 0))
        written = attention.write_cache(cache, 0, jnp.asarray(k[:, chunk]), jnp.asarray(v[:, chunk]))
        outs.append(attention.cached_attention(jnp.asarray(q[:, chunk]), *written, placed, cache.slots, window))
        cache = attention.advance(cache, placed, (written[0],), (written[1],))
    got = np.concatenate(outs, axis=1)
    np.testing.assert_allclose(got[valid], want[valid], atol=2e-6)
    np.testing.assert_array_equal(cache.positions, valid.sum(1))
    assert int(cache.index) == length


def test_rotation_turns_pairs_half_a_head_apart():
    x = np.random.default_rng(4).normal(size=(1, 5, 2, 8)).astype(np.float32)
    freqs = np.asarray(attention.rotary_frequencies(8, 100.0, None))
    np.testing.assert_allclose(freqs, [100.0 ** (-2 * i / 8) for i in range(4)], rtol=1e-6)
    got = np.asarray(attention.rotate(jnp.asarray(x), jnp.arange(5)[None], jnp.asarray(freqs)))
    for t in range(5):
        for i in range(4):
            turned = (x[0, t, :, i] + 1j * x[0, t, :, i + 4]) * np.exp(1j * t * freqs[i])
            np.testing.assert_allclose(got[0, t, :, i] + 1j * got[0, t, :, i + 4], turned, atol=1e-5)


def test_rope_scalings_keep_short_waves_and_stretch_long_ones():
    plain = np.asarray(attention.rotary_frequencies(64, 500000.0, None))
    linear = np.asarray(attention.rotary_frequencies(64, 500000.0, RopeScaling("linear", 4.0)))
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)
    scaled = np.asarray(attention.rotary_frequencies(64, 500000.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)))
    waves = 2 * np.pi / plain
    short, long = waves < 8192 / 4, waves > 8192
    np.testing.assert_allclose(scaled[short], plain[short], rtol=1e-6)
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    between = scaled[~short & ~long] / plain[~short & ~long]
    assert between.size and (between > 1 / 8).all() and (between < 1).all()


def test_gradients_stay_finite_where_a_row_is_all_padding():
    q, k, v = map(jnp.asarray, qkv(5, 2, 6))
    positions = jnp.asarray(np.stack([np.arange(6), np.full(6, -1)]).astype(np.int32))
    grads = jax.grad(lambda *a: attention.causal_attention(*a, positions)[0].sum(), argnums=(0, 1, 2))(q, k, v)
    assert all(np.isfinite(g).all() for g in grads)
