"""Grouped SwiGLU on a GPU, forward and backward: kernels (Pallas, lowered through Triton) over blocks of one expert.

Segments are padded to whole blocks of rows, so a block has one expert, whose own arrays it reads: no stacked weights,
no arithmetic for experts without rows. The forward pass gathers rows as it reads them.

# N tokens, K experts a token, M = N*K pairs, E experts, D model width, d expert width, b rows a block, n blocks,
# T = n*b rows with padding
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

Array = jax.Array


class Tiles(NamedTuple):
    """A kernel's tiles: rows, output columns, depth of a step; row blocks that share weights in the L2 cache."""

    rows: int = 128
    columns: int = 128
    depth: int = 64
    group: int = 8


class Blocks(NamedTuple):
    """Which rows each block has: its expert [n] (E: none); of each row the pair n*K + k [T] and whether there is one
    [T]; the row of each pair [M], and whether sizes cover it [M]."""

    expert: Array
    pairs: Array
    real: Array
    place: Array
    covered: Array

    def of_pairs(self, rows: Array) -> Array:
        """Rows [T, D] in the order of pairs, [M, D]; zeros where sizes do not cover them."""
        return jnp.where(self.covered[:, None], jnp.take(rows, self.place, axis=0, mode="clip"), 0)


class Term(NamedTuple):
    """A product that a kernel sums up: rows [T, depth] times each expert's weights, [columns, depth] or, `across`,
    [depth, columns]."""

    rows: Array
    weights: Sequence[Array]
    across: bool = False


def tiles_for(pairs: int) -> Tiles:
    """Fewer rows a block where padding would cost more than it gains."""
    return Tiles() if pairs >= 2048 else Tiles(rows=64)


def block_rows(slots: Array, inverse: Array, sizes: Array, rows: int) -> Blocks:
    """Blocks of `rows` rows over pairs sorted by expert: slots [M], inverse [M] (where each pair went), sizes [E]."""
    pairs, experts = slots.shape[0], sizes.shape[0]
    count = pl.cdiv(pairs, rows) + experts - 1
    held = (sizes + rows - 1) // rows
    ends, stops = jnp.cumsum(held), jnp.cumsum(sizes)
    padding = (ends - held) * rows - (stops - sizes)  # rows of padding before each expert's first
    expert = jnp.searchsorted(ends, jnp.arange(count), side="right").astype(jnp.int32)
    of = jnp.repeat(expert, rows)
    inside = jnp.minimum(of, experts - 1)
    source = jnp.arange(count * rows) - padding[inside]
    real = (of < experts) & (source < stops[inside])
    owner = jnp.minimum(jnp.searchsorted(stops, inverse, side="right"), experts - 1)
    found = slots[jnp.where(real, source, 0)]
    return Blocks(
        expert, jnp.where(real, found, 0).astype(jnp.int32), real, inverse + padding[owner], inverse < stops[-1]
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def grouped_swiglu(
    x: Array, slots: Array, inverse: Array, sizes: Array, experts: list[Any], tiles: Tiles, interpret: bool = False
) -> Array:
    """down(silu(gate x) * up x) of each pair by its expert: x [N, D], inverse [N, K] -> [M, D] in the order n*K + k.

    experts: E `Expert`s (gate [d, D], up [d, D], down [D, d]); sizes need not cover all pairs.
    `interpret` runs the kernels' equations without a GPU.
    """
    blocks = block_rows(slots, inverse.reshape(-1), sizes, tiles.rows)
    gates, ups, downs = zip(*experts, strict=True)
    (h,) = _run(blocks, tiles, [Term(x, gates), Term(x, ups)], _swiglu, (), inverse.shape[1], interpret=interpret)
    (y,) = _run(blocks, _wide(tiles), [Term(h, downs)], _same, (), interpret=interpret)
    return blocks.of_pairs(y)


def _forward(
    x: Array, slots: Array, inverse: Array, sizes: Array, experts: list[Any], tiles: Tiles, interpret: bool
) -> tuple[Array, Any]:
    blocks = block_rows(slots, inverse.reshape(-1), sizes, tiles.rows)
    gates, ups, downs = zip(*experts, strict=True)
    terms = [Term(x, gates), Term(x, ups)]
    h, gate, up = _run(blocks, tiles, terms, _swiglu_and_inputs, (), inverse.shape[1], outputs=3, interpret=interpret)
    (y,) = _run(blocks, _wide(tiles), [Term(h, downs)], _same, (), interpret=interpret)
    return blocks.of_pairs(y), (x, inverse, experts, blocks, gate, up)


def _backward(tiles: Tiles, interpret: bool, saved: Any, dy: Array) -> tuple[Any, ...]:
    x, inverse, experts, blocks, gate, up = saved
    gates, ups, downs = zip(*experts, strict=True)
    top_k = inverse.shape[1]
    rows = x[blocks.pairs // top_k]
    dy = jnp.where(blocks.real[:, None], dy[blocks.pairs], 0)  # padding adds nothing to any sum
    terms = [Term(dy, downs, across=True)]
    d_gate, d_up, h = _run(blocks, tiles, terms, _swiglu_backward, (gate, up), outputs=3, interpret=interpret)
    terms = [Term(d_gate, gates, across=True), Term(d_up, ups, across=True)]
    (dx,) = _run(blocks, tiles, terms, _sum, (), interpret=interpret)
    dx = blocks.of_pairs(dx).reshape(*inverse.shape, -1).sum(1).astype(x.dtype)
    sums = functools.partial(_outer, blocks, tiles, interpret=interpret, like=experts)
    parts = zip(sums(d_gate, rows), sums(d_up, rows), sums(dy, h), strict=True)
    return dx, None, None, None, [type(e)(*part) for e, part in zip(experts, parts, strict=True)]


grouped_swiglu.defvjp(_forward, _backward)


# --- what is done with sums of a tile, float32 --------------------------------------------------------------------


def _swiglu(gate: Array, up: Array) -> tuple[Array, ...]:
    return (gate * jax.nn.sigmoid(gate) * up,)


def _swiglu_and_inputs(gate: Array, up: Array) -> tuple[Array, ...]:
    return (*_swiglu(gate, up), gate, up)


def _swiglu_backward(dh: Array, gate: Array, up: Array) -> tuple[Array, ...]:
    s = jax.nn.sigmoid(gate)
    return dh * up * (s * (1 + gate * (1 - s))), dh * gate * s, gate * s * up


def _same(x: Array) -> tuple[Array, ...]:
    return (x,)


def _sum(x: Array, y: Array) -> tuple[Array, ...]:
    return (x + y,)


# --- rows times the weights of their experts ----------------------------------------------------------------------


def _wide(tiles: Tiles) -> Tiles:
    """Of a kernel with one sum: twice the columns."""
    return tiles._replace(columns=2 * tiles.columns)


def _fitting(size: int, most: int) -> int:
    """The largest power of two that divides `size`, at most `most`."""
    return min(most, size & -size)


def _run(
    blocks: Blocks,
    tiles: Tiles,
    terms: list[Term],
    join: Callable[..., tuple[Array, ...]],
    beside: Sequence[Array],
    top_k: int = 0,
    outputs: int = 1,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """`outputs` arrays [T, columns]: `join` of the terms' products and of `beside` [T, columns]. With `top_k` the
    terms' rows are tokens', [N, depth], gathered as they are read."""
    count, depth = blocks.expert.shape[0], terms[0].rows.shape[1]
    columns = terms[0].weights[0].shape[1 if terms[0].across else 0]
    tiles = tiles._replace(columns=_fitting(columns, tiles.columns), depth=_fitting(depth, tiles.depth))
    shape = jax.ShapeDtypeStruct((count * tiles.rows, columns), terms[0].rows.dtype)
    weights = [w for term in terms for w in term.weights]
    rows: list[Array] = []  # those of each term, once where terms share them: a kernel reads them once too
    for term in terms:
        if not any(term.rows is r for r in rows):
            rows.append(term.rows)
    body = functools.partial(
        _rows_kernel, tiles=tiles, depth=depth, across=terms[0].across, join=join, outputs=outputs, top_k=top_k
    )
    return pl.pallas_call(
        functools.partial(body, terms=len(terms), shared=len(rows) < len(terms), experts=len(terms[0].weights)),
        grid=(count * (columns // tiles.columns),),
        out_shape=(shape,) * outputs,
        compiler_params=triton.CompilerParams(num_warps=8 if tiles.rows > 64 else 4, num_stages=3),
        interpret=interpret,
        name=f"grouped_{join.__name__.strip('_')}",
    )(blocks.expert, blocks.pairs, *rows, *weights, *beside)


def _rows_kernel(
    expert_ref: Any,
    pairs_ref: Any,
    *refs: Any,
    tiles: Tiles,
    depth: int,
    across: bool,
    join: Callable[..., tuple[Array, ...]],
    outputs: int,
    top_k: int,
    terms: int,
    shared: bool,
    experts: int,
) -> None:
    """One tile. Groups of row blocks run through all columns together, so that weights stay in the L2 cache."""
    sources = 1 if shared else terms
    rows_refs, weights = refs[:sources], refs[sources : sources + terms * experts]
    beside, outs = refs[sources + terms * experts : -outputs], refs[-outputs:]
    count = expert_ref.shape[0]
    run = tiles.group * (pl.num_programs(0) // count)
    program = pl.program_id(0)
    group, inside = program // run, program % run
    size = jnp.minimum(count - group * tiles.group, tiles.group)
    i, j = group * tiles.group + inside % size, inside // size
    here = (pl.ds(i * tiles.rows, tiles.rows), pl.ds(j * tiles.columns, tiles.columns))
    rows = pairs_ref[here[0]] // top_k if top_k else here[0]

    def tile(e: int) -> None:
        def step(k: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            part = pl.ds(k * tiles.depth, tiles.depth)
            xs = [ref[rows, part] for ref in rows_refs]
            products = []
            for term in range(terms):
                w = weights[term * experts + e]
                x = xs[0 if shared else term]
                products.append(_dot(x, w[part, here[1]]) if across else _dot(x, w[here[1], part].T))
            return tuple(total + product for total, product in zip(sums, products, strict=True))

        zeros = (jnp.zeros((tiles.rows, tiles.columns), jnp.float32),) * terms
        sums = jax.lax.fori_loop(0, depth // tiles.depth, step, zeros)
        for out, value in zip(outs, join(*sums, *(ref[here].astype(jnp.float32) for ref in beside)), strict=True):
            out[here] = value.astype(out.dtype)

    for e in range(experts):
        pl.when(expert_ref[i] == e)(functools.partial(tile, e))


def _dot(x: Array, y: Array) -> Array:
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, y, precision=exact, preferred_element_type=jnp.float32)


# --- gradients of weights -----------------------------------------------------------------------------------------


def _outer(
    blocks: Blocks, tiles: Tiles, left: Array, right: Array, interpret: bool, like: Sequence[Any]
) -> tuple[Array, ...]:
    """left^T right over each expert's rows: [T, A] and [T, C] -> E arrays [A, C]."""
    experts, shape = len(like), (left.shape[1], right.shape[1])
    tall, wide = _fitting(shape[0], 128), _fitting(shape[1], tiles.columns)
    first = jnp.searchsorted(blocks.expert, jnp.arange(experts + 1)).astype(jnp.int32)
    return pl.pallas_call(
        functools.partial(_outer_kernel, rows=tiles.rows, tall=tall, wide=wide),
        grid=(shape[0] // tall, shape[1] // wide, experts),
        out_shape=tuple(jax.ShapeDtypeStruct(shape, left.dtype) for _ in range(experts)),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name="grouped_outer",
    )(first, left, right)


def _outer_kernel(first_ref: Any, left_ref: Any, right_ref: Any, *outs: Any, rows: int, tall: int, wide: int) -> None:
    """One tile of one expert's gradient."""
    i, j, e = (pl.program_id(axis) for axis in range(3))
    here, step = (pl.ds(i * tall, tall), pl.ds(j * wide, wide)), 64

    def add(k: Array, total: Array) -> Array:
        part = pl.ds(k * step, step)
        return total + _dot(left_ref[part, here[0]].T, right_ref[part, here[1]])

    steps = rows // step
    zeros = jnp.zeros((tall, wide), jnp.float32)
    total = jax.lax.fori_loop(first_ref[e] * steps, first_ref[e + 1] * steps, add, zeros)
    for mine, out in enumerate(outs):

        @pl.when(e == mine)
        def _(out: Any = out) -> None:
            out[here] = total.astype(out.dtype)
