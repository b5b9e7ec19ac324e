"""Which channels an expert keeps: small score functions, an exact top-d, and the permanent channels.

# D model width, E experts, F dense FFN width, L layers
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

REMOVED_AT_ONCE = 32  # channels removed between two updates of the inverse in `obs`


class Moments(NamedTuple):
    """Sums over a domain's tokens at one layer, all that selection and refit need.

    absolute [F] = sum |a|; gram [F, F] = sum a a^T; cross [D, F] = sum t a^T with t the output wanted of the layer.
    """

    absolute: jax.Array
    gram: jax.Array
    cross: jax.Array


def shared_moments(moments: list[Moments], share: float) -> list[Moments]:
    """Each expert's moments with `share` times the mean of the others' added: shrinkage towards all text.

    A domain's text alone estimates F x F numbers poorly; what domains have in common steadies them.
    """
    others = len(moments) - 1
    if share == 0 or others == 0:
        return moments
    total = jax.tree.map(lambda *each: sum(each[1:], start=each[0]), *moments)
    weight = share / others
    return [jax.tree.map(lambda own, all_: own + weight * (all_ - own), m, total) for m in moments]


def top_channels(scores: np.ndarray, width: int) -> np.ndarray:
    """Mask [F] of exactly the `width` highest scores; ties go to the lower index. (The release kept one too few.)"""
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    mask = np.zeros(len(order), bool)
    mask[order[:width]] = True
    return mask


def rmsw(rms: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Root mean square of a channel times the norm of its column of W_down [D, F]: the size of what it writes."""
    return rms * np.linalg.norm(down, axis=0)


def ridged(gram: jax.Array, ridge: float) -> jax.Array:
    """gram + ridge * (mean diagonal) * I."""
    return gram + ridge * jnp.mean(jnp.diagonal(gram)) * jnp.eye(gram.shape[0], dtype=gram.dtype)


@partial(jax.jit, static_argnames=("width",))
def obs(moments: Moments, ridge: float, width: int) -> jax.Array:
    """Optimal brain surgeon scores [F]: the order in which removing channels costs least, others refitted.

    Removing channel c raises the squared error by |w_c|^2 / [C^-1]_cc, with w_c its column of the refitted W_down.
    Channels leave `REMOVED_AT_ONCE` at a time, the inverse and W_down updated in between, until `width` are left.
    Scores are ranks: removed channels in the order they left, then the kept ones by their last cost.
    """
    size = moments.gram.shape[0]
    rounds = -(-(size - width) // REMOVED_AT_ONCE)
    inverse = jnp.linalg.inv(ridged(moments.gram, ridge))
    inverse = (inverse + inverse.T) / 2
    down = moments.cross @ inverse

    def costs(down: jax.Array, inverse: jax.Array, left: jax.Array) -> jax.Array:
        diagonal = jnp.where(left, jnp.maximum(jnp.diagonal(inverse), 1e-30), 1.0)
        return jnp.where(left, jnp.sum(down * down, axis=0) / diagonal, jnp.inf)

    def remove(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        inverse, down, left, score = state
        count = jnp.minimum(REMOVED_AT_ONCE, size - width - i * REMOVED_AT_ONCE)
        _, worst = jax.lax.top_k(-costs(down, inverse, left), REMOVED_AT_ONCE)
        active = jnp.arange(REMOVED_AT_ONCE) < count
        columns = inverse[:, worst] * active
        block = jnp.where(active[:, None] & active[None, :], inverse[worst][:, worst], jnp.eye(REMOVED_AT_ONCE))
        solved = jnp.linalg.solve(block, columns.T)
        down = down - (down[:, worst] * active) @ solved
        inverse = inverse - columns @ solved
        gone = jnp.where(active, worst, size)
        left = left.at[gone].set(False, mode="drop")
        rank = (i * REMOVED_AT_ONCE + jnp.arange(REMOVED_AT_ONCE)).astype(score.dtype)
        return inverse, down, left, score.at[gone].set(rank - size, mode="drop")

    start = (inverse, down, jnp.ones(size, bool), jnp.zeros(size, jnp.float32))
    inverse, down, left, score = jax.lax.fori_loop(0, rounds, remove, start)
    return jnp.where(left, costs(down, inverse, left), score)


def permanent_channels(masks: np.ndarray) -> np.ndarray:
    """Channels that every expert keeps: masks [E, F] -> [F]."""
    return np.asarray(masks.all(axis=0))


def overlap(masks: np.ndarray) -> np.ndarray:
    """Share of channels that each pair of experts has in common, over all layers: masks [L, E, F] -> [E, E]."""
    flat = masks.transpose(1, 0, 2).reshape(masks.shape[1], -1).astype(np.float64)
    return (flat @ flat.T) / flat.sum(axis=1)[:, None]
