"""Decode attention on a GPU as one kernel a layer (Pallas, lowered through Triton): it reads each row's own tokens and
no more, and writes the new token's keys and values in place. Nothing else then depends on how long rows are.

# R rows of the cache, B rows of a call, K kv heads, G query heads a kv head, h head width, S tokens a row,
# J programs that share a row and head, s tokens a block
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from readme_jax.models.attention import MASKED
from readme_jax.serving.attend import Part
from readme_jax.serving.state import Cache

BLOCK = 64  # tokens; rows of the cache are whole blocks long
PROGRAMS = 528  # at least so many fill a GPU: 132 multiprocessors, four each
TENSOR_ROWS = 16  # fewest query rows that tensor cores take


def attend_and_write(
    q: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: Cache,
    positions: jax.Array,
    runs: jax.Array,
    window: int | None = None,
    divisor: float | None = None,
    interpret: bool = False,
) -> tuple[Part, Cache]:
    """Attention of q [B, K, G, h] to the tokens before `positions` [B] of rows 0 .. B, and the cache with key and value
    [B, K, h] at `positions` of the rows that run [B].

    The cache is one stretch of whole blocks and is used up. With `window` a token sees itself and the window - 1
    tokens before it. `interpret` runs the kernel's equations without a GPU: slow, for tests.
    """
    (keys,), (values,) = cache.keys, cache.values
    batch, heads, group, width = q.shape
    length = keys.shape[3]
    share = min(length // BLOCK, pl.cdiv(PROGRAMS, batch * heads))
    tokens = pl.cdiv(length, share * BLOCK) * BLOCK
    share = pl.cdiv(length, tokens)
    if group > 1:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, -group % TENSOR_ROWS), (0, 0)))
    rows = q.shape[2]
    logits = jax.ShapeDtypeStruct((share, batch, heads, rows), jnp.float32)
    out, total, largest, keys, values = pl.pallas_call(
        functools.partial(_kernel, tokens=tokens, window=window, scale=1 / (divisor or math.sqrt(width))),
        grid=(batch, heads, share),
        out_shape=(
            jax.ShapeDtypeStruct((*logits.shape, width), jnp.float32),
            logits,
            logits,
            jax.ShapeDtypeStruct(keys.shape, keys.dtype),
            jax.ShapeDtypeStruct(values.shape, values.dtype),
        ),
        input_output_aliases={5: 3, 6: 4},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="decode_attention",
    )(positions, runs.astype(jnp.int32), q, key, value, keys, values)
    whole = largest.max(axis=0)
    scales = jnp.exp(largest - whole)
    out, total = jnp.sum(out * scales[..., None], axis=0), jnp.sum(total * scales, axis=0)
    part = Part(out[:, :, :group], total[:, :, :group, None], whole[:, :, :group, None])
    return part, Cache((keys,), (values,))


def _kernel(
    positions_ref: Any,
    runs_ref: Any,
    q_ref: Any,
    key_ref: Any,
    value_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    out_ref: Any,
    total_ref: Any,
    largest_ref: Any,
    keys_out: Any,
    values_out: Any,
    *,
    tokens: int,
    window: int | None,
    scale: float,
) -> None:
    """One row, one kv head, tokens [j * tokens, (j + 1) * tokens): softmax's parts over them, block by block."""
    b, n, j = (pl.program_id(axis) for axis in range(3))
    position = positions_ref[b]
    first = j * tokens if window is None else jnp.maximum(j * tokens, position - window + 1)
    last = jnp.minimum((j + 1) * tokens, position)
    group, width = q_ref.shape[2:]
    q = q_ref[b, n, 0, :] if group == 1 else q_ref[b, n, :, :]
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def logits_of(k: jax.Array) -> jax.Array:  # [h, s] -> [G, s]
        if group == 1:
            return jnp.sum(q.astype(jnp.float32)[:, None] * k.astype(jnp.float32), axis=0)[None]
        return jnp.dot(q, k, preferred_element_type=jnp.float32, precision=exact)

    def sum_of(odds: jax.Array, v: jax.Array) -> jax.Array:  # [G, s], [s, h] -> [G, h]
        if group == 1:
            return jnp.sum(odds.reshape(BLOCK, 1) * v.astype(jnp.float32), axis=0)[None]
        return jnp.dot(odds.astype(v.dtype), v, preferred_element_type=jnp.float32, precision=exact)

    def block(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        out, total, largest = carry
        here = pl.ds(i * BLOCK, BLOCK)
        slots = i * BLOCK + jnp.arange(BLOCK)
        seen = (slots >= first) & (slots < last)
        logits = logits_of(keys_ref[b, n, :, here]) * scale
        logits = jnp.where(seen[None], logits, MASKED)
        above = jnp.maximum(largest, jnp.max(logits, axis=1))
        odds = jnp.where(seen[None], jnp.exp(logits - above[:, None]), 0.0)
        values = jnp.where(seen[:, None], values_ref[b, n, here, :], 0)
        fade = jnp.exp(largest - above)
        return out * fade[:, None] + sum_of(odds, values), total * fade + jnp.sum(odds, axis=1), above

    start = (
        jnp.zeros((group, width), jnp.float32),
        jnp.zeros(group, jnp.float32),
        jnp.full(group, MASKED, jnp.float32),
    )
    out, total, largest = jax.lax.fori_loop(first // BLOCK, (last + BLOCK - 1) // BLOCK, block, start)
    out_ref[j, b, n, :, :] = out
    total_ref[j, b, n, :] = total
    largest_ref[j, b, n, :] = largest

    @pl.when((j == 0) & (runs_ref[b] > 0))
    def _() -> None:
        keys_out[b, n, :, position] = key_ref[b, n, :]
        values_out[b, n, position, :] = value_ref[b, n, :]
