"""Grouped SwiGLU on a TPU: JAX's own megablox kernels, which multiply only the tiles of rows that an expert has.

How many rows an expert has is known only when a step runs, so sizes are data. A tile that two experts share is computed
once for each: with E experts at most E - 1 tiles more than rows need.

# M rows in expert order, E experts, D model width, d expert width
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from readme_jax.models.remat import kept

Array = jax.Array

TILE_ROWS = 256  # few, as tiles at borders between experts are computed twice
TILE_WIDTH = 1024  # of both other dimensions, in bfloat16, at most
LANES = 128  # tiles are as wide as whole rows of them


def tile_rows(rows: int) -> int:
    """Rows of a grouped matmul's tile."""
    return min(TILE_ROWS, -(-rows // 16) * 16)


def tile_width(size: int, dtype: Any) -> int:
    """A tile's width along one of the other dimensions, the last of which may pass its end: what passes is computed
    too, so of widths down to half of the most it is the one that passes least, of equals the widest."""
    most = TILE_WIDTH * 2 // max(jnp.dtype(dtype).itemsize, 2)
    return size if size <= most else min(range(most, most // 2 - 1, -LANES), key=lambda width: -size % width)


def grouped_swiglu(rows: Array, sizes: Array, gate: Array, up: Array, down: Array, interpret: bool = False) -> Array:
    """down(silu(gate x) * up x) of each expert's rows; rows past the last expert's come out as zero.

    rows [M, D], sizes [E] int32 (their sum is at most M), gate and up [E, d, D], down [E, D, d] -> [M, D].
    Differentiable in rows and weights. `interpret` runs the kernels anywhere, slowly.
    """
    count = rows.shape[0]
    x = jnp.pad(rows, ((0, -count % tile_rows(count)), (0, 0)))
    groups = jnp.append(sizes, x.shape[0] - sizes.sum()).astype(jnp.int32)  # the last group has no weights
    wide, linear = (kept(_multiply(x, w, groups, False, interpret)) for w in (gate, up))
    h = jax.nn.silu(wide) * linear
    return _multiply(h, down, groups, True, interpret)[:count]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _multiply(x: Array, w: Array, groups: Array, inward: bool, interpret: bool) -> Array:
    """Rows x [M, in] times their experts' w [E, out, in]: [M, out].

    The gradient of w is made with the model width as its rows (`inward`: of w that leads back to D), along which it is
    then summed and spread over a mesh: XLA spreads rows, while of columns it would sum the whole on every device.
    """
    return gmm(x, w, groups, x.dtype, _tile(x, w.shape[2], w.shape[1]), transpose_rhs=True, interpret=interpret)


def _tile(x: Array, inner: int, outer: int) -> tuple[int, int, int]:
    return tile_rows(x.shape[0]), tile_width(inner, x.dtype), tile_width(outer, x.dtype)


def _forward(x: Array, w: Array, groups: Array, inward: bool, interpret: bool) -> tuple[Array, tuple[Array, ...]]:
    return _multiply(x, w, groups, inward, interpret), (x, w, groups)


def _backward(inward: bool, interpret: bool, saved: tuple[Array, ...], dy: Array) -> tuple[Array, Array, None]:
    x, w, groups = saved
    dx = gmm(dy, w, groups, x.dtype, _tile(dy, w.shape[1], w.shape[2]), interpret=interpret)
    left, right = (dy, x) if inward else (x, dy)
    tile = _tile(x, left.shape[1], right.shape[1])
    dw = tgmm(left.T, right, groups, w.dtype, tile, num_actual_groups=w.shape[0], interpret=interpret)
    return dx, dw if inward else dw.swapaxes(1, 2), None


_multiply.defvjp(_forward, _backward)
