"""Training steps on one GPU, bf16 with float32 masters: `python benchmarks/gpu/training.py`.

SmolLM2-135M's shape at sequence 1024, random weights: seven experts of half the width that own their rows (sequences
of different experts in a batch), the dense slice of the same arithmetic, and the dense model. MFU: 6 FLOPs an active
weight and token and causal attention, over the bf16 matmul rate of the same run. Layers scanned, then unrolled, which
compiles for longer.

`router_domain` and `router_overlap` are the step of Table 1's router by the text's domain and by Eq. 4, which runs the
dense model forward: the latter also over one such forward pass, its head left out, as Eq. 4 needs none.

`--torch` adds PyTorch's steps of `seven`, the dense masked way, and of `dense`, in a process of its own that runs after
ours (_torch_training.py): `ratio` is our tokens a second, of a layout, over theirs.

`--profile` adds where a step's time goes: kernels by part of the model, forward and backward together, and the longest
of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # PyTorch's process takes the rest

import jax
import numpy as np
from _measure import Row, Rows, compiled, matmul_rate, merge, random_weights, seconds_in_a_row
from _profile import device_seconds, scopes

from readme_jax.checkpoints.known import shape_of
from readme_jax.config import (
    ExpertStage,
    Layout,
    Mesh,
    MixtureConfig,
    Model,
    ModelConfig,
    Objective,
    Router,
    RouterStage,
    Tuning,
)
from readme_jax.models.llama import Llama
from readme_jax.models.router import config_for
from readme_jax.models.runtime import Runtime, runtime_for
from readme_jax.models.sizes import TRAINING, forward_flops
from readme_jax.parallel.mesh import make_mesh, put_batch
from readme_jax.tuning.routes import DomainRoutes
from readme_jax.tuning.step import (
    Step,
    abstract_weights,
    backbone_table,
    build_expert_step,
    build_router_step,
    shard_table,
)

SMOLLM2 = shape_of("smollm2-135m")
SEVEN = MixtureConfig(7, 768)
BACKBONES = {"dense_slice": MixtureConfig(1, 768), "seven": SEVEN, "dense": None}
ROUTERS: dict[str, Objective] = {"router_domain": "domain", "router_overlap": "overlap"}
CASES = (*BACKBONES, *ROUTERS)
MAIN = "gpu_training"
PEERS = {"dense": "torch_dense", "seven": "torch_masked"}
MODES = ("eager", "layers", "whole")
SCOPES = ("attention", "feed_forward", "loss", "optimizer")
PEAK = np.float32(1e-4)


def expert_step(c: ModelConfig, name: str, runtime: Runtime, batch: int, mesh: Any) -> tuple[Step, dict[str, Any]]:
    """A step of a backbone, and what it reads and does not train."""
    mixture = BACKBONES[name]
    step = build_expert_step(c, mixture, runtime, ExpertStage(batch=batch), Tuning(), mesh)
    if mixture is None:
        return step, {}
    channels: dict[str, Any] = {layer: {} for layer in layers_of(c, runtime.layout)}
    return step, {"channels": channels, "routes": DomainRoutes(mixture.num_experts)}


def router_step(c: ModelConfig, name: str, runtime: Runtime, batch: int, mesh: Any) -> tuple[Step, dict[str, Any]]:
    """A step of the router, and what it reads and does not train."""
    stage, router = RouterStage(objective=ROUTERS[name], batch=batch), config_for(Router(), c, SEVEN.num_experts)
    step = build_router_step(c, SEVEN, router, runtime, stage, Tuning(), mesh)
    if stage.objective == "domain":
        return step, {}
    table = backbone_table(c, None, runtime.layout)
    shardings = shard_table(table, mesh)
    own = np.random.default_rng(1).random((c.num_layers, SEVEN.num_experts, c.ffn_dim)).argsort(axis=-1)
    rows = own[..., : SEVEN.expert].astype(np.int32)  # which ones does not change what a step costs
    each = [rows] if runtime.layout == "scanned" else list(rows)
    channels = {layer: {"experts": r} for layer, r in zip(layers_of(c, runtime.layout), each, strict=True)}
    return step, {"backbone": random_weights(abstract_weights(table, shardings), shardings), "channels": channels}


def layers_of(c: ModelConfig, layout: Layout) -> list[str]:
    """Names of layers in a tree of weights."""
    return ["layers"] if layout == "scanned" else [f"layers_{i}" for i in range(c.num_layers)]


class Case:
    """A compiled training step of random weights and one batch."""

    def __init__(self, c: ModelConfig, name: str, layout: Layout, batch: int, length: int, mesh: Any) -> None:
        runtime = runtime_for(Model(compute_dtype="bfloat16", layout=layout))
        build = router_step if name in ROUTERS else expert_step
        with jax.set_mesh(mesh):
            self.step, self.frozen = build(c, name, runtime, batch, mesh)
            tokens = np.random.default_rng(0).integers(0, c.vocab_size, (batch, length), dtype=np.int32)
            domain = (np.arange(batch) % SEVEN.num_experts).astype(np.int32)
            self.batch = put_batch({"tokens": tokens, "domain": domain}, mesh)
            arguments = (self.step.abstract, self.batch, self.frozen, PEAK)
            self.program = compiled(lambda: self.step.update.lower(*arguments), f"{layout} {name}")
            if "backbone" in self.frozen:
                forward = jax.jit(lambda params, tokens: Llama(c, None, runtime).apply({"params": params}, tokens)[0])
                dense = (self.frozen["backbone"], self.batch["tokens"])
                self.forward = compiled(lambda: forward.lower(*dense), f"{layout} dense forward")

    def start(self) -> None:
        """Random weights on the device."""
        self.state = self.step.start(random_weights(self.step.abstract.params, self.step.shardings.params))

    def run(self, steps: int) -> Any:
        """A chain of steps, waited for."""
        for _ in range(steps):
            self.state, metrics = self.program(self.state, self.batch, self.frozen, PEAK)
        return jax.block_until_ready(metrics)

    def seconds(self, steps: int) -> float:
        """Of a step."""
        self.run(3)
        times = []
        for _ in range(3):
            began = time.perf_counter()
            self.run(steps)
            times.append((time.perf_counter() - began) / steps)
        return statistics.median(times)

    def forward_seconds(self) -> float:
        """Of the dense model's forward pass over the batch."""
        return seconds_in_a_row(lambda: self.forward(self.frozen["backbone"], self.batch["tokens"]), least=0.3)


def profile(results: Rows, about: Mapping[str, Any], case: Case, steps: int = 3) -> None:
    """Milliseconds of a step's kernels by scope, and the longest kernels."""
    scope, kernels = device_seconds(lambda: case.run(steps), scopes(case.program, SCOPES))
    ms = {f"{part}_ms": 1e3 * scope[part] / steps for part in (*SCOPES, "rest", "unknown")}
    top = {kernel[:70]: round(1e3 * seconds / steps, 3) for kernel, seconds in kernels.most_common(25)}
    results.add(**about, **ms, busy_ms=1e3 * scope.total() / steps, kernels=top)


def measure(results: Rows, details: Rows, layout: Layout, args: argparse.Namespace, mesh: Any) -> dict[str, float]:
    """A row a case, all of one layout; returns tokens a second."""
    c, speeds = replace(SMOLLM2, num_layers=args.layers), dict[str, float]()
    with ThreadPoolExecutor(len(args.cases)) as pool:
        cases = list(pool.map(lambda name: Case(c, name, layout, args.batch, args.length, mesh), args.cases))
    with jax.set_mesh(mesh):
        for name, case in zip(args.cases, cases, strict=True):
            case.start()
            took = case.seconds(args.steps)
            speeds[name] = speed = args.batch * args.length / took
            more: dict[str, float] = {}
            if name in BACKBONES:
                mixture = BACKBONES[name]
                flops = forward_flops(c, mixture.expert if mixture else c.ffn_dim, args.length)
                more["mfu"] = speed * TRAINING * flops / results.about["matmul_rate"]
                more |= {"ratio": speed / speeds["dense_slice"]} if "dense_slice" in speeds else {}
            elif "backbone" in case.frozen:
                forward = case.forward_seconds()
                more |= {"over_dense_forward": took / forward, "dense_forward_ms": 1e3 * forward}
            temp = case.program.memory_analysis().temp_size_in_bytes / 2**30
            about = {"layout": layout, "case": name}
            results.add(**about, tokens_per_s=speed, **more, ms=1e3 * took, temp_gb=temp)
            if args.profile:
                profile(details, about, case)
            del case.state
    return speeds


def against_torch(results: Rows, args: argparse.Namespace, speeds: Mapping[str, Mapping[str, float]]) -> None:
    """A row a case and layout of ours, as PyTorch's process answers; one with `error` where it does not."""
    c, cases = replace(SMOLLM2, num_layers=args.layers), [name for name in PEERS if name in args.cases]
    ask = {**asdict(c), "experts": SEVEN.num_experts, "expert": SEVEN.expert}
    ask |= {"batch": args.batch, "length": args.length, "steps": args.steps, "cases": cases, "modes": args.modes}
    command = [sys.executable, str(Path(__file__).parent / "_torch_training.py"), json.dumps(ask)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            found = json.loads(line)
            name = found.pop("case")
            cases.remove(name)
            about = {"case": name, "peer": PEERS[name]}
            if "error" in found:
                results.add(**about, **found)
                continue
            theirs = 1e3 * args.batch * args.length / found["ms"]
            for layout, ours in speeds.items():
                results.add(layout=layout, **about, tokens_per_s=theirs, ratio=ours[name] / theirs, **found)
    for name in cases:
        results.add(case=name, peer=PEERS[name], error=f"the process ended with {process.returncode}")


def key_of(row: Row) -> tuple[str, ...]:
    """What a row is of."""
    return tuple(row.get(name, "") for name in ("layout", "case", "peer"))


def main() -> None:
    """Measure and write results/gpu_training.json (and gpu_training_profile.json)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--layouts", nargs="+", default=["scanned", "unrolled"], choices=("scanned", "unrolled"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=SMOLLM2.num_layers, help="fewer for a quick look")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--torch", action="store_true", help="PyTorch's steps as peers, in a process of its own")
    parser.add_argument("--modes", nargs="+", default=["eager", "layers"], choices=MODES, help="how PyTorch runs them")
    parser.add_argument("--name", default=MAIN, help="of the results, where not the main ones")
    parser.add_argument("--merge", nargs="+", metavar="NAME", help="add the rows of these results to the main ones")
    args = parser.parse_args()
    if args.merge:
        merge(MAIN, args.merge, key_of)
        return
    results = Rows(args.name, batch=args.batch, length=args.length)
    details = Rows("gpu_training_profile", batch=args.batch, length=args.length)
    results.tell(matmul_rate=matmul_rate(8192 if jax.default_backend() == "gpu" else 512))
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    speeds = {layout: measure(results, details, layout, args, mesh) for layout in args.layouts}
    if args.torch and any(name in PEERS for name in args.cases):
        gc.collect()
        against_torch(results, args, speeds)


if __name__ == "__main__":
    main()
