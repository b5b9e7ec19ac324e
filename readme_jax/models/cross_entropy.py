"""Language-model loss over a large vocabulary, a block of positions at a time: no [B, T, V] array is ever held.

Under a mesh every device loops over its own rows. The head is gathered once, before the loop, and its gradient summed
once, after it; a vocabulary spread over `tensor` stays so, and each softmax is put together from its parts.

# B batch, T length, D model width, V vocabulary, n rows of a block
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from readme_jax.parallel.mesh import BATCH_AXES, gather, mesh_axes, partition

ROWS = 1024  # logits rows at a time, on each device
GPU_ROWS = 4096  # in fewer blocks: each reads and writes the head's whole gradient
_SPEC = PartitionSpec(BATCH_AXES)

Teacher = tuple[jax.Array, jax.Array] | None  # hidden [B, T, D'], head [V, D']


class _Spread(NamedTuple):
    """How a head [V, D] and rows lie: its partition, and the mesh axes of vocabulary, width and rows (none outside)."""

    spec: PartitionSpec = PartitionSpec()
    vocab: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()


def _spread(head: jax.Array, mesh: Any) -> _Spread:
    if mesh.empty:
        return _Spread()
    spec = partition("the output head", head.shape, ("vocab", "embed"), mesh)
    vocab, width = (mesh_axes(each, mesh) for each in spec)
    return _Spread(spec, vocab, width, mesh_axes(BATCH_AXES, mesh))


def token_losses(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy in nats of every position: hidden [B, T, D], head [V, D], targets [B, T] -> [B, T] float32."""
    mesh = jax.sharding.get_abstract_mesh()
    spread = _spread(head, mesh)

    def local(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
        count, step = _blocks(hidden.shape)
        whole = gather(head.astype(hidden.dtype), spread.width, axis=1)
        h, goals = (_padded(x, count * step) for x in (hidden, targets))

        def block(i: Any, losses: jax.Array) -> jax.Array:
            logits = _logits(_take(h, i, step), whole)
            each = _log_norm(logits, spread) - _picked(logits, _take(goals, i, step), spread)
            return _put(losses, each, i, step)

        losses = _loop(count, block, jnp.zeros(goals.shape, jnp.float32))
        return losses[:, : hidden.shape[1]]

    if mesh.empty:
        return local(hidden, head, targets)
    specs = (_SPEC, spread.spec, _SPEC)
    return jax.shard_map(local, in_specs=specs, out_specs=_SPEC, check_vma=False)(hidden, head, targets)


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


Loss = tuple[jax.Array, tuple[jax.Array, jax.Array] | None]  # the loss; gradients of hidden and head


def _loss_and_gradients(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    teacher: Teacher,
    distill: float,
    gradients: bool,
) -> Loss:
    mass = weights.sum()
    weights = weights / jnp.where(mass > 0, mass, 1)
    teacher = teacher if distill else None
    mesh = jax.sharding.get_abstract_mesh()
    spread = _spread(head, mesh)
    known = None if teacher is None else _spread(teacher[1], mesh)
    local = partial(_local_loss, spread=spread, known=known, distill=distill, gradients=gradients)
    if mesh.empty:
        return local(hidden, head, targets, weights, teacher)
    mapped = jax.shard_map(
        local,
        in_specs=(_SPEC, spread.spec, _SPEC, _SPEC, None if known is None else (_SPEC, known.spec)),
        out_specs=(PartitionSpec(), (_SPEC, spread.spec) if gradients else None),
        check_vma=False,
    )
    return mapped(hidden, head, targets, weights, teacher)


def _local_loss(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    teacher: Teacher,
    *,
    spread: _Spread,
    known: _Spread | None,
    distill: float,
    gradients: bool,
) -> Loss:
    """The loss over all devices, from one device's rows and part of the vocabulary; weights sum to 1 over devices."""
    count, step = _blocks(hidden.shape)
    whole = gather(head.astype(hidden.dtype), spread.width, axis=1)
    h, goals, mass = (_padded(x, count * step) for x in (hidden, targets, weights))
    if teacher is not None and known is not None:
        theirs = (_padded(teacher[0], count * step), gather(teacher[1].astype(teacher[0].dtype), known.width, axis=1))

    def block(i: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        total, d_hidden, d_head = carry
        rows, goal, weight = (_take(x, i, step) for x in (h, goals, mass))
        logits = _logits(rows, whole)
        log_norm = _log_norm(logits, spread)
        loss = (1 - distill) * (log_norm - _picked(logits, goal, spread))
        soft = None
        if teacher is not None:
            theirs_ = _logits(_take(theirs[0], i, step), theirs[1])
            soft = jnp.exp(theirs_ - _log_norm(theirs_, spread)[:, None])
            loss += distill * (log_norm - _sum(jnp.sum(soft * logits, axis=-1), spread.vocab))
        total += jnp.sum(weight * loss)
        if gradients:
            hot = jax.nn.one_hot(_own(goal, logits, spread), logits.shape[-1], dtype=jnp.float32) * (1 - distill)
            d_logits = jnp.exp(logits - log_norm[:, None]) - (hot if soft is None else hot + distill * soft)
            d_logits = (weight[:, None] * d_logits).astype(hidden.dtype)
            d_hidden = _put(d_hidden, jnp.einsum("nv,vd->nd", d_logits, whole), i, step)
            d_head += jnp.einsum("nv,nd->vd", d_logits, rows, preferred_element_type=jnp.float32)
        return total, d_hidden, d_head

    start = (jnp.zeros_like(h), jnp.zeros(whole.shape, jnp.float32)) if gradients else (None, None)
    total, d_hidden, d_head = _loop(count, block, (jnp.zeros((), jnp.float32), *start))
    total = _sum(total, spread.rows)
    if not gradients:
        return total, None
    if spread.width:
        d_head = jax.lax.psum_scatter(d_head, spread.width, scatter_dimension=1, tiled=True)
    d_head = _sum(d_head, tuple(a for a in spread.rows if a not in spread.width))
    d_hidden = _sum(d_hidden, spread.vocab)[:, : hidden.shape[1]]
    return total, (d_hidden, d_head.astype(head.dtype))


def _forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, teacher: Teacher, distill: float
) -> Loss:
    with jax.named_scope("loss"):
        return _loss_and_gradients(hidden, head, targets, weights, teacher, distill, gradients=True)


def _backward(distill: float, residuals: Any, g: jax.Array) -> tuple[Any, ...]:
    d_hidden, d_head = residuals
    return (g * d_hidden).astype(d_hidden.dtype), (g * d_head).astype(d_head.dtype), None, None, None


lm_loss.defvjp(_forward, _backward)


# --- blocks of positions ------------------------------------------------------------------------------------------


def _blocks(shape: tuple[int, ...]) -> tuple[int, int]:
    """How many blocks of how many positions, of equal size, cover [B, T, ...]."""
    batch, length = shape[:2]
    rows = GPU_ROWS if jax.default_backend() == "gpu" else ROWS
    count = -(-length // max(1, rows // max(batch, 1)))
    return count, -(-length // max(count, 1))


def _padded(x: jax.Array, length: int) -> jax.Array:
    return x if x.shape[1] == length else jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _loop(count: int, block: Any, carry: Any) -> Any:
    return block(0, carry) if count == 1 else jax.lax.fori_loop(0, count, block, carry)


def _take(x: jax.Array, i: Any, step: int) -> jax.Array:
    """Block i of [B, T, ...] as [B * step, ...]: with two axes of rows, XLA would copy logits' gradients transposed."""
    return jax.lax.dynamic_slice_in_dim(x, i * step, step, axis=1).reshape(-1, *x.shape[2:])


def _put(x: jax.Array, rows: jax.Array, i: Any, step: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, rows.reshape(x.shape[0], step, *x.shape[2:]), i * step, axis=1)


# --- softmaxes over a vocabulary in parts -------------------------------------------------------------------------


def _logits(rows: jax.Array, head: jax.Array) -> jax.Array:
    return jnp.einsum("nd,vd->nv", rows, head, preferred_element_type=jnp.float32)


def _sum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.psum(x, axes) if axes else x


def _log_norm(logits: jax.Array, spread: _Spread) -> jax.Array:
    """log sum exp over the whole vocabulary: [n, V or a part] -> [n]."""
    if not spread.vocab:
        return jax.nn.logsumexp(logits, axis=-1)
    top = jax.lax.pmax(logits.max(axis=-1), spread.vocab)
    return top + jnp.log(_sum(jnp.exp(logits - top[:, None]).sum(axis=-1), spread.vocab))


def _own(goal: jax.Array, logits: jax.Array, spread: _Spread) -> jax.Array:
    """Token ids [n] counted from this device's first; those of other devices are out of range."""
    return goal - jax.lax.axis_index(spread.vocab) * logits.shape[-1] if spread.vocab else goal


def _picked(logits: jax.Array, goal: jax.Array, spread: _Spread) -> jax.Array:
    """The logit of each row's target, [n]."""
    own = _own(goal, logits, spread)[:, None]
    if not spread.vocab:
        return jnp.take_along_axis(logits, own, axis=-1)[:, 0]
    here = (own >= 0) & (own < logits.shape[-1])
    each = jnp.take_along_axis(logits, jnp.clip(own, 0, logits.shape[-1] - 1), axis=-1)
    return _sum(jnp.where(here, each, 0)[:, 0], spread.vocab)
