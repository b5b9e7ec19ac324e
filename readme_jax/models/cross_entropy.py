"""Language-model loss over a large vocabulary, a block of positions at a time: no [B, T, V] array is ever held.

# B batch, T length, D model width, V vocabulary
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

ROWS = 1024  # logits rows at a time


def _spans(shape: tuple[int, ...]) -> list[slice]:
    batch, length = shape[:2]
    step = max(1, ROWS // batch)
    return [slice(i, min(i + step, length)) for i in range(0, length, step)]


def _rows(x: jax.Array) -> jax.Array:
    """[B, t, ...] -> [B * t, ...]: with two axes of rows, XLA would write a transposed copy of logits' gradients."""
    return x.reshape(-1, *x.shape[2:])


def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    return jnp.einsum("...d,vd->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def token_losses(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy in nats of every position: hidden [B, T, D], head [V, D], targets [B, T] -> [B, T] float32."""
    losses = []
    for span in _spans(hidden.shape):
        logits = _logits(hidden[:, span], head)
        picked = jnp.take_along_axis(logits, targets[:, span, None], axis=-1)[..., 0]
        losses.append(jax.nn.logsumexp(logits, axis=-1) - picked)
    return jnp.concatenate(losses, axis=1)


Teacher = tuple[jax.Array, jax.Array] | None  # hidden [B, T, D'], head [V, D']


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def lm_loss(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, teacher: Teacher, distill: float
) -> jax.Array:
    """Weighted mean loss, a scalar: (1 - distill) * CE(targets) + distill * CE(softmax of the teacher's logits).

    hidden [B, T, D], head [V, D], targets [B, T] int32, weights [B, T] float32 (0 leaves a position out), teacher the
    frozen dense model's (hidden, head), or None when `distill` is 0. The soft part is KL(teacher || model) plus the
    teacher's entropy, a constant. The gradient is computed in the forward pass, while the logits are there.
    """
    return _loss_and_gradients(hidden, head, targets, weights, teacher, distill, gradients=False)[0]


def _loss_and_gradients(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    teacher: Teacher,
    distill: float,
    gradients: bool,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    mass = weights.sum()
    weights = weights / jnp.where(mass > 0, mass, 1)
    total, d_hidden, d_head = jnp.zeros((), jnp.float32), [], jnp.zeros(head.shape, jnp.float32)
    for span in _spans(hidden.shape):
        h, goal, weight = (_rows(x[:, span]) for x in (hidden, targets, weights))
        logits = _logits(h, head)
        log_norm = jax.nn.logsumexp(logits, axis=-1)
        loss = (1 - distill) * (log_norm - jnp.take_along_axis(logits, goal[:, None], axis=-1)[:, 0])
        soft = None
        if teacher is not None and distill:
            soft = jax.nn.softmax(_logits(_rows(teacher[0][:, span]), teacher[1]), axis=-1)
            loss += distill * (log_norm - jnp.sum(soft * logits, axis=-1))
        total += jnp.sum(weight * loss)
        if gradients:
            hot = jax.nn.one_hot(goal, logits.shape[-1], dtype=jnp.float32) * (1 - distill)
            d_logits = jnp.exp(logits - log_norm[:, None]) - (hot if soft is None else hot + distill * soft)
            d_logits = (weight[:, None] * d_logits).astype(hidden.dtype)
            d_h = jnp.einsum("nv,vd->nd", d_logits, head.astype(hidden.dtype))
            d_hidden.append(d_h.reshape(hidden[:, span].shape))
            d_head += jnp.einsum("nv,nd->vd", d_logits, h, preferred_element_type=jnp.float32)
    return total, (jnp.concatenate(d_hidden, axis=1), d_head.astype(head.dtype)) if gradients else None


def _forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, teacher: Teacher, distill: float
) -> tuple[jax.Array, Any]:
    loss, gradients = _loss_and_gradients(hidden, head, targets, weights, teacher, distill, gradients=True)
    return loss, gradients


def _backward(distill: float, residuals: Any, g: jax.Array) -> tuple[Any, ...]:
    d_hidden, d_head = residuals
    return (g * d_hidden).astype(d_hidden.dtype), (g * d_head).astype(d_head.dtype), None, None, None


lm_loss.defvjp(_forward, _backward)
