"""The jitted steps of both stages: one `build_step`, with shardings for all of its state, donated.

A stage starts with fresh moments (`Step.start`) and ends at a learning rate of zero. Callers run under
`jax.set_mesh(mesh)`. Everything a step reads and does not train travels in one dict, `frozen`.

# B batch, T length, D model width, E experts, K experts a token, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jax.sharding import NamedSharding

from readme_jax.config import ExpertStage, Layout, MixtureConfig, ModelConfig, RouterConfig, RouterStage, Tuning
from readme_jax.models.cross_entropy import lm_loss
from readme_jax.models.experts import plan_batch
from readme_jax.models.llama import Llama, head_weight
from readme_jax.models.router import Router
from readme_jax.models.runtime import Runtime
from readme_jax.models.segments import RoutePlan
from readme_jax.models.weights import Table, Weight, block_table, outer_table, router_table, stacked
from readme_jax.parallel.mesh import batch_sharding, batch_ways, replicated, sharding_for
from readme_jax.parallel.placing import put
from readme_jax.tuning import distill
from readme_jax.tuning.layerwise import layerwise_loss
from readme_jax.tuning.routes import LayerwiseRoutes, Routes, gated
from readme_jax.tuning.sharing import share_gradients

Params = Mapping[str, Any]
Batch = Mapping[str, jax.Array]  # tokens [B, T] int32, domain [B] int32
Metrics = dict[str, jax.Array]
Loss = Callable[[Any, Batch, Params], tuple[jax.Array, Metrics]]  # parameters, micro-batch, frozen -> mean loss
Mixing = Callable[[Any, Params], Any]  # gradients, frozen -> those that the optimizer is given

MICRO_TOKENS = 16384  # a device at a time, in router tuning, whose targets need a dense forward pass


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a stage changes: fp32 parameters, AdamW's moments, and the steps done in this stage."""

    params: Any
    moments: Any
    step: Any


@dataclass(frozen=True)
class Step:
    """A compiled step and where its state lies.

    `update(state, batch, frozen, peak) -> (state, metrics)`: metrics hold `loss`, `grad_norm`, `lr` and the
    objective's own, all scalars; `peak` is the stage's initial learning rate. The state passed in is donated.
    """

    update: Any
    start: Callable[[Params], TrainState]
    shardings: TrainState
    abstract: TrainState


# --- shardings ----------------------------------------------------------------------------------------------------


def backbone_table(config: ModelConfig, mixture: MixtureConfig | None, layout: Layout) -> Table:
    """Every weight of a backbone, dense or sliced, in a layout."""
    block = block_table(config, mixture, stack=layout == "scanned")
    if layout == "scanned":
        return {**outer_table(config), "layers": stacked(block, config.num_layers, "layers")}
    return {**outer_table(config), **{f"layers_{i}": block for i in range(config.num_layers)}}


def shard_table(table: Table, mesh: Any, path: str = "") -> dict[str, Any]:
    """Shardings of a table's weights. Raises ConfigError where a large one does not divide over the mesh."""
    return {
        name: sharding_for(path + name, w.shape, w.axes, mesh)
        if isinstance(w, Weight)
        else shard_table(w, mesh, f"{path}{name}.")
        for name, w in table.items()
    }


def abstract_weights(table: Table, shardings: Params) -> dict[str, Any]:
    """Shapes (fp32) of a table's weights where `shard_table` lays them."""
    return {
        name: jax.ShapeDtypeStruct(w.shape, jnp.float32, sharding=shardings[name])
        if isinstance(w, Weight)
        else abstract_weights(w, shardings[name])
        for name, w in table.items()
    }


def place(tree: Any, shardings: Any) -> Any:
    """A fp32 copy of a tree on the mesh, which shares no memory with it: donating one leaves the other alone."""
    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda x: put(x, shardings, jnp.float32), tree)
    return jax.tree.map(lambda x, s: put(x, s, jnp.float32), tree, shardings)


# --- the optimizer ------------------------------------------------------------------------------------------------


def learning_rate(peak: float | jax.Array, step: jax.Array, steps: int, warmup: int) -> jax.Array:
    """Of a stage's 0-based `step`: linear warm-up (none by default), then a cosine from `peak` to zero at `steps`."""
    done = jnp.asarray(step, jnp.float32)
    share = jnp.clip((done - warmup) / max(steps - warmup, 1), 0, 1)
    rising = (done + 1) / max(warmup, 1)
    return peak * jnp.where(done < warmup, rising, 0.5 * (1 + jnp.cos(jnp.pi * share)))


def round_peak(lr: float, tuning: Tuning, round_: int) -> float:
    """A stage's initial learning rate in a round: lr * round_decay^round."""
    return lr * tuning.round_decay**round_


def decays(params: Any) -> Any:
    """Which weights decay: all but norms and biases, by name (a scanned norm is a matrix too)."""

    def leaf(path: Any, _: Any) -> bool:
        name = path[-1].key
        return not (name == "b" or name.endswith("norm"))

    return jax.tree_util.tree_map_with_path(leaf, params)


def optimizer(tuning: Tuning) -> optax.GradientTransformation:
    """AdamW without its learning rate, which a step multiplies in; no clipping."""
    return optax.chain(
        optax.scale_by_adam(b1=tuning.beta1, b2=tuning.beta2),
        optax.add_decayed_weights(tuning.weight_decay, mask=decays),
    )


def moment_shardings(adamw: optax.GradientTransformation, moments: Any, params: Any, mesh: Any) -> Any:
    """Shardings of the optimizer's moments: those of their parameters; the rest is whole everywhere."""
    rest = replicated(mesh)
    return optax.tree.map_params(adamw, lambda _, s: s, moments, params, transform_non_params=lambda _: rest)


# --- any step -----------------------------------------------------------------------------------------------------


def build_step(
    table: Table,
    loss: Loss,
    tuning: Tuning,
    steps: int,
    mesh: Any,
    micro: Callable[[int, int], int],
    mixing: Mixing = lambda gradients, _: gradients,
) -> Step:
    """A jitted AdamW step on the weights of `table`.

    `steps` is the stage's length. Each step splits its batch [B, T] into micro(B, T) micro-batches and averages their
    gradients, which is the gradient of the whole batch as all hold as many tokens.
    """
    adamw = optimizer(tuning)
    param_shardings = shard_table(table, mesh)
    params = abstract_weights(table, param_shardings)
    moments = jax.eval_shape(adamw.init, params)
    whole = replicated(mesh)
    shardings = TrainState(param_shardings, moment_shardings(adamw, moments, param_shardings, mesh), whole)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        TrainState(params, moments, jax.ShapeDtypeStruct((), jnp.int32)),
        shardings,
    )

    def update(state: TrainState, batch: Batch, frozen: Params, peak: jax.Array) -> tuple[TrainState, Metrics]:
        metrics, gradients = accumulated(loss, state.params, batch, frozen, micro(*batch["tokens"].shape))
        lr = learning_rate(peak, state.step, steps, tuning.warmup)
        with jax.named_scope("optimizer"):
            changes, moments = adamw.update(mixing(gradients, frozen), state.moments, state.params)
            params = jax.tree.map(lambda p, c: p - lr * c, state.params, changes)
        metrics |= {"grad_norm": optax.tree.norm(gradients), "lr": lr}
        return TrainState(params, moments, state.step + 1), metrics

    fresh = jax.jit(adamw.init, out_shardings=shardings.moments)

    def start(values: Params) -> TrainState:
        mine = place(values, param_shardings)
        return TrainState(mine, fresh(mine), put(np.int32(0), whole))

    jitted = jax.jit(
        update,
        in_shardings=(shardings, batch_sharding(mesh), None, whole),
        out_shardings=(shardings, whole),
        donate_argnums=(0,),
    )
    return Step(jitted, start, shardings, abstract)


def accumulated(loss: Loss, params: Any, batch: Batch, frozen: Params, parts: int) -> tuple[Metrics, Any]:
    """Mean metrics (with `loss`) and gradients of a batch over `parts` micro-batches, one after the other.

    Micro-batch i takes rows i, i + parts, ...: every device keeps its own rows.
    """
    both = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        (value, metrics), gradients = both(params, batch, frozen)
        return {"loss": value, **metrics}, gradients
    split = jax.tree.map(lambda x: rearrange(x, "(b a) ... -> a b ...", a=parts), dict(batch))

    def add(carry: Any, each: Batch) -> tuple[Any, None]:
        (value, metrics), gradients = both(params, each, frozen)
        return jax.tree.map(jnp.add, carry, ({"loss": value, **metrics}, gradients)), None

    shapes = jax.eval_shape(lambda each: both(params, each, frozen), jax.tree.map(lambda x: x[0], split))
    (value, metrics), gradients = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    sums, _ = jax.lax.scan(add, ({"loss": value, **metrics}, gradients), split)
    return jax.tree.map(lambda x: x / parts, sums)


# --- expert tuning ------------------------------------------------------------------------------------------------


def plan_for(
    routes: Routes | None, mixture: MixtureConfig | None, tokens: jax.Array, domain: jax.Array | None
) -> RoutePlan | None:
    """The route plan of a batch: None for a dense model and for routes that layers find; one expert needs no routes."""
    if mixture is None or isinstance(routes, LayerwiseRoutes):
        return None
    if mixture.num_experts == 1:
        return plan_batch(jnp.zeros((*tokens.shape, 1), jnp.int32), 1)
    assert routes is not None, "a mixture of several experts needs routes"
    experts, weights = routes(tokens, domain)
    return plan_batch(experts, mixture.num_experts, weights if mixture.top_k > 1 else None)


def build_expert_step(
    model: ModelConfig, mixture: MixtureConfig | None, runtime: Runtime, stage: ExpertStage, tuning: Tuning, mesh: Any
) -> Step:
    """Next-token loss on every backbone weight, the router frozen. `mixture` None trains the dense model.

    `frozen`: `routes` (any `Routes`; absent for a dense model or one expert), `channels` (absent for a dense model),
    and when `stage.distill` is above 0 `teacher`, the dense model's parameters in the same layout, computed here.
    """
    network, dense = Llama(model, mixture, runtime), Llama(model, None, runtime)

    def loss(params: Any, batch: Batch, frozen: Params) -> tuple[jax.Array, Metrics]:
        tokens = batch["tokens"]
        plan = jax.lax.stop_gradient(plan_for(frozen.get("routes"), mixture, tokens, batch.get("domain")))
        channels = gated(frozen.get("channels"), frozen.get("routes"))
        hidden, _ = network.apply({"params": params}, tokens, plan, channels)
        teacher = None
        if stage.distill:
            known, _ = dense.apply({"params": frozen["teacher"]}, tokens)
            teacher = (jax.lax.stop_gradient(known), head_weight(frozen["teacher"]))
        targets = jnp.roll(tokens, -1, axis=1)
        weights = jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0)  # the last token has no next one
        return lm_loss(hidden, head_weight(params), targets, weights, teacher, stage.distill), {}

    def mixing(gradients: Any, frozen: Params) -> Any:
        if not stage.share or mixture is None or mixture.tied or mixture.num_experts == 1:
            return gradients
        return share_gradients(gradients, frozen["channels"], model.ffn_dim, stage.share)

    table = backbone_table(model, mixture, runtime.layout)
    return build_step(table, loss, tuning, stage.steps, mesh, lambda *_: stage.accumulate, mixing)


# --- router tuning ------------------------------------------------------------------------------------------------


def build_router_step(
    model: ModelConfig,
    mixture: MixtureConfig,
    router: RouterConfig,
    runtime: Runtime,
    stage: RouterStage,
    tuning: Tuning,
    mesh: Any,
) -> Step:
    """The router's objective of `stage`, the backbone frozen.

    `frozen`: `backbone` and `channels`, in the runtime's layout: the dense model for `overlap` and `released`, the
    mixture for `expert_loss`; absent for `domain` (a layerwise router needs the dense model for that too).
    """

    def objective(logits: jax.Array, batch: Batch, frozen: Params) -> jax.Array:
        tokens = batch["tokens"]
        if stage.objective == "domain":
            return distill.domain_loss(logits, batch["domain"])
        backbone, channels = jax.lax.stop_gradient((frozen["backbone"], frozen["channels"]))
        if stage.objective == "expert_loss":
            losses = distill.expert_losses(backbone, model, mixture, runtime, channels, tokens)
            return distill.expected_loss(logits, losses)
        if stage.objective == "released":
            score = distill.released_overlap
            return distill.released_loss(
                logits, distill.overlap_scores(backbone, model, runtime, channels, tokens, score)
            )
        scores = distill.overlap_scores(backbone, model, runtime, channels, tokens)
        return distill.eq4_loss(logits, scores, stage.temperature, stage.kl)

    def loss(params: Any, batch: Batch, frozen: Params) -> tuple[jax.Array, Metrics]:
        if router.kind == "layerwise":
            return layerwise_loss(params["gates"], batch, frozen, model, runtime, stage)
        logits, _ = Router(router).apply({"params": params}, batch["tokens"])
        switches = distill.switch_rate(logits)
        return objective(logits, batch, frozen) + stage.switch_price * switches, {"switch_rate": switches}

    ways = batch_ways(mesh)

    def micro(batch: int, length: int) -> int:
        rows = batch // ways
        return next(a for a in range(1, rows + 1) if rows % a == 0 and rows // a * length <= max(MICRO_TOKENS, length))

    return build_step(router_table(router), loss, tuning, stage.steps, mesh, micro)
