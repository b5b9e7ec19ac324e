"""Expert steps on one GPU, bf16 with float32 masters: `python benchmarks/gpu/training.py`.

SmolLM2-135M's shape at sequence 1024, random weights: seven experts of half the width that own their rows (sequences
of different experts in a batch), the dense slice of the same arithmetic, and the dense model. MFU: 6 FLOPs an active
weight and token and causal attention, over the bf16 matmul rate of the same run.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from _measure import matmul_rate
from _report import write_results

from readme_jax.checkpoints.known import shape_of
from readme_jax.config import ExpertStage, Mesh, MixtureConfig, Model, Tuning
from readme_jax.models.runtime import runtime_for
from readme_jax.models.sizes import TRAINING, forward_flops
from readme_jax.parallel.mesh import make_mesh, put_batch
from readme_jax.tuning.routes import DomainRoutes
from readme_jax.tuning.step import build_expert_step

SMOLLM2 = shape_of("smollm2-135m")
CASES = {"dense": None, "dense_slice": MixtureConfig(1, 768), "seven": MixtureConfig(7, 768)}


def tokens_per_second(mixture: MixtureConfig | None, batch: int, length: int, steps: int) -> float:
    """Of a chain of expert steps."""
    runtime = runtime_for(Model(compute_dtype="bfloat16"))
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        step = build_expert_step(SMOLLM2, mixture, runtime, ExpertStage(batch=batch), Tuning(), mesh)
        leaves, tree = jax.tree.flatten(step.abstract.params)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        values = [
            jnp.ones(x.shape) if x.ndim == 1 else 0.02 * jax.random.normal(k, x.shape)
            for k, x in zip(keys, leaves, strict=True)
        ]
        state = step.start(jax.tree.unflatten(tree, values))
        frozen: dict[str, Any] = {}
        if mixture is not None:
            frozen["channels"] = {f"layers_{i}": {} for i in range(SMOLLM2.num_layers)}
            frozen["routes"] = DomainRoutes(mixture.num_experts)
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, SMOLLM2.vocab_size, (batch, length), dtype=np.int32)
        domain = (np.arange(batch) % (mixture.num_experts if mixture else 1)).astype(np.int32)
        placed = put_batch({"tokens": tokens, "domain": domain}, mesh)
        rate = np.float32(1e-4)
        for n in (3, steps):
            began = time.perf_counter()
            for _ in range(n):
                state, metrics = step.update(state, placed, frozen, rate)
            jax.block_until_ready(metrics)
            took = time.perf_counter() - began
    return batch * length * steps / took


def main() -> None:
    """Measure and write results/gpu_training.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    peak, rows = matmul_rate(), []
    for case, mixture in CASES.items():
        speed = tokens_per_second(mixture, args.batch, args.length, args.steps)
        width = mixture.expert if mixture else SMOLLM2.ffn_dim
        row = {
            "case": case,
            "tokens_per_s": speed,
            "mfu": speed * TRAINING * forward_flops(SMOLLM2, width, args.length) / peak,
        }
        rows.append(row)
        print(row, flush=True)
    slice_speed = next(row["tokens_per_s"] for row in rows if row["case"] == "dense_slice")
    for row in rows:
        row["ratio"] = row["tokens_per_s"] / slice_speed
    write_results("gpu_training", batch=args.batch, length=args.length, matmul_rate=peak, rows=rows)


if __name__ == "__main__":
    main()
