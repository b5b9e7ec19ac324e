"""Run by test_sharding.py in a process of its own with 8 CPU devices: one step of each stage on several meshes.

Prints one JSON object: {case: {mesh: {loss, gradients (largest relative difference from one device), large (how many
parameters and moments are), replicated (those of them that are whole on every device), moved (arrays laid out otherwise
than the step declares)}}, start_router: largest difference of a router started on 8 devices, measured: {mesh: largest
difference of calibration's statistics and of token losses from one device}, generated: {mesh: whether greedy tokens are
those of one device}}.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax import config
from readme_jax.checkpoints.mixture import Mixture
from readme_jax.config import ExpertStage, MixtureConfig, ModelConfig, RouterConfig, RouterStage, Tuning
from readme_jax.evaluation.perplexity import Evaluator
from readme_jax.generate import Generator
from readme_jax.models.layout import to_layout
from readme_jax.models.router import start_router
from readme_jax.models.runtime import Runtime
from readme_jax.models.weights import Table, Weight, router_table
from readme_jax.parallel.mesh import SMALL, make_mesh, put_batch
from readme_jax.refactor.calibrate import channel_statistics
from readme_jax.tuning.routes import DomainRoutes
from readme_jax.tuning.step import Step, backbone_table, build_expert_step, build_router_step, place, shard_table

BETA1 = 0.9
EXPERTS, OWN, PERMANENT = 7, 1280, 640
MODEL = ModelConfig(1280, 56, 1, 4, 4, 16, 2560)  # a width that 7 and 8 divide, weights above mesh.SMALL
ROUTER = RouterConfig(1280, EXPERTS, dim=56, num_heads=4, head_dim=16, mlp_dim=1280)
MESHES = {
    "fsdp 8": config.Mesh(),
    "data 2 x fsdp 4": config.Mesh(data=2, fsdp=4),
    "data 8": config.Mesh(data=8, fsdp=1),
    "fsdp 4 x tensor 2": config.Mesh(fsdp=4, tensor=2),
    "expert 7": config.Mesh(fsdp=1, expert=7),
    "data 2 x expert 2 x tensor 2": config.Mesh(data=2, fsdp=1, expert=2, tensor=2),  # 4 and 3 experts
}
Case = tuple[Callable[[Any], Step], dict[str, Any], Callable[[Any], dict[str, Any]], int]


def values(table: Table, rng: np.random.Generator) -> dict[str, Any]:
    """Random weights of a table, biases too."""
    return {
        name: (rng.normal(w.start == "ones", 0.1, w.shape)).astype(np.float32)
        if isinstance(w, Weight)
        else values(w, rng)
        for name, w in table.items()
    }


def channels(rng: np.random.Generator, model: ModelConfig, mixture: MixtureConfig) -> dict[str, Any]:
    """Slices of every layer, the last row of each expert padding."""
    layers = {}
    for i in range(model.num_layers):
        order = rng.permutation(model.ffn_dim).astype(np.int32)
        own = [np.sort(rng.choice(order[mixture.permanent :], mixture.expert, replace=False)) for _ in range(EXPERTS)]
        experts = np.stack(own).astype(np.int32)
        experts[:, -1] = model.ffn_dim
        layers[f"layers_{i}"] = {"permanent": np.sort(order[: mixture.permanent]), "experts": experts}
    return layers


def cases() -> dict[str, tuple[Case, tuple[str, ...]]]:
    """Name -> case (builder of the step on a mesh, starting parameters, what it only reads, sequences), meshes."""
    rng, tuning = np.random.default_rng(0), Tuning(beta1=BETA1)
    rows = channels(np.random.default_rng(1), MODEL, MixtureConfig(EXPERTS, OWN, PERMANENT))
    dense_table = backbone_table(MODEL, None, "unrolled")
    dense, router = values(dense_table, rng), values(router_table(ROUTER), rng)
    routes = DomainRoutes(EXPERTS)

    def expert(tied: bool, layout: config.Layout, accumulate: int = 1) -> Case:
        mixture = MixtureConfig(EXPERTS, OWN, PERMANENT, tied)
        start = dense if tied else values(backbone_table(MODEL, mixture, "unrolled"), rng)
        stage = ExpertStage(batch=8 * accumulate, accumulate=accumulate)
        return (
            lambda mesh: build_expert_step(MODEL, mixture, Runtime(layout=layout), stage, tuning, mesh),
            to_layout(start, layout),
            lambda mesh: {"routes": routes, "channels": jax.tree.map(jnp.asarray, to_layout(rows, layout))},
            8 * accumulate,
        )

    def route(objective: config.Objective) -> Case:
        mixture, stage = MixtureConfig(EXPERTS, OWN, PERMANENT), RouterStage(objective, batch=8)
        return (
            lambda mesh: build_router_step(MODEL, mixture, ROUTER, Runtime(), stage, tuning, mesh),
            router,
            lambda mesh: (
                {}
                if objective == "domain"
                else {
                    "backbone": place(dense, shard_table(dense_table, mesh)),
                    "channels": jax.tree.map(jnp.asarray, rows),
                }
            ),
            8,
        )

    return {
        "experts": (expert(tied=False, layout="unrolled"), tuple(MESHES)),
        "experts, scanned, accumulated": (
            expert(tied=False, layout="scanned", accumulate=2),
            ("data 2 x fsdp 4", "data 2 x expert 2 x tensor 2"),
        ),
        "tied experts": (expert(tied=True, layout="unrolled"), tuple(MESHES)),
        "router, Eq. 4": (route("overlap"), tuple(MESHES)),
        "router, domain labels": (route("domain"), ("data 2 x fsdp 4", "fsdp 4 x tensor 2")),
    }


def mesh_of(name: str) -> jax.sharding.Mesh:
    return make_mesh(MESHES[name], jax.devices()[:7] if name == "expert 7" else None)


def one_step(case: Case, mesh: jax.sharding.Mesh, sevens: bool) -> tuple[float, Any, Any, Step]:
    """Loss, gradients (from the first moments of a first step: m = (1 - beta1) g), new state and the step."""
    build, start, frozen, rows = case
    rng = np.random.default_rng(2)
    rows = 7 if sevens else rows
    batch = {
        "tokens": rng.integers(0, MODEL.vocab_size, (rows, 4)).astype(np.int32),
        "domain": rng.permutation(np.arange(rows) % EXPERTS).astype(np.int32),
    }
    with jax.set_mesh(mesh):
        step = build(mesh)
        state, metrics = step.update(step.start(start), put_batch(batch, mesh), frozen(mesh), 1e-3)
        gradients = jax.tree.map(lambda m: np.asarray(m) / (1 - BETA1), state.moments[0].mu)
        return float(metrics["loss"]), gradients, state, step


def difference(got: Any, want: Any) -> float:
    """Largest difference relative to each tensor's largest entry, over a tree."""
    each = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), got, want)
    return float(max(jax.tree.leaves(each)))


def compare(case: Case, meshes: tuple[str, ...]) -> dict[str, Any]:
    one, report = make_mesh(config.Mesh(), jax.devices()[:1]), {}
    wanted_by = {sevens: one_step(case, one, sevens)[:2] for sevens in {name == "expert 7" for name in meshes}}
    for name in meshes:
        loss, gradients = wanted_by[name == "expert 7"]
        got, got_gradients, state, step = one_step(case, mesh_of(name), name == "expert 7")
        named = jax.tree_util.tree_leaves_with_path((state.params, state.moments))
        wanted = jax.tree.leaves((step.shardings.params, step.shardings.moments))
        report[name] = {
            "loss": abs(got - loss) / loss,
            "gradients": difference(got_gradients, gradients),
            "large": sum(x.size >= SMALL for _, x in named),
            "replicated": [
                jax.tree_util.keystr(p) for p, x in named if x.size >= SMALL and x.sharding.is_fully_replicated
            ],
            "moved": [
                jax.tree_util.keystr(p)
                for (p, x), s in zip(named, wanted, strict=True)
                if not x.sharding.is_equivalent_to(s, x.ndim)
            ],
        }
    return report


def routers_differ() -> float:
    """Largest difference between routers started on 8 devices and on one."""
    started = []
    for mesh in (make_mesh(config.Mesh()), make_mesh(config.Mesh(), jax.devices()[:1])):
        with jax.set_mesh(mesh):
            router = start_router(jax.random.key(0), ROUTER, np.ones((ROUTER.vocab_size, 32), np.float32))
            started.append(jax.tree.map(np.asarray, router))
    return float(max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), *started))))


def measured() -> dict[str, float]:
    """Largest difference from one device of what calibration sees and of token losses, by mesh."""
    rng, mixture = np.random.default_rng(4), MixtureConfig(EXPERTS, OWN, PERMANENT)
    tables = [backbone_table(MODEL, shape, "unrolled") for shape in (None, mixture)]
    trees = [values(table, rng) for table in tables]
    tokens = rng.integers(0, MODEL.vocab_size, (8, 6)).astype(np.int32)

    def figures(mesh: jax.sharding.Mesh) -> dict[str, np.ndarray]:
        with jax.set_mesh(mesh):
            dense, sliced = (place(tree, shard_table(t, mesh)) for tree, t in zip(trees, tables, strict=True))
            seen = channel_statistics(dense, MODEL, Runtime(), tokens, 4)
        evaluator = Evaluator(MODEL, mixture, Runtime(), mesh)
        losses = evaluator.losses(sliced, tokens, DomainRoutes(EXPERTS), domain=np.arange(8) % EXPERTS)
        return {**seen._asdict(), "nats": losses.nats}

    want = figures(make_mesh(config.Mesh(), jax.devices()[:1]))
    return {name: difference(figures(mesh_of(name)), want) for name in MESHES}


def generated() -> dict[str, bool]:
    """Whether a tiny mixture's greedy tokens on each mesh are those of one device."""
    rng = np.random.default_rng(3)
    shape, mixture = ModelConfig(64, 24, 2, 4, 2, 8, 40), MixtureConfig(EXPERTS, 12, 8)
    router = RouterConfig(64, EXPERTS, dim=16, num_heads=2, head_dim=8, mlp_dim=16)
    tables = backbone_table(shape, mixture, "unrolled"), router_table(router)
    params, routes = (jax.tree.map(lambda w: 3 * w, values(t, rng)) for t in tables)
    model = Mixture(shape, mixture, params, channels(rng, shape, mixture), router, routes, None, {})
    prompts = [rng.integers(0, 64, n % 5 + 3).tolist() for n in range(56)]

    def tokens(mesh: jax.sharding.Mesh) -> list[list[int]]:
        return Generator(model, mesh=mesh).generate(prompts, 8).tokens

    want = tokens(make_mesh(config.Mesh(), jax.devices()[:1]))
    assert len({tuple(t) for t in want}) > 20
    return {name: tokens(mesh_of(name)) == want for name in MESHES}


def main() -> None:
    jax.config.update("jax_disable_most_optimizations", True)  # compile faster
    report: dict[str, Any] = {name: compare(case, meshes) for name, (case, meshes) in cases().items()}
    report |= {"start_router": routers_differ(), "measured": measured(), "generated": generated()}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
