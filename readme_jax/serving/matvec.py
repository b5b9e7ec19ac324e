"""Weights times a decode step's few columns on a GPU (Pallas, lowered through Triton).

Such a product is its weights read once. Each program has some rows of the weights and reads them whole, without tensor
cores; gate and up are read side by side, so that SwiGLU is no kernel of its own.

# B columns, D inputs, N outputs
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from readme_jax.models.grouped_gpu import entries

COLUMNS = 4  # most that are multiplied so; tensor cores take more
Array = jax.Array


class Tiles(NamedTuple):
    """How a product is cut: rows a program (of two products each half of them), inputs a step, warps."""

    rows: int = 2
    step: int = 2048
    warps: int = 1


TILES = Tiles()


class Normed(NamedTuple):
    """x [D, B] and the scale [D] of its RMSNorm over D, which is taken as it is read."""

    x: Array
    scale: Array
    eps: float


def matvec(
    w: Array, y: Array | Normed, add: Array | None = None, interpret: bool = False, tiles: Tiles = TILES
) -> Array:
    """w [N, D] @ y [D, B], to which `add` [N, B] is added, in float32 -> [N, B].

    `interpret` runs the kernel's equations without a GPU.
    """
    return _run([w], y, add, interpret, tiles)


def gated(gate: Array, up: Array, y: Array | Normed, interpret: bool = False, tiles: Tiles = TILES) -> Array:
    """silu(gate @ y) * (up @ y): gate and up [N, D], y [D, B] -> [N, B]."""
    return _run([gate, up], y, None, interpret, tiles)


def _run(weights: Sequence[Array], y: Array | Normed, add: Array | None, interpret: bool, tiles: Tiles) -> Array:
    size = weights[0].shape[0]
    rows = min(max(tiles.rows // len(weights), 1), size & -size)
    columns, scale, eps = y if isinstance(y, Normed) else (y, None, 0.0)
    more = [x for x in (scale, add) if x is not None]
    return pl.pallas_call(
        functools.partial(
            _kernel,
            rows=rows,
            step=tiles.step,
            products=len(weights),
            normed=scale is not None,
            added=add is not None,
            eps=eps,
        ),
        grid=(size // rows,),
        out_shape=jax.ShapeDtypeStruct((size, columns.shape[1]), columns.dtype),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=1),
        interpret=interpret,
        name=f"{'matvec' if len(weights) == 1 else 'gated_matvec'}_{size}x{columns.shape[0]}",  # as profiles show it
    )(*weights, columns, *more)


def _kernel(*refs: Any, rows: int, step: int, products: int, normed: bool, added: bool, eps: float) -> None:
    """Some rows of the outputs, all columns. The norm's own factor is a column's, and so multiplies sums."""
    weights, y_ref, out_ref = refs[:products], refs[products], refs[-1]
    inputs, columns = y_ref.shape
    step = min(step, pl.next_power_of_2(inputs))
    first = pl.program_id(0) * rows
    here = first + jnp.arange(rows)
    sums = [[jnp.zeros((rows, step), jnp.float32)] * columns for _ in weights]
    squares = [jnp.zeros((1, step), jnp.float32)] * columns
    for start in range(0, inputs, step):
        at = start + jnp.arange(step)
        mask = None if start + step <= inputs else at < inputs
        tiles = [_tile(w, here, at, mask).astype(jnp.float32) for w in weights]
        scale = _vector(refs[products + 1], at, mask) if normed else None
        for b in range(columns):
            y = _vector(y_ref, at, mask, b)
            if scale is not None:
                squares[b] += y * y
                y *= scale
            for own, tile in zip(sums, tiles, strict=True):
                own[b] += tile * y
    for b in range(columns):
        shrink = jax.lax.rsqrt(jnp.sum(squares[b], axis=1) / inputs + eps) if normed else 1.0
        one, *two = (jnp.sum(own[b], axis=1) * shrink for own in sums)
        out = one * jax.nn.sigmoid(one) * two[0] if two else one
        mine = pl.ds(first, rows)
        if added:
            out += refs[-2][mine, b].astype(jnp.float32)
        out_ref[mine, b] = out.astype(out_ref.dtype)


def _tile(ref: Any, rows: Array, columns: Array, mask: Array | None) -> Array:
    """[rows, columns] of weights, zeros where `mask` says that a column does not exist."""
    at = ref.at[entries(rows, columns)]
    if mask is None:
        return triton.load(at)
    real = jax.lax.broadcast_in_dim(mask, (rows.shape[0], columns.shape[0]), (1,))
    return triton.load(at, mask=real, other=0.0)


def _vector(ref: Any, at: Array, mask: Array | None, column: int | None = None) -> Array:
    """[1, n] float32 entries of a vector, or of a matrix' column."""
    place = (at,) if column is None else (at, jnp.full_like(at, column))
    found = triton.load(ref.at[place]) if mask is None else triton.load(ref.at[place], mask=mask, other=0.0)
    return found.astype(jnp.float32).reshape(1, -1)
