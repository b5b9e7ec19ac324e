"""Mixture feed-forward over expert segments: token layout, and the back ends that multiply them.

A pre-gated route is the same in every layer, so `plan_routes` sorts the tokens by expert once a batch; every layer then
gathers its rows into expert order, runs each expert's segment of rows as dense matmuls, and gathers the results back.

    # N tokens, K experts a token, M = N*K rows in expert order ("slots"), E experts, D model width, d expert width

Back ends, by name:
  blocks   (CPU) a segment is a run of static row blocks over the expert's own arrays. A block may spill past the end
           of its segment: the rows it spoils belong to experts that run after it and are written again.
  ragged   (TPU) `jax.lax.ragged_dot` over stacked weights.
  masked   every expert over every row, the others' rows weighted with zero. The plain definition; slow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from readme_jax.errors import ConfigError

Backend = Literal["blocks", "ragged", "masked"]
Array = jax.Array

_BLOCK = 256  # rows of a full block
_REST = (16, 32, 48, 64, 96, 128, 160, 192, 224, 256)  # rows of the one block that takes what full blocks leave


class Expert(NamedTuple):
    """One expert's weights, stored [out, in]: gate [d, D], up [d, D], down [D, d]."""

    gate: Array
    up: Array
    down: Array


class RoutePlan(NamedTuple):
    """Where every (token, choice) pair goes when rows are sorted by expert. A pytree of arrays.

    slots [M] int32: the pair n*K + k that each sorted row holds (stable: equal experts keep token order);
    inverse [N, K] int32: the sorted row of each pair; sizes [E] int32: rows of each expert;
    weights [N, K] or None: factor of each choice, None where all are one.
    """

    slots: Array
    inverse: Array
    sizes: Array
    weights: Array | None

    @property
    def order(self) -> Array:
        """[M] int32: the token whose row each sorted row is."""
        return self.slots // self.inverse.shape[1]


def plan_routes(experts: Array, num_experts: int, weights: Array | None = None) -> RoutePlan:
    """Sort a batch's (token, choice) pairs by expert: done once, used by every layer.

    experts [N, K] int32 in [0, num_experts); padding tokens may carry any expert. weights [N, K] or None.
    """
    if experts.ndim != 2:
        raise ConfigError(f"routes of shape {experts.shape}: expected [tokens, top_k]")
    flat = experts.reshape(-1)
    slots = jnp.argsort(flat, stable=True).astype(jnp.int32)
    inverse = jnp.argsort(slots).astype(jnp.int32).reshape(experts.shape)
    sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return RoutePlan(slots, inverse, sizes, weights)


def grouped_ffn(x: Array, plan: RoutePlan, experts: Sequence[Any], backend: Backend = "blocks") -> Array:
    """y_n = sum_k w_nk * down(silu(gate x_n) * up x_n) of the expert each of token n's K choices names.

    x [N, D]; experts: E triples (gate [d, D], up [d, D], down [D, d]). Returns [N, D]. Differentiable in x, weights
    and experts. Inside `jax.shard_map` x, plan are the device's own rows.
    """
    experts = [Expert(*e) for e in experts]
    if len(experts) != plan.sizes.shape[0]:
        raise ConfigError(f"{len(experts)} experts for a plan of {plan.sizes.shape[0]}: they must be as many")
    if backend not in ("blocks", "ragged", "masked"):
        raise ConfigError(f"back end {backend!r}: expected blocks, ragged or masked")
    if x.shape[0] == 0:
        return x
    if len(experts) == 1:
        y = _ffn(x, experts[0])
        return y if plan.weights is None else y * plan.weights.sum(1, keepdims=True).astype(y.dtype)
    if backend == "masked":
        return _masked(x, plan, experts)
    rows = _dispatch(x, plan.slots, plan.inverse)
    rows = _ragged(rows, plan.sizes, experts) if backend == "ragged" else _blocks(rows, plan.sizes, experts)
    pairs = rearrange(_collect(rows, plan.slots, plan.inverse), "(n k) d -> n k d", k=plan.inverse.shape[1])
    if plan.weights is not None:
        pairs = pairs * plan.weights[..., None].astype(pairs.dtype)
    return pairs.sum(1)


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())))


def _ffn(x: Array, w: Expert) -> Array:
    """SwiGLU of rows x [R, D] -> [R, D]."""
    return _dot(jax.nn.silu(_dot(x, w.gate, (1, 1))) * _dot(x, w.up, (1, 1)), w.down, (1, 1))


# --- permutations: a gather forward and a gather backward, never a scatter ----------------------------------------


@jax.custom_vjp
def _dispatch(x: Array, slots: Array, inverse: Array) -> Array:
    """Rows in expert order: [N, D] -> [M, D]."""
    return jnp.take(x, slots // inverse.shape[1], axis=0, mode="clip")


def _dispatch_bwd(inverse: Array, dy: Array) -> tuple[Array, None, None]:
    return jnp.take(dy, inverse, axis=0, mode="clip").sum(1), None, None


_dispatch.defvjp(lambda x, slots, inverse: (_dispatch(x, slots, inverse), inverse), _dispatch_bwd)


@jax.custom_vjp
def _collect(rows: Array, slots: Array, inverse: Array) -> Array:
    """Rows back in the order of (token, choice) pairs: [M, D] -> [M, D]."""
    return jnp.take(rows, inverse.reshape(-1), axis=0, mode="clip")


def _collect_bwd(slots: Array, dy: Array) -> tuple[Array, None, None]:
    return jnp.take(dy, slots, axis=0, mode="clip"), None, None


_collect.defvjp(lambda rows, slots, inverse: (_collect(rows, slots, inverse), slots), _collect_bwd)


# --- masked and ragged --------------------------------------------------------------------------------------------


def _masked(x: Array, plan: RoutePlan, experts: list[Expert]) -> Array:
    chosen = jnp.searchsorted(jnp.cumsum(plan.sizes), plan.inverse, side="right")  # [N, K]
    weights = jnp.ones(chosen.shape, x.dtype) if plan.weights is None else plan.weights.astype(x.dtype)
    out = jnp.zeros_like(x)
    for e, w in enumerate(experts):
        out = out + jnp.where(chosen == e, weights, 0).sum(1, keepdims=True) * _ffn(x, w)
    return out


def _ragged(rows: Array, sizes: Array, experts: list[Expert]) -> Array:
    gate, up, down = (jnp.stack(parts).swapaxes(1, 2) for parts in zip(*experts, strict=True))
    h = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    return jax.lax.ragged_dot(h, down, sizes)


# --- blocks -------------------------------------------------------------------------------------------------------


def _rest_sizes(rows: int) -> list[int]:
    """Static sizes of the odd block for a batch of `rows` rows: up to one full block, or the batch rounded up."""
    top = next((r for r in _REST if r >= rows), _BLOCK)
    return [r for r in _REST if r <= top]


def _segment(size: Array, start: Array, rest: list[int], first: Callable[..., Any], full: Callable[..., Any], init: Any):
    """Cover rows start .. start+size: one block of the smallest fitting size of `rest`, then full blocks.

    first(rows, row0, carry) and full(row0, carry) return the new carry. The odd block comes first, so that what it
    spills into its own segment is written again.
    """
    blocks = jnp.maximum(size - 1, 0) // rest[-1]
    left = size - blocks * rest[-1]
    which = jnp.sum(left > jnp.asarray([0, *rest[:-1]]), dtype=jnp.int32)
    carry = jax.lax.switch(which, [lambda c: c] + [functools.partial(first, r, left) for r in rest], init)
    return jax.lax.fori_loop(0, blocks, lambda i, c: full(start + left + i * rest[-1], c), carry)


def _pad(rows: Array, extra: int) -> Array:
    return jnp.concatenate([rows, jnp.broadcast_to(rows[-1:], (extra, rows.shape[1]))])


def _varying_like(value: Any, like: Array) -> Any:
    """Inside shard_map: mark what is equal on all devices as varying, as the rows are; elsewhere nothing."""
    axes = jax.typeof(like).manual_axis_type.varying

    def cast(a: Array) -> Array:
        missing = tuple(sorted(axes - jax.typeof(a).manual_axis_type.varying))
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(cast, value)


def _blocks(rows: Array, sizes: Array, experts: list[Expert]) -> Array:
    return _blocks_vjp(rows, _varying_like(sizes, rows), _varying_like(experts, rows))


@jax.custom_vjp
def _blocks_vjp(rows: Array, sizes: Array, experts: list[Expert]) -> Array:
    return _blocks_fwd(rows, sizes, experts)[0]


def _blocks_fwd(rows: Array, sizes: Array, experts: list[Expert]):
    rest = _rest_sizes(rows.shape[0])
    padded, d = _pad(rows, rest[-1]), experts[0].gate.shape[0]
    carry = (jnp.zeros_like(padded), _varying_like(jnp.zeros((2, padded.shape[0], d), rows.dtype), rows))
    starts = jnp.cumsum(sizes) - sizes

    def block(w: Expert, r: int, row0: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        out, pre = carry
        x = jax.lax.dynamic_slice_in_dim(padded, row0, r)
        g, u = _dot(x, w.gate, (1, 1)), _dot(x, w.up, (1, 1))
        y = _dot(jax.nn.silu(g) * u, w.down, (1, 1))
        out = jax.lax.dynamic_update_slice_in_dim(out, y, row0, 0)
        pre = jax.lax.dynamic_update_slice(pre, jnp.stack([g, u]), (0, row0, 0))
        return out, pre

    for e, w in enumerate(experts):
        run = functools.partial(block, w)
        carry = _segment(sizes[e], starts[e], rest, lambda r, left, c, e=e, run=run: run(r, starts[e], c),
                         functools.partial(run, rest[-1]), carry)
    out, pre = carry
    return out[: rows.shape[0]], (rows, sizes, experts, pre)


def _blocks_bwd(saved: Any, dout: Array):
    rows, sizes, experts, pre = saved
    rest = _rest_sizes(rows.shape[0])
    padded, dpadded = _pad(rows, rest[-1]), _pad(dout, rest[-1])
    starts = jnp.cumsum(sizes) - sizes
    dx, grads = jnp.zeros_like(padded), []

    def block(w: Expert, r: int, valid: Array | int, row0: Array, dx: Array) -> tuple[Array, Expert]:
        x = jax.lax.dynamic_slice_in_dim(padded, row0, r)
        dy = jax.lax.dynamic_slice_in_dim(dpadded, row0, r)
        dy = jnp.where(jnp.arange(r)[:, None] < valid, dy, 0)
        g, u = jax.lax.dynamic_slice(pre, (0, row0, 0), (2, r, pre.shape[2]))
        s = jax.nn.sigmoid(g)
        dh = _dot(dy, w.down, (1, 0))
        du = dh * g * s
        dg = dh * u * (s * (1 + g * (1 - s)))
        dx = jax.lax.dynamic_update_slice_in_dim(dx, _dot(dg, w.gate, (1, 0)) + _dot(du, w.up, (1, 0)), row0, 0)
        return dx, Expert(_dot(dg, x, (0, 0)), _dot(du, x, (0, 0)), _dot(dy, g * s * u, (0, 0)))

    for e, w in enumerate(experts):
        def first(r, left, carry, e=e, w=w):
            return block(w, r, left, starts[e], carry[0])

        def full(row0, carry, w=w):
            dx, dw = block(w, rest[-1], rest[-1], row0, carry[0])
            return dx, jax.tree.map(jnp.add, carry[1], dw)

        dx, dw = _segment(sizes[e], starts[e], rest, first, full, (dx, jax.tree.map(jnp.zeros_like, w)))
        grads.append(dw)
    return dx[: rows.shape[0]], None, grads


_blocks_vjp.defvjp(_blocks_fwd, _blocks_bwd)
