"""Decode steps of Llama-2-7B's shape on one GPU, through the engine's own programs: `python benchmarks/gpu/decode.py`.

Random bf16 weights, seven experts of half the feed-forward width that own their rows, all resident. Rows stand at
position 900 of a cache of 1024 tokens. `dense` is the dense model through the same programs; `one` gives every row the
same expert; `seven` spreads rows over all. `over_limit` is the step over the time that its bytes (weights of the
experts present, attention, head, caches) take at the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from _report import write_results
from rich.console import Console
from rich.table import Table

from readme_jax.checkpoints.hf import Dense
from readme_jax.checkpoints.known import shape_of
from readme_jax.checkpoints.mixture import Mixture
from readme_jax.config import Mesh, MixtureConfig, Model, ModelConfig, RouterConfig
from readme_jax.models.router import start_router
from readme_jax.models.runtime import runtime_for
from readme_jax.parallel.mesh import make_mesh
from readme_jax.serving.buckets import Limits
from readme_jax.serving.programs import Programs
from readme_jax.serving.sampling import Samplings
from readme_jax.serving.store import ExpertStore

SHAPE = shape_of("meta-llama/Llama-2-7b-hf")
EXPERTS, LENGTH, POSITION, STEPS = 7, 1024, 900, 30


def random_tree(config: ModelConfig, experts: int) -> dict[str, Any]:
    """Unrolled parameters on the device, bf16; `experts` 0 is the dense model."""
    keys = iter(jax.random.split(jax.random.key(0), 100_000))
    draw = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    d, heads, kv = config.embed_dim, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def matrix(*shape: int) -> jax.Array:
        return draw(next(keys), shape)

    def ffn(width: int) -> dict[str, jax.Array]:
        return {"gate": matrix(width, d), "up": matrix(width, d), "down": matrix(d, width)}

    tree: dict[str, Any] = {"embed": matrix(config.vocab_size, d), "lm_head": matrix(config.vocab_size, d)}
    tree["final_norm"] = jnp.ones(d, jnp.bfloat16)
    for i in range(config.num_layers):
        own = {f"experts_{e}": ffn(config.ffn_dim // 2) for e in range(experts)} or {"ffn": ffn(config.ffn_dim)}
        attention = {"q": matrix(heads, d), "k": matrix(kv, d), "v": matrix(kv, d), "o": matrix(d, heads)}
        norms = {"attn_norm": jnp.ones(d, jnp.bfloat16), "ffn_norm": jnp.ones(d, jnp.bfloat16)}
        tree[f"layers_{i}"] = own | attention | norms
    return tree


def model_of(config: ModelConfig, experts: int) -> Dense | Mixture:
    """A dense model, or a mixture with a router of Table 1."""
    params = random_tree(config, experts)
    if not experts:
        return Dense(config, params, None)
    router = RouterConfig(config.vocab_size, experts)
    started = start_router(jax.random.key(1), router, params["embed"].astype(jnp.float32))
    return Mixture(config, MixtureConfig(experts, config.ffn_dim // 2), params, {}, router, started)


def copy_bandwidth() -> float:
    """Bytes a second read and written by a copy of 1 GiB."""
    x = jnp.ones(2**29, jnp.bfloat16)
    double = jax.jit(lambda x: x * 2)
    return 2 * x.nbytes / seconds_of(lambda: double(x), 20)


def seconds_of(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def decode(programs: Programs, rows: int, experts: np.ndarray, rounds: int = 5) -> float:
    """Seconds of a decode step of `rows` rows whose tokens run `experts` [rows], chained without a read in between."""
    present = sorted(set(experts.tolist())) if programs.shape.top_k else []
    weights, sampling = programs.store.present(present), Samplings.greedy(rows)
    state, active = programs.new_state(), np.ones(rows, bool)
    r, kx = programs.limits.rows, programs.shape.top_k
    routes = jnp.zeros((r, kx), jnp.int32).at[:rows].set(experts[:, None] if kx else 0)
    position = jnp.full(r, POSITION, jnp.int32)

    def run(state: Any, steps: int) -> Any:
        for _ in range(steps):
            state = replace(state, experts=jnp.copy(routes), position=jnp.copy(position))
            state, _ = programs.decode(state, active, present, weights, sampling)
        return jax.block_until_ready(state)

    state = run(state, 3)
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        state = run(state, STEPS)
        times.append((time.perf_counter() - began) / STEPS)
    return statistics.median(times)


def bytes_read(config: ModelConfig, rows: int, experts: int) -> int:
    """Bytes of a step: attention, head, caches up to the position, and the feed-forward weights present."""
    width = config.ffn_dim if experts == 0 else config.ffn_dim // 2 * experts
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = config.embed_dim * (2 * heads + 2 * kv + 3 * width) + 2 * rows * POSITION * kv
    return 2 * (config.num_layers * layer + config.vocab_size * config.embed_dim)


def measure(config: ModelConfig, sizes: list[int], rows: list[dict[str, Any]], bandwidth: float) -> None:
    """Append a row a case, as soon as it is known."""
    limits = Limits(max(sizes), LENGTH, chunks=(64,), decode=tuple(sizes), prompts=(LENGTH,), stretches=(LENGTH,))
    for experts in (0, EXPERTS):
        model = model_of(config, experts)
        store = ExpertStore(model, dtype=jnp.bfloat16)
        programs = Programs(model, store, limits, runtime_for(Model(compute_dtype="bfloat16")))
        cases = [("dense", b) for b in sizes] if not experts else [("one", b) for b in sizes] + [("seven", max(sizes))]
        for case, b in cases:
            chosen = np.arange(b) * EXPERTS // b if case == "seven" else np.zeros(b, np.int64)
            took = decode(programs, b, chosen)
            present = 0 if case == "dense" else len(set(chosen.tolist()))
            limit = bytes_read(config, b, present) / bandwidth
            dense = next((r["ms"] for r in rows if r["case"] == "dense" and r["batch"] == b), 1e3 * took)
            rows.append({"case": case, "batch": b, "experts_present": present, "ms": 1e3 * took})
            rows[-1] |= {"over_dense": 1e3 * took / dense, "over_limit": took / limit}
            print(json.dumps(rows[-1]), flush=True)
        del model, store, programs


def main() -> None:
    """Measure and write results/gpu_decode.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--layers", type=int, default=SHAPE.num_layers, help="fewer for a quick look")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        bandwidth = copy_bandwidth()
        measure(replace(SHAPE, num_layers=args.layers), sorted(args.batch), rows, bandwidth)
    title = "Decode, Llama-2-7B shape, bf16"
    table = Table("case", "batch", "ms a step", "over dense", "over bytes limit", title=title)
    for row in rows:
        figures = (f"{row[name]:.2f}" for name in ("ms", "over_dense", "over_limit"))
        table.add_row(row["case"], str(row["batch"]), *figures)
    Console().print(table)
    write_results("gpu_decode", layers=args.layers, copy_bandwidth=bandwidth, rows=rows)


if __name__ == "__main__":
    main()
