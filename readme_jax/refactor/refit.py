"""Refit of W_down: what the kept channels must write so that the layer's output stays closest to the dense one's.

Not in the paper, and the biggest lever on quality there is. Ridge regression on second moments of the activations,
one F x F matrix a layer and domain, one layer at a time; feed-forward activations are never kept.

# B batch, T length, D model width, E experts, F dense FFN width, N tokens of a domain
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax.config import ModelConfig
from readme_jax.models.experts import gather_rows
from readme_jax.models.feed_forward import activations, feed_forward, linear
from readme_jax.models.llama import attend, prepare, rms_norm
from readme_jax.models.runtime import Runtime
from readme_jax.refactor.calibrate import cast
from readme_jax.refactor.select import Moments, ridged

Params = Mapping[str, Any]
GRAM_BLOCKS = 4  # a side: 10 of 16 blocks are computed
EXACT = jax.lax.Precision.HIGHEST  # moments and solves in full float32 on every platform


def no_moments(config: ModelConfig) -> Moments:
    """Moments of no tokens."""
    f, d = config.ffn_dim, config.embed_dim
    return Moments(jnp.zeros(f), jnp.zeros((f, f)), jnp.zeros((d, f)))


def gram(a: jax.Array) -> jax.Array:
    """a^T a [F, F] of a [N, F]: blocks on and below the diagonal, then mirrored."""
    size = a.shape[1]
    step = -(-size // GRAM_BLOCKS)
    rows = []
    for start in range(0, size, step):
        stop = min(start + step, size)
        row = jnp.einsum("nf,ng->fg", a[:, start:stop], a[:, :stop], precision=EXACT)
        rows.append(jnp.pad(row, ((0, 0), (0, size - stop))))
    lower, block = jnp.concatenate(rows), jnp.arange(size) // step
    return jnp.where(block[:, None] >= block[None, :], lower, lower.T)


@partial(jax.jit, static_argnames=("config", "runtime", "sequential"), donate_argnums=(0, 2, 3))
def observe(
    moments: Moments,
    p: Params,
    dense: jax.Array,
    sliced: jax.Array | None,
    config: ModelConfig,
    runtime: Runtime,
    sequential: bool,
) -> tuple[Moments, jax.Array, jax.Array | None]:
    """Run one dense layer over a batch of residual streams and add up its moments.

    dense [B, T, D] is the dense model's residual stream before the layer, sliced that of the model cut so far (None
    when not sequential). Returns the moments, the dense stream after the layer, and the sliced stream after attention
    alone: its feed-forward part follows once the layer is cut (`advance`).

    One shot: a and the wanted output t = FFN(x) are the dense model's. Sequential: a is the sliced stream's, and t =
    dense FFN output + (dense stream - sliced stream): it also makes up for the drift of the residual so far.
    """
    p = cast(p, runtime)
    ctx = prepare(config, jnp.zeros(dense.shape[:2], jnp.int32))
    u, _ = attend(p, config, runtime, dense, ctx)
    a = activations(p["ffn"], rms_norm(u, p["ffn_norm"], config.norm_eps))
    wanted = linear(a, p["ffn"]["down"])
    after = u + wanted
    if sequential:
        assert sliced is not None
        sliced, _ = attend(p, config, runtime, sliced, ctx)
        a = activations(p["ffn"], rms_norm(sliced, p["ffn_norm"], config.norm_eps))
        wanted = after - sliced
    a, wanted = (z.reshape(-1, z.shape[-1]).astype(jnp.float32) for z in (a, wanted))
    cross = moments.cross
    if sequential:  # in one shot the output wanted is W_down a: W_down times the Gram matrix, once (`one_shot`)
        cross = cross + jnp.einsum("nd,nf->df", wanted, a, precision=EXACT)
    moments = Moments(moments.absolute + jnp.abs(a).sum(0), moments.gram + gram(a), cross)
    return moments, after, sliced


@jax.jit
def one_shot(moments: Moments, down: jax.Array) -> Moments:
    """Moments whose wanted output is what the dense W_down [D, F] writes."""
    return moments._replace(cross=jnp.matmul(down, moments.gram, precision=EXACT))


@partial(jax.jit, static_argnames=("config", "runtime"), donate_argnums=(3,))
def advance(
    p: Params, kept: jax.Array, down: jax.Array, sliced: jax.Array, config: ModelConfig, runtime: Runtime
) -> jax.Array:
    """The sliced stream [B, T, D] after attention, plus what the channels `kept` [d] write through W_down [D, F]."""
    part = cast(gather_rows({**p["ffn"], "down": down}, kept), runtime)
    y = rms_norm(sliced, p["ffn_norm"].astype(runtime.dtype), config.norm_eps)
    return sliced + feed_forward(part, y)


@jax.jit
def refit_down(moments: Moments, rows: jax.Array, ridge: float) -> jax.Array:
    """W_down [D, F] of least squared error on the channels `rows` [n], zero elsewhere; rows of F are padding.

    Solves W_S (C_SS + lambda I) = B_S, so experts of one width share one compiled shape.
    """
    size = moments.gram.shape[0]
    with jax.default_matmul_precision("highest"):
        gram = ridged(moments.gram, ridge)
        kept = gram.at[rows[:, None], rows[None, :]].get(mode="fill", fill_value=0)
        kept += jnp.diag(jnp.where(rows < size, 0.0, 1.0))
        wanted = moments.cross.at[:, rows].get(mode="fill", fill_value=0)
        down = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(kept), wanted.T).T
    return jnp.zeros_like(moments.cross).at[:, rows].set(down, mode="drop")


def padded_rows(mask: np.ndarray, size: int) -> jax.Array:
    """Channels of a mask [F], ascending, padded to `size` with F."""
    found = np.flatnonzero(mask)
    return jnp.asarray(np.concatenate([found, np.full(size - len(found), len(mask))]), jnp.int32)


@jax.jit
def _eliminate(moments: Moments, own: jax.Array, shared: jax.Array, ridge: float) -> tuple[jax.Array, jax.Array]:
    """An expert's share of the normal equations for the permanent part, its own channels eliminated (Schur)."""
    with jax.default_matmul_precision("highest"):
        gram = ridged(moments.gram, ridge)
        keep, both = own.astype(gram.dtype), shared.astype(gram.dtype)
        system = gram * keep[:, None] * keep[None, :] + jnp.diag(jnp.where(own, 0.0, jnp.mean(jnp.diagonal(gram))))
        across = gram * keep[:, None] * both[None, :]  # C_iP
        solved = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(system), across)
        left = gram * both[:, None] * both[None, :] - across.T @ solved
        right = moments.cross * both - (moments.cross * keep) @ solved
        return left, right


@jax.jit
def _solve_shared(left: jax.Array, right: jax.Array, shared: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        left = left + jnp.diag(jnp.where(shared, 0.0, 1.0))
        return jnp.linalg.solve(left, right.T).T * shared


def _solve_own(moments: Moments, rows: jax.Array, shared_down: jax.Array, ridge: float) -> jax.Array:
    return refit_down(_less_prior(moments, shared_down), rows, ridge)


@jax.jit
def _less_prior(moments: Moments, prior: jax.Array) -> Moments:
    """Moments whose wanted output is what `prior` [D, F] leaves to be written."""
    return moments._replace(cross=moments.cross - jnp.matmul(prior, moments.gram, precision=EXACT))


def refit_jointly(
    moments: list[Moments], masks: np.ndarray, shared: np.ndarray, down: jax.Array, ridge: float
) -> tuple[Any, list[Any]]:
    """W_down of a permanent part shared by E experts, and of each expert's own channels, jointly of least error.

    masks [E, F] are all kept channels, shared [F] the permanent ones. The ridge draws towards the dense W_down `down`
    [D, F], not to zero. Returns [D, F] and E times [D, F]. Without permanent channels this is one independent ridge
    regression an expert.
    """
    own = [jnp.asarray(m & ~shared) for m in masks]
    rows = [padded_rows(m & ~shared, int(m.sum())) for m in masks]
    change = [_less_prior(m, down * jnp.asarray(mask)) for m, mask in zip(moments, masks, strict=True)]
    if not shared.any():
        return None, [down * o + refit_down(m, r, ridge) for m, o, r in zip(change, own, rows, strict=True)]
    both = jnp.asarray(shared)
    pairs = [_eliminate(m, o, both, ridge) for m, o in zip(change, own, strict=True)]
    left, right = (sum(parts[1:], start=parts[0]) for parts in zip(*pairs, strict=True))
    common = _solve_shared(left, right, both)
    owns = [down * o + _solve_own(m, r, common, ridge) for m, o, r in zip(change, own, rows, strict=True)]
    return down * both + common, owns
