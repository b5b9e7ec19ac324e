"""Rotary embeddings, causal attention over a whole sequence, and attention over a key/value cache.

# B batch, T length, H heads, K kv heads, G query heads a kv head, h head width, S cache slots
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange

from readme_jax.config import RopeScaling
from readme_jax.models.remat import kept
from readme_jax.parallel.mesh import batch_ways, partition_spec

MASKED = -1e30  # finite: a row with nothing to attend to (padding) stays finite
BLOCK = 128  # queries a static block, more where a sequence would have over MAX_BLOCKS
MAX_BLOCKS = 16
LANES = 128  # of a TPU: its kernels take lengths that are a multiple


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Inverse frequencies [h / 2] of rotary embeddings, float32; `llama3` scaling blends by wave length."""
    freqs = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return freqs
    if scaling.kind == "linear":
        return freqs / scaling.factor
    waves = 2 * math.pi / freqs
    low = scaling.original_max_position / scaling.low_freq_factor
    high = scaling.original_max_position / scaling.high_freq_factor
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = (scaling.original_max_position / waves - scaling.low_freq_factor) / span
    blended = (1 - smooth) * freqs / scaling.factor + smooth * freqs
    return jnp.where(waves < high, freqs, jnp.where(waves > low, freqs / scaling.factor, blended))


def rotate(x: jax.Array, positions: jax.Array, freqs: jax.Array) -> jax.Array:
    """Rotary embedding of x [B, T, H, h] at positions [B, T]; pairs are (i, i + h/2), as Hugging Face stores them."""
    angles = positions[..., None].astype(jnp.float32) * freqs
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, divisor: float) -> jax.Array:
    """q [B K R h] of R = (t G) rows, k and v [B K S h], mask [1 or B, t, S] -> [B K R h].

    Rows are divided by their softmax's sum after the product with v, when they are h wide and not S.
    """
    mask = jnp.repeat(mask, q.shape[2] // mask.shape[1], axis=1)[:, None]
    scores = jnp.einsum("bkrh,bksh->bkrs", q, k, preferred_element_type=jnp.float32) / divisor
    scores = jnp.where(mask, scores, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    out = jnp.einsum("bkrs,bksh->bkrh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)


def visible(query: jax.Array, key: jax.Array, window: int | None) -> jax.Array:
    """Which key positions a query position sees: real ones, not later, and inside the sliding window."""
    mask = (key >= 0) & (key <= query)
    return mask if window is None else mask & (key > query - window)


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array | None = None,
    window: int | None = None,
    divisor: float | None = None,
    backend: Literal["blocks", "cudnn", "splash"] = "blocks",
) -> jax.Array:
    """Causal self-attention of a whole sequence.

    q [B, T, H, h], k and v [B, T, K, h] -> [B, T, H, h]. `positions` [B, T] is needed only where there is padding (-1,
    anywhere in a row), `window` is the sliding window of Mistral, `divisor` divides the logits (default sqrt(h)).
    `blocks` computes only the key blocks that a block of queries can see: on CPU 1.4 times faster than the whole
    square.
    """
    divisor = divisor or math.sqrt(q.shape[-1])
    if backend == "cudnn" and positions is None:
        sliding = None if window is None else (window - 1, 0)
        attend = partial(
            jax.nn.dot_product_attention,
            scale=1 / divisor,
            is_causal=True,
            local_window_size=sliding,
            implementation="cudnn",
        )
        return on_each_device(attend, q, k, v)
    length, kv_heads = q.shape[1], k.shape[2]
    if backend == "splash" and positions is None and length % LANES == 0:
        from readme_jax.models import attention_tpu  # Pallas, only where a TPU needs it

        return on_each_device(partial(attention_tpu.causal_attention, window=window, divisor=divisor), q, k, v)
    group, block = q.shape[2] // kv_heads, max(BLOCK, -(-length // MAX_BLOCKS))
    q = rearrange(q, "b t (k g) h -> b k (t g) h", k=kv_heads)  # one axis of rows: two would be copied into one
    k, v = (rearrange(x, "b t k h -> b k t h") for x in (k, v))
    blocks = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first = 0 if window is None or positions is not None else max(0, start - window + 1)
        if positions is None:
            mask = visible(jnp.arange(start, stop)[:, None], jnp.arange(first, stop)[None, :], window)[None]
        else:
            mask = visible(positions[:, start:stop, None], positions[:, None, first:stop], window)
        rows = q[:, :, start * group : stop * group]
        blocks.append(_attend(rows, k[:, :, first:stop], v[:, :, first:stop], mask, divisor))
    return kept(rearrange(jnp.concatenate(blocks, axis=2), "b k (t g) h -> b t (k g) h", g=group))


def on_each_device(attend: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attend` for a kernel that knows of no mesh: each device has its own rows and heads. q [B, T, H, h], k and v
    [B, T, K, h] -> [B, T, H, h]."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return attend(q, k, v)
    rows = q.shape[0]
    q, k, v = (jnp.pad(x, ((0, -rows % batch_ways(mesh)), (0, 0), (0, 0), (0, 0))) for x in (q, k, v))
    heads, kv_heads = (partition_spec("batch", None, name, None) for name in ("heads", "kv_heads"))
    local = jax.shard_map(attend, in_specs=(heads, kv_heads, kv_heads), out_specs=heads, check_vma=False)
    return local(q, k, v)[:rows]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far, one entry a layer: keys [B, K, h, S], values [B, K, S, h].

    `slots` [B, S] is the rotary position of the token in each slot, -1 where there is none (empty or padding), `index`
    (scalar) the next slot, `positions` [B] the next position of each row: rows padded on either side share slots but
    not positions.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    slots: jax.Array
    positions: jax.Array
    index: jax.Array


def empty_cache(layers: int, batch: int, kv_heads: int, head_dim: int, slots: int, dtype: jnp.dtype) -> Cache:
    """A cache of `slots` tokens a row with nothing in it."""
    keys = tuple(jnp.zeros((batch, kv_heads, head_dim, slots), dtype) for _ in range(layers))
    values = tuple(jnp.zeros((batch, kv_heads, slots, head_dim), dtype) for _ in range(layers))
    return Cache(
        keys, values, jnp.full((batch, slots), -1, jnp.int32), jnp.zeros(batch, jnp.int32), jnp.zeros((), jnp.int32)
    )


def token_positions(valid: jax.Array, start: jax.Array) -> jax.Array:
    """Rotary positions [B, T]: real tokens count up from `start` [B]; padding has -1 and takes no position."""
    counted = start[:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    return jnp.where(valid, counted, -1)


def place_tokens(
    tokens: jax.Array, valid: jax.Array | None, cache: Cache | None
) -> tuple[jax.Array, jax.Array | None, Cache | None]:
    """Rotary positions [B, T] of new tokens, their positions with -1 at padding, and the cache with slots marked.

    The second is None for whole sequences without padding, whose causal mask is static.
    """
    if cache is None and valid is None:
        return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), None, None
    valid = jnp.ones(tokens.shape, bool) if valid is None else valid
    start = jnp.zeros(tokens.shape[0], jnp.int32) if cache is None else cache.positions
    positions = token_positions(valid, start)
    return jnp.maximum(positions, 0), positions, None if cache is None else mark(cache, positions)


def mark(cache: Cache, positions: jax.Array) -> Cache:
    """The cache with the slots of T more tokens marked with their positions [B, T]."""
    return replace(cache, slots=jax.lax.dynamic_update_slice(cache.slots, positions, (0, cache.index)))


def advance(cache: Cache, positions: jax.Array, keys: tuple[jax.Array, ...], values: tuple[jax.Array, ...]) -> Cache:
    """The marked cache once every layer has written the tokens at `positions` [B, T]."""
    following = jnp.maximum(cache.positions, positions.max(axis=1) + 1)
    return Cache(keys, values, cache.slots, following, cache.index + positions.shape[1])


def cached_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    slots: jax.Array,
    window: int | None = None,
    divisor: float | None = None,
) -> jax.Array:
    """Attention of T new tokens q [B, T, H, h] at `positions` [B, T] over keys [B, K, h, S] and values [B, K, S, h].

    `slots` [B, S], the positions of the cached tokens, includes the new ones; a token sees those at or before it.
    """
    divisor = divisor or math.sqrt(q.shape[-1])
    q = rearrange(q, "b t (k g) h -> b k g t h", k=keys.shape[1])
    mask = visible(positions[:, :, None], slots[:, None, :], window)[:, None, None]
    scores = jnp.einsum("bkgth,bkhs->bkgts", q, keys, preferred_element_type=jnp.float32) / divisor
    weights = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1).astype(values.dtype)
    return rearrange(jnp.einsum("bkgts,bksh->bkgth", weights, values), "b k g t h -> b t (k g) h")


def write_cache(cache: Cache, layer: int, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of a layer with new k, v [B, T, K, h] written at the cache's index."""
    keys = jax.lax.dynamic_update_slice(
        cache.keys[layer], rearrange(k, "b t k h -> b k h t").astype(cache.keys[layer].dtype), (0, 0, 0, cache.index)
    )
    values = jax.lax.dynamic_update_slice(
        cache.values[layer],
        rearrange(v, "b t k h -> b k t h").astype(cache.values[layer].dtype),
        (0, 0, cache.index, 0),
    )
    return keys, values
