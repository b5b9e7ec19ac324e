"""A prefill chunk's attention on a GPU (Pallas, lowered through Triton): one fused kernel over the row's cache.

The chunk's keys and values are in the cache already. A program takes a block of queries of one kv head through the keys
that they can see, a block at a time, with a running softmax: no mask, no logits and no part of the result are stored.

# R rows of the cache, C tokens of a chunk, H heads, K kv heads, G = H / K, h head width, S tokens a row
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from readme_jax.models.attention import MASKED, visible
from readme_jax.serving.state import Cache

Array = jax.Array


class Tiles(NamedTuple):
    """Queries and keys of a block, and how Triton runs it."""

    queries: int = 128
    keys: int = 128
    warps: int = 8
    stages: int = 3


TILES = Tiles()
FLOAT32_TILES = Tiles(queries=64, keys=32, stages=2)  # what fits into shared memory


@functools.partial(jax.jit, static_argnames=("window", "divisor", "tiles", "interpret"))  # so that layers share a trace
def attend_chunk(
    q: Array,
    cache: Cache,
    row: Array,
    start: Array,
    window: int | None = None,
    divisor: float | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Array:
    """Causal attention of a chunk's tokens to those of their row, themselves included.

    q [C, H, h], turned already, of tokens `start` .. `start + C` of `row` -> [C, H * h]. The cache, of one stretch,
    holds them already; those past the row's end attend to what is there. With `window` a token sees itself and the
    window - 1 before it. C * G and S are multiples of 16 at least. `interpret` runs the kernel's equations without a
    GPU.
    """
    (keys,), (values,) = cache.keys, cache.values
    count, heads, width = q.shape
    kv_heads, length = keys.shape[1], keys.shape[3]
    group = heads // kv_heads
    if tiles is None:
        tiles = TILES if q.dtype.itemsize <= 2 else FLOAT32_TILES
    rows, step = _fitting(count * group, tiles.queries), _fitting(length, tiles.keys)
    scale = math.log2(math.e) / (divisor or math.sqrt(width))
    body = functools.partial(_kernel, group=group, rows=rows, step=step, window=window, scale=scale)
    out = pl.pallas_call(
        body,
        grid=(count * group // rows, kv_heads),
        out_shape=jax.ShapeDtypeStruct((count * heads, width), q.dtype),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="prompt_attention",
    )(jnp.stack([row, start]), q.reshape(count * heads, width), keys, values)
    return out.reshape(count, heads * width)


def _fitting(size: int, most: int) -> int:
    """The largest power of two that divides `size`, at most `most`."""
    return min(most, size & -size)


def _kernel(
    place_ref: Any,
    q_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    out_ref: Any,
    *,
    group: int,
    rows: int,
    step: int,
    window: int | None,
    scale: float,
) -> None:
    """`rows` queries of one kv head, those of a token side by side. Exponents are of two, and `scale` is theirs."""
    block, n = pl.num_programs(0) - 1 - pl.program_id(0), pl.program_id(1)  # those that see most keys come first
    row, start = place_ref[0], place_ref[1]
    _, kv_heads, width, length = keys_ref.shape
    index = block * rows + jnp.arange(rows)
    token = index // group
    here = token * (kv_heads * group) + n * group + index % group
    q, positions = q_ref[here, :], start + token
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32, precision=exact)

    def attend(masked: bool, j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, total, largest = carry
        part = pl.ds(j * step, step)
        logits = dot(q, keys_ref[row, n, :, part].astype(q.dtype)) * scale
        if masked:
            slots = j * step + jnp.arange(step)
            logits = jnp.where(visible(positions[:, None], slots[None], window), logits, MASKED)
        above = jnp.maximum(largest, jnp.max(logits, axis=1))
        odds, fade = jnp.exp2(logits - above[:, None]), jnp.exp2(largest - above)
        out = out * fade[:, None] + dot(odds.astype(q.dtype), values_ref[row, n, part, :].astype(q.dtype))
        return out, total * fade + jnp.sum(odds, axis=1), above

    first, last = (start + (block * rows + offset) // group for offset in (0, rows - 1))
    stop = jnp.minimum(last // step + 1, length // step)
    carry = (jnp.zeros((rows, width), jnp.float32), jnp.zeros(rows, jnp.float32), jnp.full(rows, MASKED, jnp.float32))
    if window is None:  # up to `edge` no key is hidden
        edge = jnp.minimum((first + 1) // step, stop)
        carry = jax.lax.fori_loop(jnp.zeros_like(edge), edge, functools.partial(attend, False), carry)
    else:
        edge = jnp.maximum(first - window + 1, 0) // step
    out, total, _ = jax.lax.fori_loop(edge, stop, functools.partial(attend, True), carry)
    out_ref[here, :] = (out / total[:, None]).astype(out_ref.dtype)
