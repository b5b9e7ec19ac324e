"""The training part of several.py: expert steps with weights spread over all devices, and a checkpoint of them."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from _measure import compiled, random_weights
from _model import EXPERTS, shape

from readme_jax.checkpoints.known import shape_of
from readme_jax.checkpoints.store import Store
from readme_jax.config import ExpertStage, Mesh, MixtureConfig, Model, ModelConfig, Tuning
from readme_jax.models.runtime import runtime_for
from readme_jax.parallel.mesh import make_mesh, put_batch
from readme_jax.tuning.routes import DomainRoutes
from readme_jax.tuning.step import Step, build_expert_step

STEPS, WARM = 8, 2
SEQUENCES = 2  # of a device


class Job:
    """An expert step on a mesh, with random weights drawn where they lie."""

    def __init__(self, config: ModelConfig, mesh: jax.sharding.Mesh, batch: int) -> None:
        self.config, self.mesh, self.batch = config, mesh, batch
        self.mixture = MixtureConfig(EXPERTS, config.ffn_dim // 2)
        runtime = runtime_for(Model(compute_dtype="bfloat16", layout="scanned"))  # quickly compiled
        with jax.set_mesh(mesh):
            stage = ExpertStage(batch=batch)
            self.step: Step = build_expert_step(config, self.mixture, runtime, stage, Tuning(), mesh)

    def state(self) -> Any:
        """A state to start from."""
        with jax.set_mesh(self.mesh):
            return self.step.start(random_weights(self.step.abstract.params, self.step.shardings.params))

    def run(self, length: int) -> tuple[float, float]:
        """Tokens a second, and bytes of a device's memory that a step needs."""
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, self.config.vocab_size, (self.batch, length), dtype=np.int32)
        domain = (np.arange(self.batch) % EXPERTS).astype(np.int32)
        frozen = {"channels": {"layers": {}}, "routes": DomainRoutes(EXPERTS)}
        rate = np.float32(1e-4)
        with jax.set_mesh(self.mesh):
            batch = put_batch({"tokens": tokens, "domain": domain}, self.mesh)
            arguments = (self.step.abstract, batch, frozen, rate)
            program = compiled(lambda: self.step.update.lower(*arguments), f"on {self.mesh.size}")
            state = self.state()
            for steps in (WARM, STEPS):
                began, losses = time.perf_counter(), []
                for _ in range(steps):
                    state, metrics = program(state, batch, frozen, rate)
                    losses.append(metrics["loss"])
                jax.block_until_ready((state, losses))
                took = time.perf_counter() - began
        if not np.isfinite(losses).all():
            raise SystemExit(f"losses on {self.mesh.size} devices: {[float(x) for x in losses]}")
        memory = program.memory_analysis()
        held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        return self.batch * length * steps / took, held + memory.output_size_in_bytes - memory.alias_size_in_bytes


def restored(config: ModelConfig, meshes: list[jax.sharding.Mesh]) -> dict[str, Any]:
    """Save a state of the first mesh, read it onto the second; whether it is the same to the last bit."""
    here, there = (Job(config, mesh, mesh.size) for mesh in meshes)
    state = here.state()
    with tempfile.TemporaryDirectory() as folder:
        store, began = Store(folder), time.perf_counter()
        store.save(0, state, {})
        store.wait()
        saved = time.perf_counter()
        back, _ = store.load(0, there.step.abstract)
        took = {"save_s": saved - began, "restore_s": time.perf_counter() - saved}
        store.close()
    same = [
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (state, back)), strict=True)
    ]
    return {"bytes": sum(x.nbytes for x in jax.tree.leaves(back)), "equal": all(same), **took}


def measure(args: argparse.Namespace, add: Callable[..., None]) -> None:
    """One device and all, each device as many sequences; then the checkpoint."""
    config = shape(2 if args.tiny else args.depth, args.tiny)
    length = 64 if args.tiny else 4096
    devices = jax.devices()
    meshes = [make_mesh(Mesh(), devices), make_mesh(Mesh(), devices[:1])]
    speeds: dict[int, float] = {}
    for mesh in reversed(meshes):
        batch = SEQUENCES * mesh.size
        speeds[mesh.size], memory = Job(config, mesh, batch).run(length)
        about = {"case": "expert step", "mesh": f"fsdp {mesh.size}", "depth": config.num_layers, "batch": batch}
        share = speeds[mesh.size] / (speeds[1] * mesh.size)
        add(**about, length=length, tokens_per_s=speeds[mesh.size], of_one_times_devices=share, memory_gb=memory / 1e9)
    saved = config if args.tiny else replace(shape_of("smollm2-135m"), num_layers=6)
    add(case="checkpoint", mesh=f"fsdp {len(devices)} to 1", depth=saved.num_layers, **restored(saved, meshes))
