"""What a checkpoint of a run holds, and how a run is taken up from one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from readme_jax import config
from readme_jax.checkpoints.store import Store
from readme_jax.config import MixtureConfig, ModelConfig, RouterConfig
from readme_jax.models.runtime import Runtime
from readme_jax.models.weights import Table, router_table
from readme_jax.parallel.mesh import replicated
from readme_jax.tuning.rounds import Progress
from readme_jax.tuning.schedule import schedule_of
from readme_jax.tuning.step import abstract_weights, backbone_table, moment_shardings, optimizer, shard_table


def save(store: Store, progress: Progress, channels: Any, meta: dict[str, Any]) -> None:
    """Write everything a run has, as a checkpoint numbered by its steps done. Raises CheckpointError on a full disk."""
    state = {
        "backbone": progress.backbone,
        "router": progress.router,
        "channels": _kept(channels),
        "key": progress.key,
    }
    if progress.moments is not None:
        state["moments"] = progress.moments
    store.save(progress.done, state, meta)


def load(
    store: Store,
    done: int,
    run: config.Run,
    model: ModelConfig,
    mixture: MixtureConfig,
    router: RouterConfig,
    runtime: Runtime,
    mesh: Any,
) -> tuple[Progress, Any]:
    """Progress and channels of the checkpoint at `done` steps, on the mesh, which may differ from the one before."""
    whole = replicated(mesh)
    tables = {"backbone": backbone_table(model, mixture, runtime.layout), "router": router_table(router)}
    like: dict[str, Any] = {name: _abstract(table, mesh) for name, table in tables.items()}
    shapes = _channels_like(model, mixture, runtime, whole)
    like["channels"] = _kept(shapes)
    like["key"] = random_key(run.seed, mesh)
    position = schedule_of(run, mixture.num_experts).at(done)
    if position is not None and position.step:
        table = tables["router" if position.stage == "router" else "backbone"]
        like["moments"] = _moments_like(table, run.tuning, mesh)
    state, _ = store.load(done, like)
    empty = jnp.zeros((model.num_layers, 0) if runtime.layout == "scanned" else (0,), jnp.int32, device=whole)
    channels = {
        layer: {part: state["channels"][layer].get(part, empty) for part in parts} for layer, parts in shapes.items()
    }
    return Progress(done, state["backbone"], state["router"], state["key"], state.get("moments")), channels


def random_key(seed: int, mesh: Any) -> jax.Array:
    """A run's random key, on every device of the mesh."""
    return jax.jit(lambda: jax.random.split(jax.random.key(seed))[0], out_shardings=replicated(mesh))()


def _kept(channels: Any) -> Any:
    """Channels without arrays of no entries (no permanent part), which Orbax does not save."""
    return {layer: {part: rows for part, rows in parts.items() if rows.size} for layer, parts in channels.items()}


def _abstract(table: Table, mesh: Any) -> Any:
    return abstract_weights(table, shard_table(table, mesh))


def _moments_like(table: Table, tuning: config.Tuning, mesh: Any) -> Any:
    adamw = optimizer(tuning)
    moments = jax.eval_shape(adamw.init, _abstract(table, mesh))
    shardings = moment_shardings(adamw, moments, shard_table(table, mesh), mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), moments, shardings)


def _channels_like(model: ModelConfig, mixture: MixtureConfig, runtime: Runtime, whole: NamedSharding) -> Any:
    def rows(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole)

    def layer(*lead: int) -> dict[str, Any]:
        return {
            "permanent": rows(*lead, mixture.permanent),
            "experts": rows(*lead, mixture.num_experts, mixture.expert),
        }

    if runtime.layout == "scanned":
        return {"layers": layer(model.num_layers)}
    return {f"layers_{i}": layer() for i in range(model.num_layers)}
