"""Weights times a decode step's few columns, over tiles of their kernel: `python benchmarks/gpu/matvec.py`.

Llama-2-7B's products, bf16, of a dense layer and of an expert of half its width. Layers follow one another in one
program, each with weights of its own, as in a step. Rows, best first for a case: microseconds a layer, and that over
the time of the bytes of its weights at the bandwidth of the run; `xla` is what XLA makes of the same product. The model
uses TILES.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from _measure import CLOSE, Rows, apart, compiled_in_threads, copy_bandwidth, seconds_in_a_row

from readme_jax.serving.matvec import TILES, Tiles, gated, matvec
from readme_jax.serving.programs import GPU_OPTIONS

BYTES = 6 * 2**30  # of weights a case: far more than the caches hold
CASES = {  # outputs, inputs, weights
    "qkv": (12288, 4096, 1),
    "o": (4096, 4096, 1),
    "expert's gate and up": (5504, 4096, 2),
    "expert's down": (4096, 5504, 1),
    "dense gate and up": (11008, 4096, 2),
    "dense down": (4096, 11008, 1),
}


def candidates() -> list[Tiles | None]:
    """XLA's product, the model's tiles, then others."""
    found = [
        Tiles(rows, step, warps)
        for rows, step, warps in itertools.product((1, 2, 4, 8, 16), (512, 1024, 2048, 4096), (1, 2, 4, 8))
        if 8 <= rows * step // (32 * warps) <= 128
    ]
    return [None, TILES, *(tiles for tiles in found if tiles != TILES)]


def layers(tiles: Tiles | None, weights: list[tuple[Any, ...]], y: Any) -> Any:
    """The products of all layers."""
    if tiles is None:
        products = [[w @ y for w in layer] for layer in weights]
        return [jax.nn.silu(p[0]) * p[1] if len(p) > 1 else p[0] for p in products]
    run = partial(gated if len(weights[0]) > 1 else matvec, tiles=tiles, interpret=jax.default_backend() == "cpu")
    return [run(*layer, y) for layer in weights]


def measure(results: Rows, case: str, columns: int) -> None:
    """A row a candidate."""
    out, inputs, count = CASES[case]
    each = 2 * out * inputs * count
    draw = jax.jit(lambda key: jax.random.normal(key, (out, inputs), jnp.bfloat16))
    keys = iter(jax.random.split(jax.random.key(0), 1000))
    weights = [tuple(draw(next(keys)) for _ in range(count)) for _ in range(max(BYTES // each, 2))]
    y = jax.random.normal(next(keys), (inputs, columns), jnp.bfloat16)
    jobs = {tiles: (partial(layers, tiles), (weights, y)) for tiles in candidates()}
    options = GPU_OPTIONS if jax.default_backend() == "gpu" else None
    found = []
    for tiles, program in compiled_in_threads(jobs, options=options).items():
        if (error := apart(program(weights, y)[0], layers(None, weights[:1], y)[0])) > CLOSE:
            raise SystemExit(f"{case}, {tiles}: the kernel's product is {error:.3f} of the largest entry off")
        seconds = seconds_in_a_row(lambda program=program: program(weights, y))  # type: ignore[misc]
        found.append((seconds / len(weights), tiles))
    for seconds, tiles in sorted(found, key=lambda each: each[0]):
        about = {"case": case, "columns": columns, "backend": "kernel" if tiles else "xla", "chosen": tiles == TILES}
        about |= tiles._asdict() if tiles else {}
        results.add(**about, us=1e6 * seconds, over_bytes=seconds * results.about["copy_bandwidth"] / each)


def main() -> None:
    """Measure and write results/gpu_matvec.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, nargs="+", default=[1])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    args = parser.parse_args()
    results = Rows("gpu_matvec")
    results.tell(copy_bandwidth=copy_bandwidth())
    for columns in args.columns:
        for case in args.cases:
            measure(results, case, columns)


if __name__ == "__main__":
    main()
