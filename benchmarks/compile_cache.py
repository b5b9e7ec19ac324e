"""A training step loaded from JAX's compilation cache over one compiled: `python benchmarks/compile_cache.py`.

The demo's expert step, SmolLM2's shape in fewer or more unrolled layers. The first process finds the cache empty, the
second what the first left. Writes results/compile_cache.json: rows {layers, compile_seconds, load_seconds, ratio}.
`readme_jax/compiling.py` takes its bound from it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jax
from _report import show_rows, write_results

from readme_jax import config
from readme_jax.checkpoints.hf import EMBEDDED, open_dense
from readme_jax.cli.settings import load_run
from readme_jax.models.router import config_for
from readme_jax.models.runtime import runtime_for
from readme_jax.parallel.mesh import make_mesh
from readme_jax.plan.compiled import mixture_for
from readme_jax.tuning.stages import Shapes, abstract_arguments, build_step

RECIPE = Path(__file__).parent.parent / "configs" / "recipes" / "demo.gin"


def seconds(layers: int) -> float:
    """Of compiling, or loading, the step of so many layers."""
    run = load_run([RECIPE])
    model = replace(open_dense(EMBEDDED).config, num_layers=layers)
    mixture, _ = mixture_for(run, model, len(run.data.domains))
    mesh = make_mesh(run.mesh)
    shapes = Shapes(model, mixture, config_for(run.router, model, mixture.num_experts), runtime_for(config.Model()))
    with jax.set_mesh(mesh):
        step = build_step(run, shapes, "experts", mesh)
        lowered = step.update.lower(*abstract_arguments(run, shapes, "experts", mesh, step))
        began = time.perf_counter()
        lowered.compile()
        return time.perf_counter() - began


def main() -> None:
    """Two processes for each number of layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return print(json.dumps(seconds(args.layers[0])))
    rows = []
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as cache:
            child = [sys.executable, __file__, "--child", "--layers", str(layers)]
            env = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
            first, second = (
                float(subprocess.run(child, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout)
                for _ in range(2)
            )
        rows.append({"layers": layers, "compile_seconds": first, "load_seconds": second, "ratio": second / first})
    show_rows("loaded over compiled", rows)
    write_results("compile_cache", rows=rows)


if __name__ == "__main__":
    main()
