"""Expert steps on one GPU, bf16 with float32 masters: `python benchmarks/gpu/training.py`.

SmolLM2-135M's shape at sequence 1024, random weights: seven experts of half the width that own their rows (sequences
of different experts in a batch), the dense slice of the same arithmetic, and the dense model. MFU: 6 FLOPs an active
weight and token and causal attention, over the bf16 matmul rate of the same run. Layers scanned, then unrolled, which
compiles for longer. `--profile` adds where a step's time goes: kernels by part of the model, forward and backward
together, and the longest of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from _measure import Rows, compiled, matmul_rate, random_weights
from _profile import device_seconds, scopes

from readme_jax.checkpoints.known import shape_of
from readme_jax.config import ExpertStage, Layout, Mesh, MixtureConfig, Model, ModelConfig, Tuning
from readme_jax.models.runtime import runtime_for
from readme_jax.models.sizes import TRAINING, forward_flops
from readme_jax.parallel.mesh import make_mesh, put_batch
from readme_jax.tuning.routes import DomainRoutes
from readme_jax.tuning.step import build_expert_step

SMOLLM2 = shape_of("smollm2-135m")
CASES = {"dense_slice": MixtureConfig(1, 768), "seven": MixtureConfig(7, 768), "dense": None}
SCOPES = ("attention", "feed_forward", "loss", "optimizer")
PEAK = np.float32(1e-4)


class Case:
    """A compiled expert step of random weights and one batch."""

    def __init__(self, c: ModelConfig, name: str, layout: Layout, batch: int, length: int, mesh: Any) -> None:
        mixture, runtime = CASES[name], runtime_for(Model(compute_dtype="bfloat16", layout=layout))
        with jax.set_mesh(mesh):
            step = build_expert_step(c, mixture, runtime, ExpertStage(batch=batch), Tuning(), mesh)
            self.frozen: dict[str, Any] = {}
            if mixture is not None:
                layers = ["layers"] if layout == "scanned" else [f"layers_{i}" for i in range(c.num_layers)]
                self.frozen["channels"] = {layer: {} for layer in layers}
                self.frozen["routes"] = DomainRoutes(mixture.num_experts)
            tokens = np.random.default_rng(0).integers(0, c.vocab_size, (batch, length), dtype=np.int32)
            domain = (np.arange(batch) % (mixture.num_experts if mixture else 1)).astype(np.int32)
            self.batch = put_batch({"tokens": tokens, "domain": domain}, mesh)
            arguments = (step.abstract, self.batch, self.frozen, PEAK)
            self.program = compiled(lambda: step.update.lower(*arguments), f"{layout} {name}")
        self.step = step

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


def profile(results: Rows, about: Mapping[str, Any], case: Case, steps: int = 3) -> None:
    """Milliseconds of a step's kernels by scope, and the longest kernels."""
    scope, kernels = device_seconds(lambda: case.run(steps), scopes(case.program, SCOPES))
    ms = {f"{part}_ms": 1e3 * scope[part] / steps for part in (*SCOPES, "rest", "unknown")}
    top = {kernel[:70]: round(1e3 * seconds / steps, 3) for kernel, seconds in kernels.most_common(25)}
    results.add(**about, **ms, busy_ms=1e3 * scope.total() / steps, kernels=top)


def measure(results: Rows, details: Rows, layout: Layout, args: argparse.Namespace, mesh: Any) -> None:
    """A row a case, all of one layout."""
    base, c = 0.0, replace(SMOLLM2, num_layers=args.layers)
    with ThreadPoolExecutor(len(args.cases)) as pool:
        cases = list(pool.map(lambda name: Case(c, name, layout, args.batch, args.length, mesh), args.cases))
    with jax.set_mesh(mesh):
        for name, case in zip(args.cases, cases, strict=True):
            case.start()
            took, mixture = case.seconds(args.steps), CASES[name]
            speed = args.batch * args.length / took
            base = speed if name == "dense_slice" else base
            width = mixture.expert if mixture else SMOLLM2.ffn_dim
            mfu = speed * TRAINING * forward_flops(c, width, args.length) / results.about["matmul_rate"]
            ratio = {"ratio": speed / base} if base else {}
            temp = case.program.memory_analysis().temp_size_in_bytes / 2**30
            about = {"layout": layout, "case": name}
            results.add(**about, tokens_per_s=speed, mfu=mfu, **ratio, ms=1e3 * took, temp_gb=temp)
            if args.profile:
                profile(details, about, case)
            del case.state


def main() -> None:
    """Measure and write results/gpu_training.json (and gpu_training_profile.json)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--layouts", nargs="+", default=["scanned", "unrolled"], choices=("scanned", "unrolled"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=SMOLLM2.num_layers, help="fewer for a quick look")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    results = Rows("gpu_training", batch=args.batch, length=args.length)
    details = Rows("gpu_training_profile", batch=args.batch, length=args.length)
    results.tell(matmul_rate=matmul_rate())
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    for layout in args.layouts:
        measure(results, details, layout, args, mesh)


if __name__ == "__main__":
    main()
