"""A stage's step from a run's settings: `build_step` is what `train.py` runs and what `readme-jax plan` compiles.

`abstract_arguments` are the shapes and shardings of everything that such a step is called with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from readme_jax import config
from readme_jax.config import MixtureConfig, ModelConfig, RouterConfig
from readme_jax.errors import ConfigError
from readme_jax.models.runtime import Runtime
from readme_jax.models.weights import router_table
from readme_jax.parallel.mesh import BATCH_AXES, batch_sharding, batch_ways, replicated
from readme_jax.tuning.routes import routes_of
from readme_jax.tuning.schedule import Stage
from readme_jax.tuning.step import (
    Step,
    abstract_weights,
    backbone_table,
    build_expert_step,
    build_router_step,
    shard_table,
)

Params = Mapping[str, Any]


class Shaped(Protocol):
    """Shapes of what a run trains, and how it computes."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def mixture(self) -> MixtureConfig: ...
    @property
    def router(self) -> RouterConfig: ...
    @property
    def runtime(self) -> Runtime: ...


@dataclass(frozen=True)
class Shapes:
    """A `Shaped` without weights."""

    model: ModelConfig
    mixture: MixtureConfig
    router: RouterConfig
    runtime: Runtime


def build_step(run: config.Run, shapes: Shaped, stage: Stage, mesh: Any) -> Step:
    """The step of a stage on a mesh. Raises ConfigError where its batch does not divide over the mesh."""
    name, settings = ("RouterStage", run.router_stage) if stage == "router" else ("ExpertStage", run.expert_stage)
    ways, parts = batch_ways(mesh), 1 if stage == "router" else run.expert_stage.accumulate
    if settings.batch % (ways * parts):
        micro = f" in {parts} micro-batches" if parts > 1 else ""
        raise ConfigError(
            f"{name}.batch = {settings.batch}{micro} does not divide over {' x '.join(BATCH_AXES)} = {ways} devices: "
            "give more of the mesh to tensor, or accumulate less"
        )
    s = shapes
    if stage == "experts":
        return build_expert_step(s.model, s.mixture, s.runtime, run.expert_stage, run.tuning, mesh)
    return build_router_step(s.model, s.mixture, s.router, s.runtime, run.router_stage, run.tuning, mesh)


def abstract_arguments(run: config.Run, shapes: Shaped, stage: Stage, mesh: Any, step: Step) -> tuple[Any, ...]:
    """(state, batch, frozen, peak) of `Step.update` as shapes with shardings: what a run of these settings passes."""
    rows = run.router_stage.batch if stage == "router" else run.expert_stage.batch
    spread = batch_sharding(mesh)
    batch = {
        "tokens": jax.ShapeDtypeStruct((rows, run.data.sequence_length), jnp.int32, sharding=spread),
        "domain": jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=spread),
    }
    return step.abstract, batch, abstract_frozen(run, shapes, stage, mesh), jax.ShapeDtypeStruct((), jnp.float32)


def abstract_frozen(run: config.Run, shapes: Shaped, stage: Stage, mesh: Any) -> dict[str, Any]:
    """What a stage reads and does not train."""
    channels, tuned = abstract_channels(shapes, mesh), run.router_stage.objective == "expert_loss"
    if stage == "experts":
        frozen: dict[str, Any] = {"channels": channels}
        if shapes.mixture.num_experts > 1:
            router = _abstract(router_table(shapes.router), mesh)
            frozen["routes"] = routes_of(router, shapes.router, shapes.mixture.top_k)
        return frozen | ({"teacher": abstract_backbone(shapes, None, mesh)} if run.expert_stage.distill else {})
    if run.router_stage.objective == "domain" and shapes.router.kind != "layerwise":
        return {}
    return {"backbone": abstract_backbone(shapes, shapes.mixture if tuned else None, mesh), "channels": channels}


def reads_dense(run: config.Run) -> bool:
    """Whether a stage reads the dense model; where none does, a run lets go of it once its slices are cut."""
    objective, layerwise = run.router_stage.objective, run.router.kind == "layerwise"
    return objective in ("overlap", "released") or layerwise or run.expert_stage.distill > 0


def abstract_beside(run: config.Run, shapes: Shaped, stage: Stage, mesh: Any) -> list[dict[str, Any]]:
    """What a run keeps on the mesh during a stage whose step does not take it: the dense model, the tuned backbone."""
    dense, tuned = (abstract_backbone(shapes, mixture, mesh) for mixture in (None, shapes.mixture))
    kept = [dense] if reads_dense(run) else []
    if stage == "experts":
        return [] if run.expert_stage.distill else kept
    if run.router_stage.objective == "expert_loss":
        return kept
    if run.router_stage.objective == "domain" and shapes.router.kind != "layerwise":
        return [*kept, tuned]
    return [tuned] if run.router_stage.targets == "original" else [dense, tuned]  # merged, the step's is a third


def abstract_backbone(shapes: Shaped, mixture: MixtureConfig | None, mesh: Any) -> dict[str, Any]:
    """The backbone, dense where `mixture` is None."""
    return _abstract(backbone_table(shapes.model, mixture, shapes.runtime.layout), mesh)


def abstract_channels(shapes: Shaped, mesh: Any) -> dict[str, Any]:
    """Slices of every layer, whole on every device."""
    mixture, layers = shapes.mixture, shapes.model.num_layers

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated(mesh))

    own = (mixture.num_experts, mixture.expert)
    if shapes.runtime.layout == "scanned":
        return {"layers": {"permanent": leaf(layers, mixture.permanent), "experts": leaf(layers, *own)}}
    return {f"layers_{i}": {"permanent": leaf(mixture.permanent), "experts": leaf(*own)} for i in range(layers)}


def _abstract(table: Any, mesh: Any) -> dict[str, Any]:
    return abstract_weights(table, shard_table(table, mesh))
