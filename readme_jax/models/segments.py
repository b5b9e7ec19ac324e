"""Mixture feed-forward over expert segments: token layout, and the back ends that multiply them.

A pre-gated route is the same in every layer, so `plan_routes` sorts the tokens by expert once a batch; every layer then
gathers its rows into expert order, runs each expert's segment of rows as dense matmuls, and gathers the results back.

    # N tokens, K experts a token, M = N*K rows in expert order ("slots"), E experts, D model width, d expert width

Back ends, by name:
  blocks   (CPU) a segment is a run of static row blocks over the expert's own arrays. A block may spill past the end
           of its segment: the rows it spoils belong to experts that run after it and are written again.
  kernel   (GPU) kernels over blocks of rows and each expert's own arrays (models/grouped_gpu.py).
  gmm      (TPU) megablox kernels over stacked weights (models/grouped_tpu.py).
  ragged   `jax.lax.ragged_dot` over stacked weights; its default lowering computes every expert.
  masked   every expert over every row, the others' rows weighted with zero. The plain definition; slow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from einops import rearrange

from readme_jax.errors import ConfigError

Backend = Literal["blocks", "kernel", "gmm", "ragged", "masked"]
Array = jax.Array

# Rows of a static block: one branch each for the odd block of a segment, repeats of the last for the rest. On CPU a
# SwiGLU block costs about 19 rows of arithmetic whatever its size (its weights are read and packed) and one of 16 rows
# as much as one of 32. Every size is compiled for every expert and layer, the backward pass's at twice the price.
_FORWARD_ROWS = (32, 48, 64, 80, 96, 112, 128, 148, 160, 176, 200, 224, 256)
_BACKWARD_ROWS = (32, 64, 96, 128, 160, 208, 256)


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


def grouped_ffn(
    x: Array, plan: RoutePlan, experts: Sequence[Any], backend: Backend = "blocks", some: bool = False
) -> Array:
    """y_n = sum_k w_nk * down(silu(gate x_n) * up x_n) of the expert each of token n's K choices names.

    x [N, D]; experts: E triples (gate [d, D], up [d, D], down [D, d]), or one `Expert` of them stacked. Returns [N, D].
    Differentiable in x, weights and experts. Inside `jax.shard_map` x and plan are the device's own rows. All of one
    dtype. With `some`, sizes need not cover all rows: the rest belong to experts elsewhere and add nothing here.
    Raises ConfigError where experts and plan do not fit or the back end is unknown.
    """
    stacked = experts if isinstance(experts, Expert) else None
    experts = unstack(stacked) if stacked else [Expert(*e) for e in experts]
    if len(experts) != plan.sizes.shape[0]:
        raise ConfigError(f"{len(experts)} experts for a plan of {plan.sizes.shape[0]}: they must be as many")
    if backend not in get_args(Backend):
        raise ConfigError(f"back end {backend!r}: expected one of {', '.join(get_args(Backend))}")
    if x.shape[0] == 0:
        return x
    if len(experts) == 1 and not some:
        y = _ffn(x, experts[0])
        return y if plan.weights is None else y * plan.weights.sum(1, keepdims=True).astype(y.dtype)
    slots = plan.slots
    if backend == "masked":
        return _masked(x, plan, experts)
    if backend == "kernel":
        return _weighted(kernel_pairs(x, slots, plan.inverse, plan.sizes, experts), plan)
    if backend == "blocks":
        top = min(slots.shape[0], _FORWARD_ROWS[-1])
        slots = jnp.pad(slots, (0, top), mode="edge")  # the last segment's blocks spill too
        rows = _blocks(_dispatch(x, slots, plan.inverse), plan.sizes, experts, top)
    else:
        rows = _covered(_dispatch(x, slots, plan.inverse), plan, some)
        stacked = stacked or Expert(*(jnp.stack(w) for w in zip(*experts, strict=True)))
        rows = (_gmm if backend == "gmm" else _ragged)(rows, plan.sizes, stacked)
    rows = _covered(rows, plan, some)
    return _weighted(_collect(rows, slots, plan.inverse), plan)


def _weighted(pairs: Array, plan: RoutePlan) -> Array:
    """The weighted sum of each token's pairs, [M, D] -> [N, D]."""
    pairs = rearrange(pairs, "(n k) d -> n k d", k=plan.inverse.shape[1])
    if plan.weights is not None:
        pairs = pairs * plan.weights[..., None].astype(pairs.dtype)
    return pairs.sum(1)


def kernel_pairs(x: Array, slots: Array, inverse: Array, sizes: Array, experts: list[Expert]) -> Array:
    """What each pair's expert makes of its row, x [N, D] -> [M, D] in the order n*K + k, by the GPU's kernels; zeros
    for pairs that `sizes` do not cover. Arguments as in `RoutePlan`."""
    from readme_jax.models.grouped_gpu import grouped_swiglu, tiles_for  # its kernels are needed on a GPU alone

    tiles, interpret = tiles_for(slots.shape[0], x.dtype), jax.default_backend() == "cpu"
    return grouped_swiglu(x, slots, inverse, sizes, experts, tiles, interpret)


def _covered(rows: Array, plan: RoutePlan, some: bool) -> Array:
    """Rows [S, D] with zeros past those that the plan's sizes cover, where that is not all."""
    return jnp.where((jnp.arange(rows.shape[0]) < plan.sizes.sum())[:, None], rows, 0) if some else rows


def unstack(experts: Expert) -> list[Expert]:
    """Experts stacked along a leading axis as a list."""
    return [Expert(*(w[e] for w in experts)) for e in range(experts.gate.shape[0])]


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())))


def _ffn(x: Array, w: Expert) -> Array:
    """SwiGLU of rows x [R, D] -> [R, D]."""
    return _dot(jax.nn.silu(_dot(x, w.gate, (1, 1))) * _dot(x, w.up, (1, 1)), w.down, (1, 1))


# --- permutations: a gather forward and a gather backward, never a scatter ----------------------------------------


@jax.custom_vjp
def _dispatch(x: Array, slots: Array, inverse: Array) -> Array:
    """Rows in expert order: [N, D] -> [S, D]; S is M, or more where slots repeats its last entry."""
    return jnp.take(x, slots // inverse.shape[1], axis=0, mode="clip")


def _dispatch_bwd(inverse: Array, dy: Array) -> tuple[Array, None, None]:
    return jnp.take(dy, inverse, axis=0, mode="clip").sum(1), None, None


_dispatch.defvjp(lambda x, slots, inverse: (_dispatch(x, slots, inverse), inverse), _dispatch_bwd)


@jax.custom_vjp
def _collect(rows: Array, slots: Array, inverse: Array) -> Array:
    """Rows back in the order of (token, choice) pairs: [S, D] -> [M, D]. What is past the first M rows is not read."""
    return jnp.take(rows, inverse.reshape(-1), axis=0, mode="clip")


def _collect_bwd(slots: Array, dy: Array) -> tuple[Array, None, None]:
    return jnp.take(dy, slots, axis=0, mode="clip"), None, None


_collect.defvjp(lambda rows, slots, inverse: (_collect(rows, slots, inverse), slots), _collect_bwd)


# --- masked and ragged --------------------------------------------------------------------------------------------


def _masked(x: Array, plan: RoutePlan, experts: list[Expert]) -> Array:
    chosen = jnp.sum(jnp.cumsum(plan.sizes) <= plan.inverse[..., None], axis=-1)  # [N, K]; searchsorted is a loop
    weights = jnp.ones(chosen.shape, x.dtype) if plan.weights is None else plan.weights.astype(x.dtype)
    out = jnp.zeros_like(x)
    for e, w in enumerate(experts):
        out = out + jnp.where(chosen == e, weights, 0).sum(1, keepdims=True) * _ffn(x, w)
    return out


def _ragged(rows: Array, sizes: Array, experts: Expert) -> Array:
    gate, up, down = (w.swapaxes(1, 2) for w in experts)
    h = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    return jax.lax.ragged_dot(h, down, sizes)


def _gmm(rows: Array, sizes: Array, experts: Expert) -> Array:
    from readme_jax.models.grouped_tpu import grouped_swiglu  # its kernels are needed on a TPU alone

    return grouped_swiglu(rows, sizes, *experts)


# --- blocks -------------------------------------------------------------------------------------------------------


class _Span(NamedTuple):
    """How blocks cover one expert's segment: an odd block at `start`, then `full` blocks of the largest size.

    All int32 scalars: start row, rows of the odd block (1 to the largest size; 0 when there are no rows), its branch
    (0 nothing, c + 1 the c-th size), number of full blocks.
    """

    start: Array
    odd: Array
    branch: Array
    full: Array


def _up_to(top: int, rows: tuple[int, ...]) -> tuple[int, ...]:
    """Static block sizes, ascending, of which the full block has `top` rows."""
    return (*(r for r in rows if r < top), top)


def _spans(sizes: Array, blocks: tuple[int, ...]) -> list[_Span]:
    start = jnp.cumsum(sizes) - sizes
    full = jnp.maximum(sizes - 1, 0) // blocks[-1]
    odd = sizes - full * blocks[-1]
    branch = jnp.sum(odd[:, None] > jnp.asarray([0, *blocks[:-1]]), axis=1, dtype=jnp.int32)
    # Scalars, taken here: with an index into the table inside, no two experts' kernels would be the same to XLA,
    # which compiles equal ones once for all experts and layers.
    return [_Span(*(v[e] for v in (start, odd, branch, full))) for e in range(sizes.shape[0])]


def _slice(a: Array, row0: Array, rows: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(a, row0, rows, a.ndim - 2, allow_negative_indices=False)


def _put(buffers: list[Array], blocks: list[Array], row0: Array) -> list[Array]:
    def one(a: Array, b: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(a, b, row0, a.ndim - 2, allow_negative_indices=False)

    return [one(a, b) for a, b in zip(buffers, blocks, strict=True)]


def _run_segment(
    span: _Span,
    blocks: tuple[int, ...],
    compute: Callable[[int, Array, Array | int], tuple[list[Array], Any]],
    buffers: list[Array],
    zeros: Any,
) -> tuple[list[Array], Any]:
    """Run one expert's segment: write what `compute` returns for a block into buffers, add up the rest.

    compute(rows, row0, valid) returns arrays [..., rows, n] for rows row0 .. row0+rows, of which `valid` belong to the
    segment, and a tree of sums over the valid ones. buffers [..., S, n]; zeros: the tree of sums of no rows.
    The branches return blocks of the largest size, not updated buffers: XLA copies a buffer that is passed through a
    conditional. The odd block comes first: its spill is written over by the blocks and segments that follow.
    """
    top = blocks[-1]

    def nothing() -> tuple[list[Array], Any]:
        shapes = [(*a.shape[:-2], top, a.shape[-1]) for a in buffers]
        return [_varying_like(jnp.zeros(s, a.dtype), a) for s, a in zip(shapes, buffers, strict=True)], zeros

    def odd(rows: int) -> tuple[list[Array], Any]:
        new, sums = compute(rows, span.start, span.odd)
        return [jnp.pad(b, [(0, 0)] * (b.ndim - 2) + [(0, top - rows), (0, 0)]) for b in new], sums

    def full(i: Array, carry: tuple[list[Array], Any]) -> tuple[list[Array], Any]:
        row0 = span.start + span.odd + i * top
        new, sums = compute(top, row0, top)
        return _put(carry[0], new, row0), jax.tree.map(jnp.add, carry[1], sums)

    new, sums = jax.lax.switch(span.branch, [nothing, *(functools.partial(odd, r) for r in blocks)])
    return jax.lax.fori_loop(0, span.full, full, (_put(buffers, new, span.start), sums))


def _varying_like(tree: Any, like: Array) -> Any:
    """Inside shard_map: mark arrays that are equal on all devices as varying where `like` does; elsewhere nothing."""
    axes = jax.typeof(like).manual_axis_type.varying

    def cast(a: Array) -> Array:
        missing = tuple(sorted(axes - jax.typeof(a).manual_axis_type.varying))
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(cast, tree)


@functools.partial(jax.jit, static_argnames="top")  # so traced and lowered once, not once a layer
def _blocks(rows: Array, sizes: Array, experts: list[Expert], top: int) -> Array:
    """rows [M + top, D] in expert order -> the same shape; what is past the first M rows is arbitrary."""
    return _blocks_vjp(top, rows, _varying_like(sizes, rows), _varying_like(experts, rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks_vjp(top: int, rows: Array, sizes: Array, experts: list[Expert]) -> Array:
    return _blocks_forward(top, rows, sizes, experts, save=False)[0]


def _blocks_forward(top: int, rows: Array, sizes: Array, experts: list[Expert], save: bool) -> list[Array]:
    """[y [S, D]], and with save also the pre-activations of gate and up, [2, S, d]."""
    blocks = _up_to(top, _FORWARD_ROWS)
    buffers = [jnp.zeros_like(rows)]
    if save:
        buffers.append(jnp.zeros((2, rows.shape[0], experts[0].gate.shape[0]), rows.dtype))
    buffers = _varying_like(buffers, rows)

    def compute(w: Expert, r: int, row0: Array, valid: Array | int) -> tuple[list[Array], Any]:
        x = _slice(rows, row0, r)
        g, u = _dot(x, w.gate, (1, 1)), _dot(x, w.up, (1, 1))
        y = _dot(jax.nn.silu(g) * u, w.down, (1, 1))
        return ([y, jnp.stack([g, u])] if save else [y]), ()

    for span, w in zip(_spans(sizes, blocks), experts, strict=True):
        buffers, _ = _run_segment(span, blocks, functools.partial(compute, w), buffers, ())
    return buffers


def _blocks_fwd(top: int, rows: Array, sizes: Array, experts: list[Expert]) -> tuple[Array, tuple[Any, ...]]:
    y, pre = _blocks_forward(top, rows, sizes, experts, save=True)
    return y, (rows, sizes, experts, pre)


def _blocks_bwd(top: int, saved: tuple[Any, ...], dy: Array) -> tuple[Array, None, list[Expert]]:
    rows, sizes, experts, pre = saved
    blocks = _up_to(top, _BACKWARD_ROWS)
    buffers, grads = _varying_like([jnp.zeros_like(rows)], rows), []

    def compute(w: Expert, r: int, row0: Array, valid: Array | int) -> tuple[list[Array], Expert]:
        x, (g, u) = _slice(rows, row0, r), _slice(pre, row0, r)
        dy_ = jnp.where(jnp.arange(r)[:, None] < valid, _slice(dy, row0, r), 0)  # spilled rows add nothing to sums
        s = jax.nn.sigmoid(g)
        dh = _dot(dy_, w.down, (1, 0))
        dg, du = dh * u * (s * (1 + g * (1 - s))), dh * g * s
        dx = _dot(dg, w.gate, (1, 0)) + _dot(du, w.up, (1, 0))
        return [dx], Expert(_dot(dg, x, (0, 0)), _dot(du, x, (0, 0)), _dot(dy_, g * s * u, (0, 0)))

    for span, w in zip(_spans(sizes, blocks), experts, strict=True):
        zeros = _varying_like(jax.tree.map(jnp.zeros_like, w), rows)
        buffers, dw = _run_segment(span, blocks, functools.partial(compute, w), buffers, zeros)
        grads.append(dw)
    return buffers[0], None, grads


_blocks_vjp.defvjp(_blocks_fwd, _blocks_bwd)
