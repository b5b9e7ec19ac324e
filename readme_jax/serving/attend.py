"""Attention in parts that are merged by their log-sum-exps: stretches of cached keys, and new ones.

# B rows, K kv heads, Q queries a kv head (of one token its G query heads, of a chunk T x G), h head width, S keys
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from readme_jax.models.attention import MASKED


class Part(NamedTuple):
    """Attention over some of the keys: out [B, K, Q, h], not yet divided by total [B, K, Q, 1]; the largest logit."""

    out: jax.Array
    total: jax.Array
    largest: jax.Array


def attend(q: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, divisor: float | None) -> Part:
    """q [B, K, Q, h] over keys [B, K, h, S] and values [B, K, S, h] where mask (broadcast to [B, K, Q, S])."""
    divisor = divisor or math.sqrt(q.shape[-1])
    logits = jnp.einsum("bkqh,bkhs->bkqs", q, keys, preferred_element_type=jnp.float32) / divisor
    logits = jnp.where(mask, logits, MASKED)
    largest = logits.max(axis=-1, keepdims=True)
    odds = jnp.exp(logits - largest)
    out = jnp.einsum("bkqs,bksh->bkqh", odds.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return Part(out, odds.sum(axis=-1, keepdims=True), largest)


def attend_self(q: jax.Array, key: jax.Array, value: jax.Array, divisor: float | None) -> Part:
    """A token's attention to itself: q [B, K, G, h], key and value [B, K, h]."""
    divisor = divisor or math.sqrt(q.shape[-1])
    logits = jnp.sum((q * key[:, :, None]).astype(jnp.float32), axis=-1, keepdims=True) / divisor
    out = jnp.broadcast_to(value[:, :, None].astype(jnp.float32), q.shape)
    return Part(out, jnp.ones_like(logits), logits)


def combine(parts: Sequence[Part]) -> Part:
    """Attention over the keys of all parts."""
    if len(parts) == 1:
        return parts[0]
    largest = functools.reduce(jnp.maximum, [p.largest for p in parts])
    scales = [jnp.exp(p.largest - largest) for p in parts]
    out, total = (functools.reduce(jnp.add, [p[i] * s for p, s in zip(parts, scales, strict=True)]) for i in (0, 1))
    return Part(out, total, largest)


def merge(*parts: Part) -> jax.Array:
    """The attention over all parts' keys, divided by the total: [B, K, Q, h] float32."""
    whole = combine(parts)
    return whole.out / whole.total


def turn(x: jax.Array, cos: jax.Array, sin: jax.Array, axis: int) -> jax.Array:
    """Rotary embedding of x along its head width; pairs are (i, i + h/2). cos and sin broadcast to its halves."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=axis)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=axis).astype(x.dtype)
