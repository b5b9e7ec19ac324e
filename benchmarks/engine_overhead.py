"""What the engine costs outside jitted calls: `python benchmarks/engine_overhead.py`.

SmolLM2 in float32 on CPU, its feed-forward layers sliced into seven experts of half width (weights do not matter for
speed), all resident, 64 requests decoding; then with 256 more in the queue. Sampling is greedy, text is detokenised.
The rest of a step is scheduling, pages, detokenising and events: the loop's own count of seconds in calls, and in
waiting for what they return, is taken off.

Writes results/engine_overhead.json: rows {running, queued, step_ms, outside_ms, share}, medians over steps.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import numpy as np
from _report import write_results
from rich.console import Console
from serving_cpu import sliced

from readme_jax import config
from readme_jax.checkpoints.hf import EMBEDDED, load_dense
from readme_jax.parallel.mesh import make_mesh
from readme_jax.serving.engine import Engine
from readme_jax.serving.request import Request, SamplingParams

RUNNING, QUEUED, PROMPT = 64, 256, 12


def ask(engine: Engine, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for tokens in rng.integers(100, 40000, (count, PROMPT)).tolist():
        engine.submit(Request(tokens, SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)))


def measured(engine: Engine, steps: int) -> dict[str, Any]:
    """Medians over steps in which nothing but decoding happens."""
    counters, whole, outside = engine._loop.counters, [], []
    for _ in range(steps):
        stepping, calling = counters.stepping, counters.calling
        engine.step()
        whole.append(counters.stepping - stepping)
        outside.append(whole[-1] - (counters.calling - calling))
    stats = engine.stats()
    step, rest = float(np.median(whole)), float(np.median(outside))
    figures = {"step_ms": step * 1e3, "outside_ms": rest * 1e3, "share": rest / step}
    return {"running": stats.running, "queued": stats.waiting, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--scheduler", default="lookahead")
    args = parser.parse_args()
    settings = config.Serving(rows=RUNNING, length=512, chunk=64, queue=2 * QUEUED, scheduler=args.scheduler)
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        model = sliced(load_dense(EMBEDDED))
    engine = Engine.build(model, settings)
    ask(engine, RUNNING, 0)
    while engine.stats().waiting or engine.stats().sampled < 20 * RUNNING:  # compiles what it meets
        engine.step()
    rows = [measured(engine, args.steps)]
    ask(engine, QUEUED, 1)
    engine.step()  # takes them in: each is routed, once
    rows.append(measured(engine, args.steps))
    Console().print(*rows, sep="\n")
    write_results("engine_overhead", rows=rows, scheduler=args.scheduler)


if __name__ == "__main__":
    main()
