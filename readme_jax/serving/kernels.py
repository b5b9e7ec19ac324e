"""A decode step's kernels on a GPU (Pallas, lowered through Triton).

A step is many small operations between the matmuls, and each costs a launch: at batch 1 together a third of the time.
So one kernel turns, attends to the cache and writes it: it reads each row's own tokens and no more, and no loop, branch
or size of the step depends on how long rows are. Another joins what several programs have read of a row.

# R rows of the cache, B rows of a call, H heads, K kv heads, G = H / K, h head width, S tokens a row, D model width,
# J programs that share a row and head
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from readme_jax.models.attention import MASKED
from readme_jax.models.grouped_gpu import entries
from readme_jax.serving.state import Cache

BLOCK = 64  # tokens; rows of the cache are whole blocks long
TENSOR_ROWS = 16  # fewest query rows that tensor cores take
Array = jax.Array


class Tiles(NamedTuple):
    """How attention is cut: tokens a step, a power of two, at most what divides the cache; query rows of a product of
    a kv head's only head (1, or TENSOR_ROWS for tensor cores); at least so many programs, to fill a GPU (132
    multiprocessors, four each), and at most so many tokens of the cache to each: a batch waits for its longest row;
    how Triton runs them."""

    block: int = BLOCK
    rows: int = TENSOR_ROWS
    programs: int = 528
    tokens: int = 1024
    warps: int = 4
    stages: int = 2


TILES = Tiles()


def attend_and_write(
    qkv: Array,
    cos: Array,
    sin: Array,
    cache: Cache,
    positions: Array,
    runs: Array,
    window: int | None = None,
    divisor: float | None = None,
    interpret: bool = False,
    tiles: Tiles = TILES,
) -> tuple[Array, Cache]:
    """Self-attention of one token a row: [H * h, B], and the cache with its key and value at `positions` of the rows
    that run.

    qkv [(H + 2 K) h, B] is not turned yet; cos and sin [h/2, B]; positions and runs [B], of rows 0 .. B. The cache is
    one stretch of whole blocks and is used up. With `window` a token sees itself and the window - 1 before it.
    `interpret` runs the kernel's equations without a GPU: slow, for tests.
    """
    (keys,), (values,) = cache.keys, cache.values
    _, kv_heads, width, length = keys.shape
    batch = qkv.shape[1]
    qkv = rearrange(qkv, "(n h) b -> n h b", h=width)
    heads = qkv.shape[0] - 2 * kv_heads
    group = heads // kv_heads
    rows = -(-group // TENSOR_ROWS) * TENSOR_ROWS
    if group == 1:
        rows = tiles.rows if width >= 2 * TENSOR_ROWS else 1
    step = math.gcd(length, tiles.block)
    share = max(pl.cdiv(tiles.programs, batch * kv_heads), pl.cdiv(length, tiles.tokens))
    share = min(length // step, share)
    tokens = pl.cdiv(length, share * step) * step
    share = pl.cdiv(length, tokens)
    sums = jax.ShapeDtypeStruct((batch, share, heads), jnp.float32)
    scale = 1 / (divisor or math.sqrt(width))
    out, total, largest, keys, values = pl.pallas_call(
        functools.partial(_attend_kernel, heads=heads, rows=rows, tokens=tokens, step=step, window=window, scale=scale),
        grid=(batch, kv_heads, share),
        out_shape=(
            jax.ShapeDtypeStruct((batch, share, heads, width), jnp.float32),
            sums,
            sums,
            jax.ShapeDtypeStruct(keys.shape, keys.dtype),
            jax.ShapeDtypeStruct(values.shape, values.dtype),
        ),
        input_output_aliases={5: 3, 6: 4},
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=f"decode_attention_{heads}x{width}",  # as profiles show it
    )(positions, runs.astype(jnp.int32), qkv, cos, sin, keys, values)
    merged = pl.pallas_call(
        _merge_kernel,
        grid=(batch, heads),
        out_shape=jax.ShapeDtypeStruct((heads, width, batch), qkv.dtype),
        compiler_params=triton.CompilerParams(num_warps=1),
        interpret=interpret,
        name=f"merge_attention_{heads}x{width}",
    )(out, total, largest)
    return rearrange(merged, "n h b -> (n h) b"), Cache((keys,), (values,))


def _write_heads(ref: Any, at: tuple[Array, Array], first: Array, count: int, values: Array) -> None:
    """The first `count` of values [rows, ...] as heads first .. first + count of a program."""
    rows = values.shape[0]
    if count == rows:
        ref[*at, pl.ds(first, count)] = values
        return
    axes = [first + jnp.arange(rows), *(jnp.arange(size) for size in values.shape[1:])]
    places = ref.at[*at, *entries(*axes)]
    real = jax.lax.broadcast_in_dim(jnp.arange(rows) < count, values.shape, (0,))
    triton.store(places, values, mask=real)


def _merge_kernel(sums_ref: Any, total_ref: Any, largest_ref: Any, out_ref: Any) -> None:
    """One row and head: what its programs have summed, each relative to its own largest logit."""
    b, head = pl.program_id(0), pl.program_id(1)
    share = sums_ref.shape[1]
    each = [largest_ref[b, j, head] for j in range(share)]
    above = functools.reduce(jnp.maximum, each)
    scales = [jnp.exp(x - above) for x in each]
    total = functools.reduce(jnp.add, [total_ref[b, j, head] * scale for j, scale in enumerate(scales)])
    out = functools.reduce(jnp.add, [sums_ref[b, j, head] * scale for j, scale in enumerate(scales)])
    out_ref[head, :, b] = (out / total).astype(out_ref.dtype)


def _attend_kernel(
    positions_ref: Any,
    runs_ref: Any,
    qkv_ref: Any,
    cos_ref: Any,
    sin_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    out_ref: Any,
    total_ref: Any,
    largest_ref: Any,
    keys_out: Any,
    values_out: Any,
    *,
    heads: int,
    rows: int,
    tokens: int,
    step: int,
    window: int | None,
    scale: float,
) -> None:
    """One row, one kv head, tokens [j * tokens, (j + 1) * tokens) of the past; for j = 0 also the token itself.

    Heads are turned, and multiplied with keys, in two halves of h/2.
    """
    b, n, j = (pl.program_id(axis) for axis in range(3))
    kv_heads, width = keys_ref.shape[1:3]
    group, half, dtype = heads // kv_heads, width // 2, keys_ref.dtype
    position = positions_ref[b]
    cos, sin = cos_ref[:, b], sin_ref[:, b]
    one = rows == 1  # no tensor cores
    queries = n if one else n * group + jnp.minimum(jnp.arange(rows), group - 1)

    def turned(which: Any) -> tuple[Array, Array]:
        low, high = (qkv_ref[which, pl.ds(start, half), b].astype(jnp.float32) for start in (0, half))
        return (low * cos - high * sin).astype(dtype), (high * cos + low * sin).astype(dtype)

    q, k, v = turned(queries), turned(heads + n), qkv_ref[heads + kv_heads + n, :, b].astype(dtype)
    wide = [x.astype(jnp.float32).reshape(rows, half) for x in q]
    own = sum(jnp.sum(x * y.astype(jnp.float32)[None], axis=1) for x, y in zip(wide, k, strict=True)) * scale
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def product(x: Array, y: Array) -> Array:  # [rows, n] times [n, m]
        if one:
            return jnp.sum(x.astype(jnp.float32).reshape(-1, 1) * y.astype(jnp.float32), axis=0)[None]
        return jnp.dot(x, y, preferred_element_type=jnp.float32, precision=exact)

    first = j * tokens if window is None else jnp.maximum(j * tokens, position - window + 1)
    last = jnp.minimum((j + 1) * tokens, position)

    def block(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, total, largest = carry
        here = pl.ds(i * step, step)
        slots = i * step + jnp.arange(step)
        seen = (slots >= first) & (slots < last)
        parts = [product(x, keys_ref[b, n, pl.ds(at, half), here]) for x, at in zip(q, (0, half), strict=True)]
        logits = jnp.where(seen[None], (parts[0] + parts[1]) * scale, MASKED)
        above = jnp.maximum(largest, jnp.max(logits, axis=1))
        odds = jnp.where(seen[None], jnp.exp(logits - above[:, None]), 0.0)
        read = jnp.where(seen[:, None], values_ref[b, n, here, :], 0)
        fade = jnp.exp(largest - above)
        return out * fade[:, None] + product(odds.astype(dtype), read), total * fade + jnp.sum(odds, axis=1), above

    mine = j == 0
    carry = (
        jnp.where(mine, v.astype(jnp.float32)[None], jnp.zeros((rows, width), jnp.float32)),
        jnp.where(mine, jnp.ones(rows, jnp.float32), 0.0),
        jnp.where(mine, own, MASKED),
    )
    found = jax.lax.fori_loop(first // step, (last + step - 1) // step, block, carry)
    for ref, values in zip((out_ref, total_ref, largest_ref), found, strict=True):
        _write_heads(ref, (b, j), n * group, group, values)

    @pl.when(mine & (runs_ref[b] > 0))
    def _() -> None:
        for part, start in zip(k, (0, half), strict=True):
            keys_out[b, n, pl.ds(start, half), position] = part
        values_out[b, n, position, :] = v
