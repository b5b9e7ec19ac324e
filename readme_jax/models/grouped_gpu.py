"""Grouped SwiGLU on a GPU, forward and backward: kernels (Pallas, lowered through Triton) over blocks of one expert.

Segments are padded to whole blocks of rows, so a block has one expert, whose own arrays it reads: no stacked weights,
no arithmetic for experts without rows. Rows are gathered as kernels read them and scattered as they write them; only
for the gradients of weights, which sum over rows, the activations and their gradients are sorted first.

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
Join = Callable[..., tuple[Array, ...]]


class Tiles(NamedTuple):
    """A kernel's tiles: rows, output columns (of one product `side` of these side by side, so that registers hold as
    much), depth of a step; row blocks that share weights in the L2 cache; how Triton runs them."""

    rows: int = 128
    columns: int = 128
    depth: int = 64
    group: int = 8
    warps: int = 8
    stages: int = 4
    side: int = 2


class Blocks(NamedTuple):
    """Which rows each block has: its expert [n] (E: none); of each expert its first block [E] and how many rows it has
    [E]; of each row the pair n*K + k [T] and whether there is one [T]; whether sizes cover each pair [M]."""

    expert: Array
    first: Array
    sizes: Array
    pairs: Array
    real: Array
    covered: Array


class Rows(NamedTuple):
    """Rows that a kernel reads: a block's own, [T, columns], or with `pairs` those of pairs // `pairs`: 1 for an array
    of pairs, K for one of tokens."""

    array: Array
    pairs: int = 0


def tiles_for(pairs: int, dtype: Any = jnp.bfloat16) -> Tiles:
    """Fewer rows a block where padding would cost more than it gains: of a decode step's rows as few as tensor cores
    take, with deep tiles, since weights are what it reads. Small tiles for float32, without tensor cores."""
    if jnp.dtype(dtype).itemsize > 2:
        return Tiles(rows=64, columns=64, depth=32, stages=2)
    if pairs < 128:
        return Tiles(rows=16, columns=64, depth=256, warps=4, stages=3, side=1)
    return Tiles() if pairs >= 2048 else Tiles(rows=64, warps=4)


def across_tiles(tiles: Tiles) -> Tiles:
    """Of products across weights, beside kernels of `tiles`: one wide tile in place of two side by side."""
    return tiles._replace(columns=tiles.columns * tiles.side, side=1, stages=min(tiles.stages, 3))


def outer_tiles(tiles: Tiles) -> Tiles:
    """Of weights' gradients, beside kernels of `tiles`: its own rows are tiled, and no step leaves a block."""
    return tiles._replace(rows=tiles.columns, warps=8, stages=min(tiles.stages, 3), depth=min(tiles.depth, tiles.rows))


def block_rows(slots: Array, inverse: Array, sizes: Array, rows: int) -> Blocks:
    """Blocks of `rows` rows over pairs sorted by expert: slots [M], inverse [M] (where each pair went), sizes [E]."""
    pairs, experts = slots.shape[0], sizes.shape[0]
    count = pl.cdiv(pairs, rows) + experts - 1
    held = (sizes + rows - 1) // rows
    ends, stops = jnp.cumsum(held), jnp.cumsum(sizes)
    padding = (ends - held) * rows - (stops - sizes)  # rows of padding before each expert's first
    expert = jnp.sum(ends <= jnp.arange(count)[:, None], axis=1, dtype=jnp.int32)  # searchsorted loops on the device
    of = jnp.repeat(expert, rows)
    inside = jnp.minimum(of, experts - 1)
    source = jnp.arange(count * rows) - padding[inside]
    real = (of < experts) & (source < stops[inside])
    found = slots[jnp.where(real, source, 0)]
    found = jnp.where(real, found, 0).astype(jnp.int32)
    return Blocks(expert, ends - held, sizes, found, real, inverse < stops[-1])


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))  # so that layers share a trace
def grouped_swiglu(
    x: Array, slots: Array, inverse: Array, sizes: Array, experts: list[Any], tiles: Tiles, interpret: bool = False
) -> Array:
    """down(silu(gate x) * up x) of each pair by its expert: x [N, D], inverse [N, K] -> [M, D] in the order n*K + k.

    experts: E `Expert`s (gate [d, D], up [d, D], down [D, d]); sizes need not cover all pairs.
    `interpret` runs the kernels' equations without a GPU.
    """
    return _grouped(x, slots, inverse, sizes, experts, tiles, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _grouped(
    x: Array, slots: Array, inverse: Array, sizes: Array, experts: list[Any], tiles: Tiles, interpret: bool
) -> Array:
    blocks = block_rows(slots, inverse.reshape(-1), sizes, tiles.rows)
    gates, ups, downs = zip(*experts, strict=True)
    run = functools.partial(_run, blocks, tiles, interpret=interpret)
    (h,) = run([Rows(x, inverse.shape[1])], [gates, ups], _swiglu)
    return _covered(run([Rows(h)], [downs], _same, scatter=True)[0], blocks)


def _forward(
    x: Array, slots: Array, inverse: Array, sizes: Array, experts: list[Any], tiles: Tiles, interpret: bool
) -> tuple[Array, Any]:
    blocks = block_rows(slots, inverse.reshape(-1), sizes, tiles.rows)
    gates, ups, downs = zip(*experts, strict=True)
    run = functools.partial(_run, blocks, tiles, interpret=interpret)
    h, gate, up = run([Rows(x, inverse.shape[1])], [gates, ups], _swiglu_and_inputs, outputs=3)
    y = _covered(run([Rows(h)], [downs], _same, scatter=True)[0], blocks)
    return y, (x, inverse, experts, blocks, gate, up)


def _backward(tiles: Tiles, interpret: bool, saved: Any, dy: Array) -> tuple[Any, ...]:
    x, inverse, experts, blocks, gate, up = saved
    gates, ups, downs = zip(*experts, strict=True)
    run = functools.partial(_run, blocks, across_tiles(tiles), interpret=interpret, across=True)
    # Sorted once: a kernel whose inner axis is rows would look each up in its loop, where copies could not run ahead.
    x_rows, dy_rows = x[_of(blocks.pairs, inverse.shape[1])], dy[blocks.pairs]
    (dh,) = run([Rows(dy_rows)], [downs], _same)
    d_gate, d_up, h = (a.astype(x.dtype) for a in _swiglu_gradients(dh, gate, up))
    (dx,) = run([Rows(d_gate), Rows(d_up)], [gates, ups], _same, scatter=True)
    dx = _covered(dx, blocks).reshape(*inverse.shape, -1).sum(1).astype(x.dtype)
    outer = functools.partial(_outer, blocks, outer_tiles(tiles), interpret)
    # Padding adds nothing: h and the gradients are zero there.
    parts = zip(outer(d_gate, x_rows), outer(d_up, x_rows), outer(dy_rows, h), strict=True)
    return dx, None, None, None, [type(e)(*part) for e, part in zip(experts, parts, strict=True)]


_grouped.defvjp(_forward, _backward)


def _swiglu_gradients(dh: Array, gate: Array, up: Array) -> tuple[Array, Array, Array]:
    """Gradients of gate and up, and h again, in float32: XLA's one pass over them, which in the kernel of dh would keep
    its registers from the product."""
    dh, gate, up = (a.astype(jnp.float32) for a in (dh, gate, up))
    s = jax.nn.sigmoid(gate)
    return dh * up * (s * (1 + gate * (1 - s))), dh * gate * s, gate * s * up


def _covered(pairs: Array, blocks: Blocks) -> Array:
    """[M, D], which kernels have written where sizes cover it, with zeros elsewhere."""
    return jnp.where(blocks.covered[:, None], pairs, 0)


# --- what is done with sums of a tile, float32 --------------------------------------------------------------------


def _swiglu(gate: Array, up: Array) -> tuple[Array, ...]:
    return (gate * jax.nn.sigmoid(gate) * up,)


def _swiglu_and_inputs(gate: Array, up: Array) -> tuple[Array, ...]:
    return (*_swiglu(gate, up), gate, up)


def _same(x: Array) -> tuple[Array, ...]:
    return (x,)


# --- rows times the weights of their experts ----------------------------------------------------------------------


def _fitting(size: int, most: int) -> int:
    """The largest power of two that divides `size`, at most `most`."""
    return min(most, size & -size)


def _tile(size: int, most: int, parts: int = 1) -> tuple[int, int]:
    """Columns of a tile, a power of two of at most `most`, and how many tiles side by side, at most `parts`: the
    largest whose multiples over `size` columns waste an eighth at most."""
    tile = most * parts
    while 8 * pl.cdiv(size, tile) * tile > 9 * size:
        tile //= 2
    return min(tile, most), max(tile // most, 1)


class _Columns(NamedTuple):
    """Columns [first, first + tile) of arrays of `size`: those past the end are read as zeros and not written."""

    first: Any
    tile: int
    size: int
    span: int  # columns of a program's tiles side by side

    @property
    def here(self) -> Any:
        return pl.ds(self.first, self.tile)

    def mask(self, shape: tuple[int, ...], axis: int) -> Array | None:
        """Which of a tile's entries exist; None: all. A last program's second tile may lie past the end as a whole."""
        if self.size % self.span == 0:
            return None
        real = self.first + jnp.arange(self.tile) < self.size
        return jax.lax.broadcast_in_dim(real, shape, (axis,))


def _side_by_side(j: Any, tile: int, parts: int, size: int) -> list[_Columns]:
    """The column tiles of program j."""
    return [_Columns((j * parts + p) * tile, tile, size, tile * parts) for p in range(parts)]


def _of(pairs: Array, each: int) -> Array:
    """pairs // each, none of which is negative."""
    return pairs if each == 1 else jax.lax.div(pairs, jnp.full_like(pairs, each))


def _read(ref: Any, rows: Any, columns: Any, mask: Array | None) -> Array:
    """A tile: rows and columns are spans (`pl.ds`) or arrays of indices."""
    if mask is None:
        return ref[rows, columns]
    return triton.load(ref.at[entries(rows, columns)], mask=mask, other=0.0)


def _write(ref: Any, rows: Any, columns: Any, value: Array, mask: Array | None) -> None:
    if mask is None:
        ref[rows, columns] = value
    else:
        triton.store(ref.at[entries(rows, columns)], value, mask=mask)


def entries(*axes: Any) -> tuple[Array, ...]:
    """Indices of every entry of a tile, of spans (`pl.ds`) or arrays of indices: the form that masked loads and stores
    take without a GPU, too."""
    each = [a.start + jnp.arange(a.size) if isinstance(a, pl.Slice) else a for a in axes]
    shape = tuple(a.shape[0] for a in each)
    return tuple(jax.lax.broadcast_in_dim(a, shape, (axis,)) for axis, a in enumerate(each))


def _run(
    blocks: Blocks,
    tiles: Tiles,
    rows: list[Rows],
    weights: list[Sequence[Array]],
    join: Join,
    interpret: bool,
    outputs: int = 1,
    across: bool = False,
    scatter: bool = False,
) -> tuple[Array, ...]:
    """`outputs` arrays [T, columns] or, with `scatter`, of pairs, [M, columns]: `join` of the products' sums.

    Rows are multiplied with each of `weights`, which are E arrays [columns, depth] or, `across`, [depth, columns]; of
    several rows the products are summed up. In [T, columns] a block's padding is zeros; blocks of no expert are not
    written.
    """
    count, depth = blocks.expert.shape[0], rows[0].array.shape[1]
    columns = weights[0][0].shape[1 if across else 0]
    alone = len(weights) == 1 or len(rows) > 1
    tile, parts = _tile(columns, tiles.columns, tiles.side if alone else 1)
    narrow = alone and tile * parts < tiles.columns * tiles.side  # half the sums: half the warps
    warps = max(4, tiles.warps // 2) if narrow else tiles.warps
    tiles = tiles._replace(columns=tile, depth=_fitting(depth, tiles.depth), warps=warps)
    height = blocks.covered.shape[0] if scatter else blocks.pairs.shape[0]
    body = functools.partial(
        _rows_kernel,
        tiles=tiles,
        pairs=[r.pairs for r in rows],
        experts=len(weights[0]),
        products=len(weights),
        columns=columns,
        parts=parts,
        across=across,
        join=join,
        outputs=outputs,
        scatter=scatter,
    )
    return pl.pallas_call(
        body,
        grid=(count * pl.cdiv(columns, tile * parts),),
        out_shape=(jax.ShapeDtypeStruct((height, columns), rows[0].array.dtype),) * outputs,
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=f"grouped_{join.__name__.strip('_')}",
    )(
        blocks.expert,
        blocks.pairs,
        blocks.real,
        *(r.array for r in rows),
        *(w for each in weights for w in each),
    )


def _rows_kernel(
    expert_ref: Any,
    pairs_ref: Any,
    real_ref: Any,
    *refs: Any,
    tiles: Tiles,
    pairs: list[int],
    experts: int,
    products: int,
    columns: int,
    parts: int,
    across: bool,
    join: Join,
    outputs: int,
    scatter: bool,
) -> None:
    """One tile. Groups of row blocks run through all columns together, so that weights stay in the L2 cache."""
    rows_refs, weights = refs[: len(pairs)], refs[len(pairs) : len(pairs) + products * experts]
    outs = refs[-outputs:]
    i, j = _place(expert_ref.shape[0], tiles.group)
    own = pl.ds(i * tiles.rows, tiles.rows)
    here = _side_by_side(j, tiles.columns, parts, columns)
    real = real_ref[own]
    at = [own if of == 0 else _of(pairs_ref[own], of) for of in pairs]

    @pl.when(expert_ref[i] < experts)
    def _() -> None:
        zeros = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        sums = (zeros,) * (len(here) * (products if len(pairs) == 1 else 1))
        for e in range(experts):
            add = functools.partial(_sums, rows_refs, at, weights[e::experts], tiles, here, across)
            sums = jax.lax.cond(expert_ref[i] == e, add, lambda sums: sums, sums)
        each = len(sums) // parts
        for p, part in enumerate(here):
            mask = part.mask((tiles.rows, tiles.columns), 1)
            for out, value in zip(outs, join(*sums[p * each : (p + 1) * each]), strict=True):
                value = jnp.where(real[:, None], value, 0).astype(out.dtype)
                if scatter:
                    found = jax.lax.broadcast_in_dim(real, value.shape, (0,))
                    places = jnp.where(real, pairs_ref[own], out.shape[0])
                    _write(out, places, part.here, value, found if mask is None else found & mask)
                else:
                    _write(out, own, part.here, value, mask)


def _place(count: int, group: int) -> tuple[Array, Array]:
    """Row block and column tile of this program, of `count` blocks in groups."""
    program, run = pl.program_id(0), group * (pl.num_programs(0) // count)
    first, inside = program // run * group, program % run
    size = jnp.minimum(count - first, group)
    return first + inside % size, inside // size


def _sums(
    rows: Sequence[Any],
    at: list[Any],
    weights: Sequence[Any],
    tiles: Tiles,
    here: list[_Columns],
    across: bool,
    sums: tuple[Array, ...],
) -> tuple[Array, ...]:
    """`sums` and, for each part of the columns, the products of one array of rows with each of the weights, or the sum
    of those of several with one each."""
    shape = (tiles.depth, tiles.columns) if across else (tiles.columns, tiles.depth)

    def weight(ref: Any, step: Any, part: _Columns) -> Array:
        mask = part.mask(shape, 1 if across else 0)
        return _read(ref, step, part.here, mask) if across else _read(ref, part.here, step, mask).T

    def add(rows_ref: Any, at: Any, refs: Sequence[Any], k: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        step = pl.ds(k * tiles.depth, tiles.depth)
        x = rows_ref[at, step]
        products = [_dot(x, weight(ref, step, part)) for part in here for ref in refs]
        return tuple(total + product for total, product in zip(sums, products, strict=True))

    together = len(rows) == 1
    for n, ref in enumerate(rows):
        body = functools.partial(add, ref, at[n], weights if together else weights[n : n + 1])
        sums = jax.lax.fori_loop(0, ref.shape[1] // tiles.depth, body, sums)
    return sums


def _dot(x: Array, y: Array) -> Array:
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, y, precision=exact, preferred_element_type=jnp.float32)


# --- gradients of weights -----------------------------------------------------------------------------------------


def _outer(blocks: Blocks, tiles: Tiles, interpret: bool, left: Array, right: Array) -> tuple[Array, ...]:
    """left^T right over each expert's rows: [T, A] and [T, C] -> E arrays [A, C]."""
    shape, experts = (left.shape[1], right.shape[1]), blocks.sizes.shape[0]
    tall, _ = _tile(shape[0], tiles.rows)
    wide, parts = _tile(shape[1], tiles.columns, tiles.side)
    body = functools.partial(
        _outer_kernel,
        block=blocks.pairs.shape[0] // blocks.expert.shape[0],
        depth=tiles.depth,
        shape=shape,
        tile=(tall, wide),
        parts=parts,
    )
    return pl.pallas_call(
        body,
        grid=(pl.cdiv(shape[0], tall), pl.cdiv(shape[1], wide * parts), experts),
        out_shape=tuple(jax.ShapeDtypeStruct(shape, left.dtype) for _ in range(experts)),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="grouped_outer",
    )(blocks.first, blocks.sizes, left, right)


def _outer_kernel(
    first_ref: Any,
    sizes_ref: Any,
    left_ref: Any,
    right_ref: Any,
    *outs: Any,
    block: int,
    depth: int,
    shape: tuple[int, int],
    tile: tuple[int, int],
    parts: int,
) -> None:
    """One tile of one expert's gradient."""
    i, j, e = (pl.program_id(axis) for axis in range(3))
    begin = first_ref[e] * block
    down = _Columns(i * tile[0], tile[0], shape[0], tile[0])
    here = _side_by_side(j, tile[1], parts, shape[1])

    def read(ref: Any, k: Array, part: _Columns) -> Array:
        return _read(ref, pl.ds(begin + k * depth, depth), part.here, part.mask((depth, part.tile), 1))

    def add(k: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        left = read(left_ref, k, down).T
        rights = [read(right_ref, k, part) for part in here]
        return tuple(total + _dot(left, right) for total, right in zip(sums, rights, strict=True))

    zeros = (jnp.zeros(tile, jnp.float32),) * parts
    sums = jax.lax.fori_loop(0, pl.cdiv(sizes_ref[e], depth), add, zeros)
    for mine, out in enumerate(outs):

        @pl.when(e == mine)
        def _(out: Any = out) -> None:
            for part, total in zip(here, sums, strict=True):
                masks = [m for m in (down.mask(tile, 0), part.mask(tile, 1)) if m is not None]
                mask = functools.reduce(jnp.logical_and, masks) if masks else None
                _write(out, down.here, part.here, total.astype(out.dtype), mask)
