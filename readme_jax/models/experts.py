"""The mixture's feed-forward layer: a permanent part for all tokens plus each token's own experts.

Routes are the same in every layer, so tokens are sorted into expert segments once a batch (`plan_batch`). Under a mesh
each device sorts and computes its own tokens, inside `jax.shard_map`.

# B batch, T length, D model width, E experts, K experts a token, P permanent rows, d exclusive rows of an expert
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec

from readme_jax.config import MixtureConfig
from readme_jax.errors import ConfigError
from readme_jax.models.feed_forward import feed_forward
from readme_jax.models.runtime import Runtime
from readme_jax.models.segments import Expert, RoutePlan, grouped_ffn, plan_routes
from readme_jax.parallel.mesh import BATCH_AXES

Params = Mapping[str, Any]
ROWS = PartitionSpec(BATCH_AXES)


def plan_batch(experts: jax.Array, num_experts: int, weights: jax.Array | None = None) -> RoutePlan:
    """Sort a batch's tokens by expert, once for all layers.

    `experts` [B, T, K] int32, `weights` [B, T, K] (None: each counts fully). Every device sorts its own rows; the
    plan's arrays have a leading device axis over data x fsdp.
    """

    def local(experts: jax.Array, weights: jax.Array | None) -> RoutePlan:
        flat = rearrange(experts, "b t k -> (b t) k")
        mixed = None if weights is None else rearrange(weights, "b t k -> (b t) k")
        return jax.tree.map(lambda x: x[None], plan_routes(flat, num_experts, mixed))

    return jax.shard_map(local, in_specs=(ROWS, ROWS), out_specs=ROWS, check_vma=False)(experts, weights)


def gather_rows(ffn: Params, rows: jax.Array) -> dict[str, jax.Array]:
    """The channels `rows` [d] of a dense FFN; rows out of range (padding) are zero channels."""
    return {
        "gate": jnp.take(ffn["gate"], rows, axis=0, mode="fill", fill_value=0),
        "up": jnp.take(ffn["up"], rows, axis=0, mode="fill", fill_value=0),
        "down": jnp.take(ffn["down"], rows, axis=1, mode="fill", fill_value=0),
    }


def layer_experts(p: Params, channels: Params | None, mixture: MixtureConfig) -> tuple[Params | None, Sequence[Params]]:
    """The permanent part (or None) and the E experts of one layer, tied or not, stacked or not."""
    if mixture.tied:
        assert channels is not None, "a tied mixture needs its channels"
        experts = [gather_rows(p["ffn"], channels["experts"][e]) for e in range(mixture.num_experts)]
        return gather_rows(p["ffn"], channels["permanent"]) if mixture.permanent else None, experts
    if "experts" in p:
        experts = [jax.tree.map(lambda w, e=e: w[e], dict(p["experts"])) for e in range(mixture.num_experts)]
    else:
        experts = [p[f"experts_{e}"] for e in range(mixture.num_experts)]
    return p.get("permanent"), experts


def mixture_feed_forward(
    p: Params, channels: Params | None, mixture: MixtureConfig, runtime: Runtime, x: jax.Array, plan: RoutePlan
) -> jax.Array:
    """permanent(x) + the weighted sum of each token's experts, x [B, T, D] -> [B, T, D]."""
    permanent, experts = layer_experts(p, channels, mixture)
    y = routed_experts(experts, runtime, x, plan)
    return y if permanent is None else y + feed_forward(permanent, x)


def routed_experts(experts: Sequence[Params], runtime: Runtime, x: jax.Array, plan: RoutePlan) -> jax.Array:
    """The experts' part alone: each device's rows through `grouped_ffn`, expert width over `tensor`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ConfigError("no mesh: run under jax.set_mesh(make_mesh(...))")
    if mesh.shape["expert"] > 1:
        raise ConfigError(f"Mesh.expert = {mesh.shape['expert']}: lay experts out over fsdp or tensor instead")
    weights = [Expert(e["gate"], e["up"], e["down"]) for e in experts]
    wide = PartitionSpec("tensor", None)
    specs = [Expert._make((wide, wide, PartitionSpec(None, "tensor")))] * len(experts)

    @partial(jax.shard_map, in_specs=(ROWS, ROWS, specs), out_specs=ROWS, check_vma=False)
    def local(x: jax.Array, plan: RoutePlan, weights: list[Expert]) -> jax.Array:
        rows = rearrange(x, "b t d -> (b t) d")
        y = grouped_ffn(rows, jax.tree.map(lambda a: a[0], plan), weights, backend=runtime.segments)
        if mesh.shape["tensor"] > 1:
            y = jax.lax.psum(y, "tensor")
        return rearrange(y, "(b t) d -> b t d", b=x.shape[0])

    return local(x, plan, weights)
