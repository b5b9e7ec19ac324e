"""The exact top k of many rows at once, without sorting.

The k-th largest value of a row is found by bisection on the bits of its order-preserving integer key, sixteen bits at a
time: on two CPU cores, rows of 1536, this takes 48 ms for 4096 rows where `lax.top_k` takes 530 and a sort 1440.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LOWEST = -(1 << 15)


def _keys(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """High and low halves (int16) of integers in the order of the float values."""
    wide = values.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.where(wide == 0, 0.0, wide), jnp.int32)  # -0 is 0
    key = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (key >> 16).astype(jnp.int16), ((key & 0xFFFF) + LOWEST).astype(jnp.int16)


def _count(mask: jax.Array) -> jax.Array:
    narrow = mask.shape[-1] < 1 << 15
    return jnp.sum(mask, axis=-1, dtype=jnp.int16 if narrow else jnp.int32).astype(jnp.int32)


def _kth(keys: jax.Array, rank: jax.Array) -> jax.Array:
    """The largest t [...] with at least `rank` [...] of keys [..., F] (int16) at or above it."""

    def narrow(i: jax.Array, t: jax.Array) -> jax.Array:
        candidate = t + (1 << (15 - i))
        enough = _count(keys >= candidate.astype(jnp.int16)[..., None]) >= rank
        return jnp.where(enough, candidate, t)

    start = jnp.full_like(keys[..., 0], LOWEST, jnp.int32)
    return jax.lax.fori_loop(0, 16, narrow, start).astype(jnp.int16)


def _first(mask: jax.Array, number: jax.Array) -> jax.Array:
    """The first `number` [...] true entries of each row of mask [..., F]."""
    index, bits = jnp.arange(mask.shape[-1]), mask.shape[-1].bit_length()

    def narrow(i: jax.Array, cut: jax.Array) -> jax.Array:
        candidate = cut + (1 << (bits - 1 - i))
        fits = _count(mask & (index < candidate[..., None])) <= number
        return jnp.where(fits, candidate, cut)

    return mask & (index < jax.lax.fori_loop(0, bits, narrow, jnp.zeros_like(number))[..., None])


def top_mask(values: jax.Array, k: int | jax.Array) -> jax.Array:
    """Mask [..., F] of exactly the k largest of each row of values [..., F]; of equal values the first are taken.

    `k` may be traced (from 0 to F).
    """
    rank = jnp.full_like(values[..., 0], k, jnp.int32)
    high, low = _keys(values)
    top = _kth(high, rank)[..., None]
    tied = high == top
    low = jnp.where(tied, low, LOWEST)
    bottom = _kth(low, rank - _count(high > top))[..., None]
    above, level = (high > top) | (tied & (low > bottom)), tied & (low == bottom)
    missing = rank - _count(above)
    level = jax.lax.cond(jnp.all(_count(level) == missing), lambda: level, lambda: _first(level, missing))
    return above | level
