"""Grouped feed-forward back ends on one GPU, Llama-2-7B's widths, bf16: `python benchmarks/gpu/grouped.py`.

Ratios are to one dense feed-forward of the same arithmetic (one expert's width over all rows), in the same run.
`static` knows the segments' sizes when it is compiled, and runs each as a dense matmul: no back end that learns them at
run time can be faster by much. `kernel` is what the model uses.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from _report import write_results
from decode import seconds_of

from readme_jax.models.segments import Expert, grouped_ffn, plan_routes

WIDTH, OWN, EXPERTS = 4096, 5504, 7


def dense(x: jax.Array, w: Expert) -> jax.Array:
    """One expert over all rows."""
    return (jax.nn.silu(x @ w.gate.T) * (x @ w.up.T)) @ w.down.T


def time_of(function: Any, *arguments: Any, calls: int = 10) -> float:
    """Seconds of a call among `calls` in a row."""
    jitted = jax.jit(function)

    def several() -> Any:
        for _ in range(calls):
            out = jitted(*arguments)
        return out

    return seconds_of(several, 3) / calls


def measure(rows: int, present: int, weights: list[Expert], backward: bool) -> list[dict[str, Any]]:
    """A row a back end."""
    x = jax.random.normal(jax.random.key(rows), (rows, WIDTH), jnp.bfloat16)
    rng = np.random.default_rng(0)
    routes = jnp.asarray(rng.permutation(np.arange(rows) * present // rows)[:, None], jnp.int32)
    sizes = np.bincount(np.asarray(routes[:, 0]), minlength=present)

    def static(x: jax.Array, weights: list[Expert]) -> jax.Array:
        parts = np.split(np.arange(rows), np.cumsum(sizes)[:-1])
        return jnp.concatenate([dense(x[p[0] : p[-1] + 1], w) for p, w in zip(parts, weights, strict=False)])

    def grouped(backend: Any) -> Any:
        return lambda x, weights: grouped_ffn(x, plan_routes(routes, len(weights)), weights, backend)

    def passes(function: Any) -> Any:
        if not backward:
            return function
        return jax.grad(lambda x, w: function(x, w).astype(jnp.float32).sum(), argnums=(0, 1))

    base = time_of(passes(lambda x, w: dense(x, w[0])), x, weights[:1])
    cases = {"static": static, "kernel": grouped("kernel"), "masked": grouped("masked")}
    if rows >= 256 and not backward:
        cases["ragged_dot"] = grouped("ragged")
    found = [{"rows": rows, "experts": present, "backend": "dense", "ratio": 1.0, "us": 1e6 * base}]
    for name, function in cases.items():
        took = time_of(passes(function), x, weights if name != "static" else weights[:present])
        found.append({"rows": rows, "experts": present, "backend": name, "ratio": took / base, "us": 1e6 * took})
    for row in found:
        row["pass"] = "forward_backward" if backward else "forward"
        print(row, flush=True)
    return found


def main() -> None:
    """Measure and write results/gpu_grouped.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 512, 2048, 8192])
    args = parser.parse_args()
    keys = iter(jax.random.split(jax.random.key(0), 3 * EXPERTS))

    def matrix(*shape: int) -> jax.Array:
        return 0.02 * jax.random.normal(next(keys), shape, jnp.bfloat16)

    weights = [Expert(matrix(OWN, WIDTH), matrix(OWN, WIDTH), matrix(WIDTH, OWN)) for _ in range(EXPERTS)]
    rows = [row for n in args.rows for present in (1, 4, 7) for row in measure(n, present, weights, False)]
    rows += [row for n in args.rows if n >= 2048 for row in measure(n, 7, weights, True)]
    write_results("gpu_grouped", rows=rows)


if __name__ == "__main__":
    main()
