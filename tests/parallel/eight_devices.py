"""Run by test_sharding.py in a process of its own with 8 CPU devices: one step of each stage on several meshes.

Prints one JSON object: {case: {mesh: {loss, gradients (largest relative difference from one device), large (how many
parameters and moments are), replicated (those of them that are whole on every device), moved (arrays laid out otherwise
than the step declares)}}, start_router: largest difference of a router started on 8 devices}.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax import config
from readme_jax.config import ExpertStage, MixtureConfig, ModelConfig, RouterConfig, RouterStage, Tuning
from readme_jax.models.layout import to_layout
from readme_jax.models.router import start_router
from readme_jax.models.runtime import Runtime
from readme_jax.models.weights import Table, Weight, router_table
from readme_jax.parallel.mesh import SMALL, make_mesh, put_batch
from readme_jax.tuning.routes import DomainRoutes
from readme_jax.tuning.step import Step, backbone_table, build_expert_step, build_router_step, place, shard_table

BETA1 = 0.9
MODEL = ModelConfig(1024, 64, 1, 4, 4, 16, 2048)
ROUTER = RouterConfig(1024, 2, dim=64, num_heads=4, head_dim=16, mlp_dim=1024)
MESHES = {
    "fsdp 8": config.Mesh(),
    "data 2 x fsdp 4": config.Mesh(data=2, fsdp=4),
    "data 8": config.Mesh(data=8, fsdp=1),
    "fsdp 4 x tensor 2": config.Mesh(fsdp=4, tensor=2),
}
REQUIRED = ("fsdp 8", "data 2 x fsdp 4")
Case = tuple[Callable[[Any], Step], dict[str, Any], Callable[[Any], dict[str, Any]], int]


def values(table: Table, rng: np.random.Generator) -> dict[str, Any]:
    """Random weights of a table, biases too."""
    return {
        name: (rng.normal(w.start == "ones", 0.1, w.shape)).astype(np.float32)
        if isinstance(w, Weight)
        else values(w, rng)
        for name, w in table.items()
    }


def channels(rng: np.random.Generator) -> dict[str, Any]:
    """Slices of every layer, the last rows padding."""
    layers = {}
    for i in range(MODEL.num_layers):
        order = rng.permutation(MODEL.ffn_dim).astype(np.int32)
        picks = [np.sort(rng.choice(order[512:], 1024, replace=False)) for _ in range(2)]
        experts = np.stack(picks).astype(np.int32)
        experts[:, 1000:] = MODEL.ffn_dim
        layers[f"layers_{i}"] = {"permanent": np.sort(order[:512]), "experts": experts}
    return layers


def cases() -> dict[str, tuple[Case, tuple[str, ...]]]:
    """Name -> case (builder of the step on a mesh, starting parameters, what it only reads, sequences), meshes."""
    rng, tuning, rows = np.random.default_rng(0), Tuning(beta1=BETA1), channels(np.random.default_rng(1))
    dense_table = backbone_table(MODEL, None, "unrolled")
    dense, router = values(dense_table, rng), values(router_table(ROUTER), rng)
    routes = DomainRoutes(2)

    def expert(tied: bool, layout: config.Layout, accumulate: int = 1) -> Case:
        mixture = MixtureConfig(num_experts=2, expert=1024, permanent=512, tied=tied)
        start = dense if tied else values(backbone_table(MODEL, mixture, "unrolled"), rng)
        stage = ExpertStage(batch=8 * accumulate, accumulate=accumulate)
        return (
            lambda mesh: build_expert_step(MODEL, mixture, Runtime(layout=layout), stage, tuning, mesh),
            to_layout(start, layout),
            lambda mesh: {"routes": routes, "channels": jax.tree.map(jnp.asarray, to_layout(rows, layout))},
            8 * accumulate,
        )

    def route(objective: config.Objective) -> Case:
        mixture, stage = MixtureConfig(num_experts=2, expert=1024, permanent=512), RouterStage(objective, batch=8)
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
        "experts, scanned, accumulated": (expert(tied=False, layout="scanned", accumulate=2), REQUIRED[1:]),
        "tied experts": (expert(tied=True, layout="unrolled"), REQUIRED),
        "router, Eq. 4": (route("overlap"), REQUIRED),
        "router, domain labels": (route("domain"), ("data 2 x fsdp 4", "fsdp 4 x tensor 2")),
    }


def one_step(case: Case, mesh: jax.sharding.Mesh) -> tuple[float, Any, Any, Step]:
    """Loss, gradients (from the first moments of a first step: m = (1 - beta1) g), new state and the step."""
    build, start, frozen, rows = case
    rng = np.random.default_rng(2)
    batch = {
        "tokens": rng.integers(0, MODEL.vocab_size, (rows, 4)).astype(np.int32),
        "domain": rng.integers(0, 2, rows).astype(np.int32),
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
    loss, gradients, _, _ = one_step(case, make_mesh(config.Mesh(), jax.devices()[:1]))
    report = {}
    for name in meshes:
        got, got_gradients, state, step = one_step(case, make_mesh(MESHES[name]))
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


def main() -> None:
    jax.config.update("jax_disable_most_optimizations", True)  # compile faster
    report: dict[str, Any] = {name: compare(case, meshes) for name, (case, meshes) in cases().items()}
    print(json.dumps(report | {"start_router": routers_differ()}))


if __name__ == "__main__":
    main()
