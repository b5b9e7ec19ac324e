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
from readme_jax.models.feed_forward import activations, feed_forward, linear
from readme_jax.models.llama import attend, prepare, rms_norm
from readme_jax.models.runtime import Runtime
from readme_jax.refactor.calibrate import cast
from readme_jax.refactor.select import Moments, ridged

Params = Mapping[str, Any]
EXACT = jax.lax.Precision.HIGHEST  # moments and solves in full float32 on every platform


def no_moments(config: ModelConfig) -> Moments:
    """Moments of no tokens."""
    f, d = config.ffn_dim, config.embed_dim
    return Moments(jnp.zeros(f), jnp.zeros((f, f)), jnp.zeros((d, f)))


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
    added = Moments(
        jnp.abs(a).sum(0),
        jnp.einsum("nf,ng->fg", a, a, precision=EXACT),
        jnp.einsum("nd,nf->df", wanted, a, precision=EXACT),
    )
    return jax.tree.map(jnp.add, moments, added), after, sliced


@partial(jax.jit, static_argnames=("config", "runtime"), donate_argnums=(2,))
def advance(p: Params, down: jax.Array, sliced: jax.Array, config: ModelConfig, runtime: Runtime) -> jax.Array:
    """The sliced stream [B, T, D] after attention, plus what the cut layer writes: W_down [D, F], zero where cut."""
    p = cast(p, runtime)
    y = rms_norm(sliced, p["ffn_norm"], config.norm_eps)
    return sliced + feed_forward(p["ffn"] | {"down": down.astype(runtime.dtype)}, y)


@jax.jit
def refit_down(moments: Moments, mask: jax.Array, ridge: float) -> jax.Array:
    """W_down [D, F] of least squared error on the channels of mask [F], zero elsewhere.

    Solves W_S (C_SS + lambda I) = B_S as one masked F x F system, so that every layer and expert has one shape.
    """
    with jax.default_matmul_precision("highest"):
        gram = ridged(moments.gram, ridge)
        keep = mask.astype(gram.dtype)
        system = gram * keep[:, None] * keep[None, :] + jnp.diag(jnp.where(mask, 0.0, jnp.mean(jnp.diagonal(gram))))
        factor = jax.scipy.linalg.cho_factor(system)
        return (jax.scipy.linalg.cho_solve(factor, (moments.cross * keep).T)).T * keep


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


@jax.jit
def _solve_own(moments: Moments, own: jax.Array, shared_down: jax.Array, ridge: float) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        rest = moments._replace(cross=moments.cross - shared_down @ moments.gram)
    return refit_down(rest, own, ridge)


def refit_jointly(moments: list[Moments], masks: np.ndarray, shared: np.ndarray, ridge: float) -> tuple[Any, list[Any]]:
    """W_down of a permanent part shared by E experts, and of each expert's own channels, jointly of least error.

    masks [E, F] are all kept channels, shared [F] the permanent ones. Returns [D, F] and E times [D, F]. Without
    permanent channels this is one independent ridge regression an expert.
    """
    own = masks & ~shared
    if not shared.any():
        return None, [refit_down(m, jnp.asarray(o), ridge) for m, o in zip(moments, own, strict=True)]
    pairs = [_eliminate(m, jnp.asarray(o), jnp.asarray(shared), ridge) for m, o in zip(moments, own, strict=True)]
    left, right = (sum(parts[1:], start=parts[0]) for parts in zip(*pairs, strict=True))
    down = _solve_shared(left, right, jnp.asarray(shared))
    return down, [_solve_own(m, jnp.asarray(o), down, ridge) for m, o in zip(moments, own, strict=True)]
