"""The conventional router, to compare the pre-gating one with: in every layer a linear map of its hidden states.

Routes differ by layer and are known only once the backbone has come that far, so each layer sorts its own tokens, and
nothing can be batched, cached or prefetched by expert. The gates [L, E, D] travel with the channels of each layer.

# B batch, T length, D model width, E experts, L layers
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from readme_jax.config import MixtureConfig
from readme_jax.models.choice import choose
from readme_jax.models.experts import plan_batch
from readme_jax.models.segments import RoutePlan

Params = Mapping[str, Any]
GATE = "gate"


def with_gates(channels: Params | None, gates: jax.Array) -> dict[str, Any]:
    """Channels of a mixture (either layout; None: an untied one's, unrolled), each layer's gate beside them."""
    if channels is not None and "layers" in channels:
        return {"layers": {**channels["layers"], GATE: gates}}
    names = (f"layers_{i}" for i in range(gates.shape[0]))
    return {name: {**(channels[name] if channels else {}), GATE: gates[i]} for i, name in enumerate(names)}


def gate_logits(gate: jax.Array, y: jax.Array) -> jax.Array:
    """float32 logits [B, T, E] of a layer's normed input y [B, T, D] under its gate [E, D]."""
    return jnp.einsum("btd,ed->bte", y.astype(jnp.float32), gate.astype(jnp.float32))


def layer_plan(channels: Params | None, mixture: MixtureConfig, y: jax.Array) -> RoutePlan:
    """The routes of one layer, from its own normed input y [B, T, D]. No gradient passes through them."""
    if channels is None or GATE not in channels:
        raise ValueError("a mixture needs routes: a plan, or gates beside its channels")
    logits = jax.lax.stop_gradient(gate_logits(channels[GATE], y))
    experts, weights = choose(logits, mixture.top_k)
    return plan_batch(experts, mixture.num_experts, weights if mixture.top_k > 1 else None)
