"""The mixture's feed-forward layer: a permanent part for all tokens plus each token's own experts.

Routes are the same in every layer, so tokens are sorted into expert segments once a batch (`plan_batch`). Under a mesh
each device sorts and computes its own tokens, inside `jax.shard_map`, with weights that it gathers over `fsdp`.

An `expert` axis of X devices splits the experts: each device takes ceil(E / X) of them, the last ones fewer (what they
lack is padding, with no tokens). The X devices gather each other's tokens, compute what is theirs, and send the sums
back. In storage experts are spread like all other weights, along the model width: any E lies on any X, and a checkpoint
does not know the mesh.

# B batch, T length, D model width, E experts, K experts a token, P permanent rows, d exclusive rows of an expert,
# X devices of the expert axis
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
from readme_jax.parallel.mesh import BATCH_AXES, gather, mesh_axes, partition, spread_weight

Params = Mapping[str, Any]
ROWS = PartitionSpec(BATCH_AXES)
WIDE, DOWN = ("ffn", "embed"), ("embed", "ffn")  # axes of gate and up, and of down


def plan_batch(experts: jax.Array, num_experts: int, weights: jax.Array | None = None) -> RoutePlan:
    """Sort a batch's tokens by expert, once for all layers.

    `experts` [B, T, K] int32, `weights` [B, T, K] (None: each counts fully). Every device sorts the rows that it
    computes: its own, or under an expert axis those of its group, of which the first `sizes.sum()` are for its experts.
    The plan's arrays have a leading device axis over data x fsdp x expert.
    """
    ways = _expert_ways()
    mine = -(-num_experts // ways)

    def local(experts: jax.Array, weights: jax.Array | None) -> RoutePlan:
        flat = rearrange(experts, "b t k -> (b t) k")
        mixed = None if weights is None else rearrange(weights, "b t k -> (b t) k")
        if ways > 1:
            flat = gather(flat, ("expert",), axis=0) - jax.lax.axis_index("expert") * mine
            flat = jnp.where((flat >= 0) & (flat < mine), flat, mine)  # those of others are sorted last
            mixed = None if mixed is None else gather(mixed, ("expert",), axis=0)
        return jax.tree.map(lambda x: x[None], plan_routes(flat, mine, mixed))

    return jax.shard_map(local, in_specs=(ROWS, ROWS), out_specs=ROWS, check_vma=False)(experts, weights)


def _expert_ways() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ConfigError("no mesh: run under jax.set_mesh(make_mesh(...))")
    return int(mesh.shape["expert"])


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
        ffn = {n: spread_weight(w, *((None, "embed") if n != "down" else ("embed", None))) for n, w in p["ffn"].items()}
        experts = [gather_rows(ffn, channels["experts"][e]) for e in range(mixture.num_experts)]
        return gather_rows(ffn, channels["permanent"]) if mixture.permanent else None, experts
    if "experts" in p:
        experts = [jax.tree.map(lambda w, e=e: w[e], dict(p["experts"])) for e in range(mixture.num_experts)]
    else:
        experts = [p[f"experts_{e}"] for e in range(mixture.num_experts)]
    return p.get("permanent"), experts


def mixture_feed_forward(
    p: Params, channels: Params | None, mixture: MixtureConfig, runtime: Runtime, x: jax.Array, plan: RoutePlan
) -> jax.Array:
    """permanent(x) + the weighted sum of each token's experts, x [B, T, D] -> [B, T, D]."""
    if "experts" in p:
        permanent, stacked = p.get("permanent"), Expert(*(p["experts"][name] for name in Expert._fields))
        y = routed_experts(stacked, runtime, x, plan)
    else:
        permanent, each = layer_experts(p, channels, mixture)
        y = routed_experts([Expert(*(e[name] for name in Expert._fields)) for e in each], runtime, x, plan)
    return y if permanent is None else y + feed_forward(permanent, x)


def routed_experts(experts: Expert | list[Expert], runtime: Runtime, x: jax.Array, plan: RoutePlan) -> jax.Array:
    """The experts' part alone, of a list or stacked: each device's rows through `grouped_ffn`, d over `tensor`."""
    ways, mesh = _expert_ways(), jax.sharding.get_abstract_mesh()
    stacked = isinstance(experts, Expert)
    if ways > 1 and not stacked:
        experts, stacked = Expert(*(jnp.stack(w) for w in zip(*experts, strict=True))), True
    one = experts if isinstance(experts, Expert) else experts[0]
    wide = partition("experts.gate", one.gate.shape[-2:], WIDE, mesh)
    down = partition("experts.down", one.down.shape[-2:], DOWN, mesh)
    width, inner = mesh_axes(wide[1], mesh), mesh_axes(wide[0], mesh)
    specs: Any = Expert._make((wide, wide, down))
    specs = jax.tree.map(lambda s: PartitionSpec(None, *s), specs) if stacked else [specs] * len(experts)

    @partial(jax.shard_map, in_specs=(ROWS, ROWS, specs), out_specs=ROWS, check_vma=False)
    def local(x: jax.Array, plan: RoutePlan, experts: Any) -> jax.Array:
        rows = rearrange(x, "b t d -> (b t) d")
        own = jax.tree.map(lambda a: a[0], plan)
        if ways > 1:
            rows, experts = gather(rows, ("expert",), axis=0), _hand_out(experts, ways, "expert" in width)
        over = tuple(a for a in width if a != "expert" or ways == 1)
        experts = [_whole(e, over) for e in experts] if not stacked else _whole(experts, over)
        y = grouped_ffn(rows, own, experts, backend=runtime.segments, some=ways > 1)
        if ways > 1:
            y = jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)
        if inner:
            y = jax.lax.psum(y, inner)
        return rearrange(y, "(b t) d -> b t d", b=x.shape[0])

    return local(x, plan, experts)


def _whole(e: Expert, axes: tuple[str, ...]) -> Expert:
    """Weights, stacked or not, gathered along D over mesh axes, inside `jax.shard_map`."""
    last = e.gate.ndim - 1
    return Expert(gather(e.gate, axes, last), gather(e.up, axes, last), gather(e.down, axes, last - 1))


def _hand_out(experts: Expert, ways: int, spread: bool) -> Expert:
    """This device's ceil(E / X) of the stacked experts, inside `jax.shard_map`: padded with zeros to a multiple of X.

    With `spread` a device holds a part of D of every expert, and gets its own experts' other parts for the rest.
    """
    mine = -(-experts.gate.shape[0] // ways)

    def one(w: jax.Array, axis: int) -> jax.Array:
        w = jnp.pad(w, ((0, mine * ways - w.shape[0]), (0, 0), (0, 0)))
        if spread:
            return jax.lax.all_to_all(w, "expert", split_axis=0, concat_axis=axis, tiled=True)
        return jax.lax.dynamic_slice_in_dim(w, jax.lax.axis_index("expert") * mine, mine)

    return Expert(one(experts.gate, 2), one(experts.up, 2), one(experts.down, 1))
