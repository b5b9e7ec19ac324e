"""Prefill of Llama-2-7B's shape on one GPU, through the engine's own programs: `python benchmarks/gpu/prefill.py`.

Random bf16 weights; a prompt's tokens spread over seven experts in runs, or all of one. MFU counts what a token
activates, two FLOPs a weight (attention and one expert) and causal attention, over the matmul rate of the same run.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from _report import write_results
from decode import EXPERTS, SHAPE, model_of, seconds_of

from readme_jax.config import Mesh, Model
from readme_jax.models.runtime import runtime_for
from readme_jax.models.sizes import forward_flops
from readme_jax.parallel.mesh import make_mesh
from readme_jax.serving.buckets import Limits
from readme_jax.serving.programs import Programs
from readme_jax.serving.store import ExpertStore


def matmul_rate() -> float:
    """FLOPs a second of a bf16 matmul of 8192^3."""
    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    multiply = jax.jit(lambda a: a @ a)
    return 2 * 8192**3 / seconds_of(lambda: multiply(a), 10)


def prefill(programs: Programs, tokens: int, routes: np.ndarray) -> float:
    """Seconds of a prompt's prefill in one call."""
    prompt = np.arange(tokens) % 1000
    present = sorted(set(routes[:, 0].tolist())) if routes.size else []
    weights = programs.store.present(present)
    ones = np.ones(routes.shape, np.float32)
    state = programs.new_state()

    def once(state: Any) -> Any:
        state, sampled, _ = programs.prefill(state, 0, prompt, 0, routes, ones, present, weights, last=True)
        jax.block_until_ready(sampled)
        return state

    state, times = once(once(state)), []
    for _ in range(5):
        began = time.perf_counter()
        state = once(state)
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def main() -> None:
    """Measure and write results/gpu_prefill.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--layers", type=int, default=8, help="of the 32; time grows with them alone")
    args = parser.parse_args()
    config = replace(SHAPE, num_layers=args.layers, max_position=max(args.tokens))
    rows: list[dict[str, Any]] = []
    runtime = replace(runtime_for(Model(compute_dtype="bfloat16")), layout="unrolled")
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        rate = matmul_rate()
        for experts in (0, EXPERTS):
            model = model_of(config, experts)
            store = ExpertStore(model, dtype=jnp.bfloat16)
            sizes = tuple(sorted(args.tokens))
            width = config.ffn_dim // 2 if experts else config.ffn_dim
            programs = Programs(model, store, Limits(1, sizes[-1], chunks=sizes, prompts=(sizes[-1],)), runtime)
            for tokens in sizes:
                for case in ("one", "seven") if experts else ("dense",):
                    routes = np.arange(tokens)[:, None] * (EXPERTS if case == "seven" else 1) // tokens
                    took = prefill(programs, tokens, routes[:, : programs.shape.top_k])
                    row = {"case": case, "tokens": tokens, "ms": 1e3 * took}
                    rows.append(row | {"mfu": tokens * forward_flops(config, width, tokens, head=False) / took / rate})
                    print(rows[-1], flush=True)
            del model, store, programs
    write_results("gpu_prefill", layers=args.layers, matmul_rate=rate, rows=rows)


if __name__ == "__main__":
    main()
