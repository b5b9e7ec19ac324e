"""What lives on the device between calls: caches, and each row's last token with its position and experts.

A row's keys and values are its own up to `position`; what lies behind is arbitrary and is written before it is read.
Along a row's tokens a cache is cut into stretches, arrays of their own: attention reads the first ones whole, up to the
one that holds the longest row, because XLA copies what it slices.

# R rows, B rows of a call, K kv heads, Q queries a kv head, h head width, S tokens a row, s of a stretch, L layers,
# Kx experts a token, T tokens of a routed prompt, C of a chunk
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from readme_jax.config import ModelConfig, RouterConfig
from readme_jax.serving.attend import Part, attend, combine

COPIED = 128  # tokens copied at a time from row to row


class Cache(NamedTuple):
    """A layer's keys, [R, K, h, s] a stretch, and values, [R, K, s, h] a stretch."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First token of each stretch and the one after its last."""
        ends = list(accumulate(k.shape[3] for k in self.keys))
        return list(zip([0, *ends[:-1]], ends, strict=True))

    @property
    def length(self) -> int:
        """S."""
        return self.bounds[-1][1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Caches of L layers and of the router; per row the last token [R], not yet run, its position [R], and its experts
    and their weights [R, Kx]."""

    layers: tuple[Cache, ...]
    router: Cache | None
    token: jax.Array
    position: jax.Array
    experts: jax.Array
    weights: jax.Array


def empty_state(
    config: ModelConfig, router: RouterConfig | None, top_k: int, rows: int, ends: Sequence[int], dtype: Any
) -> State:
    """A state of `rows` empty rows, their tokens cut at `ends`, of which the last is S."""
    sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def cache(heads: int, width: int, dtype: Any) -> Cache:
        return Cache(
            tuple(jnp.zeros((rows, heads, width, s), dtype) for s in sizes),
            tuple(jnp.zeros((rows, heads, s, width), dtype) for s in sizes),
        )

    layers = tuple(cache(config.num_kv_heads, config.head_dim, dtype) for _ in range(config.num_layers))
    routed = cache(router.num_heads, router.head_dim, jnp.float32) if router else None
    token, position = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.int32)
    experts, weights = jnp.zeros((rows, top_k), jnp.int32), jnp.ones((rows, top_k), jnp.float32)
    return State(layers, routed, token, position, experts, weights)


def attend_cached(
    q: jax.Array,
    cache: Cache,
    pick: Callable[[jax.Array], jax.Array],
    seen: Callable[[jax.Array], jax.Array],
    length: jax.Array,
    divisor: float | None = None,
) -> Part:
    """Attention of q [B, K, Q, h] over the stretches that hold the first `length` tokens: a branch for each number.

    `pick` takes the call's B rows of an array [R, ...]; `seen` says of token positions [s] which are seen: a mask that
    broadcasts to [B, K, Q, s].
    """

    def first(count: int) -> Part:
        parts = [
            attend(q, pick(cache.keys[i]), pick(cache.values[i]), seen(jnp.arange(*cache.bounds[i])), divisor)
            for i in range(count)
        ]
        return combine(parts)

    count = len(cache.keys)
    if count == 1:
        return first(1)
    index = sum((length > end).astype(jnp.int32) for _, end in cache.bounds[:-1])
    return jax.lax.switch(index, [lambda n=n: first(n) for n in range(1, count + 1)])


def write_tokens(
    caches: Sequence[Cache],
    new: Sequence[tuple[jax.Array, jax.Array]],
    rows: jax.Array,
    positions: jax.Array,
    runs: jax.Array,
) -> tuple[Cache, ...]:
    """One token's keys and values [B, K, h] of each cache written at `positions` [B] of `rows` [B] where it `runs`.

    A loop over the rows writes all caches in place, a loop a stretch.
    """
    zero = jnp.zeros((), jnp.int32)

    def stretch(index: int, start: int, end: int) -> Any:
        here = runs & (positions >= start) & (positions < end)
        order = jnp.argsort(~here, stable=True)

        def write(i: jax.Array, arrays: Any) -> Any:
            at = order[i]
            row, slot = rows[at], positions[at] - start
            out = []
            for (keys, values), (k, v) in zip(arrays, new, strict=True):
                k, v = (jax.lax.dynamic_slice_in_dim(x, at, 1, axis=0) for x in (k, v))
                keys = jax.lax.dynamic_update_slice(keys, k[..., None], (row, zero, zero, slot))
                out.append((keys, jax.lax.dynamic_update_slice(values, v[:, :, None], (row, zero, slot, zero))))
            return out

        return jax.lax.fori_loop(0, jnp.sum(here), write, [(c.keys[index], c.values[index]) for c in caches])

    done = [stretch(i, *bounds) for i, bounds in enumerate(caches[0].bounds)]
    return tuple(Cache(*(tuple(x) for x in zip(*stretches, strict=True))) for stretches in zip(*done, strict=True))


def write_chunk(
    cache: Cache, keys: jax.Array, values: jax.Array, row: jax.Array, start: jax.Array, count: jax.Array
) -> Cache:
    """The first `count` of keys [1, K, h, C] and values [1, K, C, h] written from token `start` of a row on."""

    def put(array: jax.Array, new: jax.Array, axis: int, begin: int) -> jax.Array:
        size = min(new.shape[axis], array.shape[axis])
        first = jnp.clip(start - begin, 0, array.shape[axis] - size)
        token = first + begin - start + jnp.arange(size)  # of the chunk, which each slot takes
        at = [row, jnp.zeros_like(row), jnp.zeros_like(row), jnp.zeros_like(row)]
        at[axis] = first
        shape = list(new.shape)
        shape[axis] = size
        real = (token >= 0) & (token < count)
        taken = jnp.take(new, token, axis=axis, mode="clip")
        old = jax.lax.dynamic_slice(array, at, shape)
        mask = real if axis == 3 else real[:, None]
        return jax.lax.dynamic_update_slice(array, jnp.where(mask, taken, old), at)

    begins = [begin for begin, _ in cache.bounds]
    return Cache(
        tuple(put(a, keys, 3, b) for a, b in zip(cache.keys, begins, strict=True)),
        tuple(put(a, values, 2, b) for a, b in zip(cache.values, begins, strict=True)),
    )


def insert_routed(router: Cache, row: jax.Array, keys: jax.Array, values: jax.Array) -> Cache:
    """The router's keys [1, Hr, hr, T] and values [1, Hr, T, hr] of a prompt's first T tokens in a row."""
    count = jnp.full_like(row, keys.shape[3])
    return write_chunk(router, keys, values, row, jnp.zeros_like(row), count)


def copy_rows(state: State, source: jax.Array, target: jax.Array, length: jax.Array) -> State:
    """The first `length` tokens of row `source` in row `target` too (one more of the router's, which is a token
    ahead), with its last token, whose position becomes `length` where it was further on."""
    caches = [*state.layers, *([] if state.router is None else [state.router])]

    def stretch(index: int, begin: int, end: int) -> Any:
        step = min(COPIED, end - begin)

        def along(x: jax.Array, axis: int, first: jax.Array) -> jax.Array:
            start = [jnp.zeros_like(first)] * 4
            start[axis] = first
            sizes = [1, *x.shape[1:]]
            sizes[axis] = step
            block = jax.lax.dynamic_slice(x, [source, *start[1:]], sizes)
            return jax.lax.dynamic_update_slice(x, block, [target, *start[1:]])

        def block(i: jax.Array, arrays: Any) -> Any:
            first = jnp.minimum(i * step, end - begin - step)
            return [(along(k, 3, first), along(v, 2, first)) for k, v in arrays]

        blocks = (jnp.clip(length + 1 - begin, 0, end - begin) + step - 1) // step
        return jax.lax.fori_loop(0, blocks, block, [(c.keys[index], c.values[index]) for c in caches])

    done = [stretch(i, *bounds) for i, bounds in enumerate(caches[0].bounds)]
    copied = [Cache(*(tuple(x) for x in zip(*stretches, strict=True))) for stretches in zip(*done, strict=True)]
    position = jnp.minimum(length, state.position[source])
    return State(
        tuple(copied[: len(state.layers)]),
        None if state.router is None else copied[-1],
        state.token.at[target].set(state.token[source]),
        state.position.at[target].set(position),
        state.experts.at[target].set(state.experts[source]),
        state.weights.at[target].set(state.weights[source]),
    )
