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

COLUMNS = 4  # most that tensor cores are slower for
Array = jax.Array


class Tiles(NamedTuple):
    """How a product is cut: rows a program (of two products each half of them), inputs a step, warps."""

    rows: int = 4
    step: int = 1024
    warps: int = 4


TILES = Tiles()


def matvec(w: Array, y: Array, interpret: bool = False, tiles: Tiles = TILES) -> Array:
    """w [N, D] @ y [D, B] -> [N, B], summed in float32. `interpret` runs the kernel's equations without a GPU."""
    return _run([w], y, interpret, tiles)


def gated(gate: Array, up: Array, y: Array, interpret: bool = False, tiles: Tiles = TILES) -> Array:
    """silu(gate @ y) * (up @ y): gate and up [N, D], y [D, B] -> [N, B]."""
    return _run([gate, up], y, interpret, tiles)


def _run(weights: Sequence[Array], y: Array, interpret: bool, tiles: Tiles) -> Array:
    size = weights[0].shape[0]
    rows = min(max(tiles.rows // len(weights), 1), size & -size)
    return pl.pallas_call(
        functools.partial(_kernel, rows=rows, step=tiles.step),
        grid=(size // rows,),
        out_shape=jax.ShapeDtypeStruct((size, y.shape[1]), y.dtype),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=1),
        interpret=interpret,
        name="matvec" if len(weights) == 1 else "gated_matvec",
    )(*weights, y)


def _kernel(*refs: Any, rows: int, step: int) -> None:
    """Some rows of the outputs, all columns."""
    *weights, y_ref, out_ref = refs
    inputs, columns = y_ref.shape
    step = min(step, pl.next_power_of_2(inputs))
    here = pl.program_id(0) * rows + jnp.arange(rows)
    sums = [[jnp.zeros((rows, step), jnp.float32)] * columns for _ in weights]
    for start in range(0, inputs, step):
        at = start + jnp.arange(step)
        mask = None if start + step <= inputs else at < inputs
        for w, own in zip(weights, sums, strict=True):
            tile = _tile(w, here, at, mask).astype(jnp.float32)
            for b in range(columns):
                own[b] += tile * _tile(y_ref, at, jnp.full((1,), b), mask, 0).astype(jnp.float32).reshape(1, step)
    for b in range(columns):
        first, *second = (jnp.sum(own[b], axis=1) for own in sums)
        out = first * jax.nn.sigmoid(first) * second[0] if second else first
        out_ref[pl.ds(pl.program_id(0) * rows, rows), b] = out.astype(out_ref.dtype)


def _tile(ref: Any, rows: Array, columns: Array, mask: Array | None, axis: int = 1) -> Array:
    """[rows, columns] of a reference; `mask` says which along `axis` exist, the others are zeros."""
    shape = (rows.shape[0], columns.shape[0])
    at = tuple(jax.lax.broadcast_in_dim(x, shape, (i,)) for i, x in enumerate((rows, columns)))
    if mask is None:
        return triton.load(ref.at[at])
    return triton.load(ref.at[at], mask=jax.lax.broadcast_in_dim(mask, shape, (axis,)), other=0.0)
