"""Grouped feed-forward back ends on one GPU, Llama-2-7B's widths, bf16: `python benchmarks/gpu/grouped.py`.

Ratios are to one dense feed-forward of the same arithmetic (one expert's width over all rows), in the same run,
`over_bytes` to the time that the weights of the experts present take at the run's copy bandwidth; `temp_mb` is what a
program takes beside arguments and results (`memory_analysis`). Rows are sorted beforehand, as a model does it once a
batch.

  kernel  what the model uses
  decode  what a decode step makes of it, up to 256 rows
  masked  every expert over all rows, up to 256 of them
  static  knows the segments' sizes when it is compiled, and runs each as a dense matmul
  ragged  `jax.lax.ragged_dot` over stacked weights;  mosaic  JAX's own example kernel of it for Hopper, forward

Up to 512 rows a forward pass takes less than its launch from the host: there LOOPS of them follow one another in one
program, each of which adds a little of its result to the next one's rows. Before anything is timed, the kernels' values
and gradients are checked on this GPU. `--tune` measures each kernel of a pass alone over tiles instead, best first.
`--name gpu_grouped_0` writes a result of its own; `--merge gpu_grouped_0` adds its rows to gpu_grouped.json.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _grouped_kernels import show_kernels, tune_kernels
from _measure import Row, Rows, apart, compiled_in_threads, copy_bandwidth, matmul_rate, merge, seconds_in_a_row

from readme_jax.models.runtime import Runtime
from readme_jax.models.segments import Backend, Expert, grouped_ffn, plan_routes
from readme_jax.serving.decode import expert_columns, plan_rows, swiglu

MAIN = "gpu_grouped"
EXPERTS = 7
BACKENDS = ("kernel", "decode", "masked", "static", "ragged", "mosaic")
FEW_ROWS, LOOPS = 256, 20
Array = jax.Array
Function = Callable[[Array, list[Expert], Any], Array]  # rows [N, D], experts present, plan of routes -> [N, D]


def dense(x: Array, w: Expert) -> Array:
    """One expert over all rows."""
    return (jax.nn.silu(x @ w.gate.T) * (x @ w.up.T)) @ w.down.T


def routes_of(rows: int, present: int) -> Array:
    """[rows, 1]: experts in equal parts, mixed."""
    return jnp.asarray(np.random.default_rng(0).permutation(np.arange(rows) * present // rows)[:, None], jnp.int32)


def backend_of(name: str, routes: Array, present: int) -> tuple[Function, Any]:
    """A back end and its plan."""
    plan = plan_routes(routes, present)

    def static(x: Array, weights: list[Expert], plan: Any, sizes: Any) -> Array:
        ends = np.cumsum(sizes)
        parts = [dense(x[e - n : e], w) for e, n, w in zip(ends, sizes, weights, strict=True)]
        return jnp.concatenate(parts)

    def decode(x: Array, weights: list[Expert], plan: Any) -> Array:
        runtime = Runtime(segments="kernel", decode="kernel")
        if len(weights) == 1:
            return swiglu(runtime, x.T, weights[0]).T
        return expert_columns(x.T, plan, weights, runtime).T

    def mosaic(x: Array, weights: list[Expert], plan: Any) -> Array:
        from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

        gate, up, down = (jnp.stack(w) for w in zip(*weights, strict=True))

        def product(x: Array, w: Array) -> Array:
            tile: dict[str, Any] = {"block_m": 128, "block_n": 128, "block_k": 64, "grid_block_n": 8}
            return ragged_dot(x, w, group_sizes=plan.sizes, transpose_rhs=True, max_concurrent_steps=4, **tile)

        x = x[plan.order]
        return product(jax.nn.silu(product(x, gate)) * product(x, up), down)[plan.inverse[:, 0]]

    if name == "static":
        return functools.partial(static, sizes=np.bincount(np.asarray(routes[:, 0]))), None
    if name == "decode":
        ones, active = jnp.ones(routes.shape, jnp.float32), jnp.ones(routes.shape[0], bool)
        return decode, plan_rows(routes, ones, jnp.arange(present), active)[0]
    if name == "mosaic":
        return mosaic, plan
    backend: Backend = "ragged" if name == "ragged" else "masked" if name == "masked" else "kernel"
    return lambda x, weights, plan: grouped_ffn(x, plan, weights, backend), plan


def gradients(function: Function) -> Function:
    """Forward and backward in place of forward."""
    return jax.grad(lambda x, w, plan: function(x, w, plan).astype(jnp.float32).sum(), argnums=(0, 1))


def repeated(function: Function) -> Function:
    """LOOPS forward passes."""

    def loop(x: Array, weights: list[Expert], plan: Any) -> Array:
        return jax.lax.fori_loop(0, LOOPS, lambda _, x: x + 1e-3 * function(x, weights, plan), x)

    return loop


def wanted(backend: str, rows: int, present: int, backward: bool) -> bool:
    """Which cases say something: slow or forward-only back ends are left out where they do not."""
    if backend in ("decode", "masked"):
        return rows <= FEW_ROWS and not backward
    if backend in ("ragged", "mosaic"):
        return rows >= 2048 and present == EXPERTS and not backward
    return backend != "static" or rows >= FEW_ROWS


def measure(results: Rows, args: argparse.Namespace, rows: int, weights: list[Expert], backward: bool) -> None:
    """A row a back end and number of experts, of one number of rows and pass."""
    x = jax.random.normal(jax.random.key(rows), (rows, weights[0].gate.shape[1]), jnp.bfloat16)
    several = LOOPS if rows <= 2 * FEW_ROWS and not backward else 1
    passes: Callable[[Function], Function] = gradients if backward else repeated if several > 1 else lambda f: f
    jobs = {("dense", 1): (passes(lambda x, w, plan: dense(x, w[0])), (x, weights[:1], None))}
    for present, name in itertools.product(args.experts, args.backends):
        if present <= rows and wanted(name, rows, present, backward):
            function, plan = backend_of(name, routes_of(rows, present), present)
            jobs[name, present] = (passes(function), (x, weights[:present], plan))
    base = 0.0
    for (name, present), program in compiled_in_threads(jobs).items():
        took = seconds_in_a_row(functools.partial(program, *jobs[name, present][1])) / several
        base = base or took
        bytes_ = present * sum(w.nbytes for w in weights[0])
        results.add(
            **{
                "rows": rows,
                "experts": present,
                "backend": name,
                "pass": "forward_backward" if backward else "forward",
            },
            ratio=took / base,
            us=1e6 * took,
            over_bytes=took * results.about["copy_bandwidth"] / bytes_,
            copy_bandwidth=results.about["copy_bandwidth"],
            temp_mb=program.memory_analysis().temp_size_in_bytes / 2**20,
        )


def check(results: Rows) -> None:
    """Values and gradients of the kernels, compiled, against every expert over all rows in float32; errors are shares
    of the largest entry. Raises SystemExit where they are more than rounding."""
    for width, own, dtype, most in ((576, 768, "float32", 1e-4), (4096, 5504, "bfloat16", 0.03)):
        keys = iter(jax.random.split(jax.random.key(1), 3 * EXPERTS + 2))
        shapes = [(own, width), (own, width), (width, own)]
        weights = [
            Expert(*(jax.random.normal(next(keys), s, dtype) / s[1] ** 0.5 for s in shapes)) for _ in range(EXPERTS)
        ]
        x, direction = (jax.random.normal(next(keys), (1000, width), dtype) for _ in range(2))
        routes = np.random.default_rng(0).integers(1, EXPERTS, (1000, 1))  # the first expert has no rows
        plan = plan_routes(jnp.asarray(routes, jnp.int32), EXPERTS)

        @functools.partial(jax.jit, static_argnums=0)
        def both(backend: Backend, x: Array, weights: list[Expert], direction: Array, plan: Any = plan) -> Any:
            y, pull = jax.vjp(lambda x, w: grouped_ffn(x, plan, w, backend), x, weights)
            return [y], pull(direction)

        exact = jax.tree.map(lambda a: a.astype(jnp.float32), (x, weights, direction))
        with jax.default_matmul_precision("highest"):
            want = both("masked", *exact)
        errors = [
            max(apart(a, b) for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True))
            for mine, theirs in zip(both("kernel", x, weights, direction), want, strict=True)
        ]
        results.add(case="agrees", width=width, own=own, dtype=dtype, value=errors[0], gradient=errors[1])
        if not max(errors) < most:
            raise SystemExit(f"the kernels are wrong: {errors}, at most {most} expected")


def tune(rows: int, weights: list[Expert], backward: bool) -> None:
    """Kernels of a pass in the model, and each alone over candidate tiles, all experts present."""
    x = jax.random.normal(jax.random.key(rows), (rows, weights[0].gate.shape[1]), jnp.bfloat16)
    passes, (ours, plan) = (
        gradients if backward else lambda f: f,
        backend_of("kernel", routes_of(rows, EXPERTS), EXPERTS),
    )
    jobs: dict[Any, Any] = {
        "dense": (passes(lambda x, w, plan: dense(x, w[0])), (x, weights[:1], None)),
        "kernel": (passes(ours), (x, weights, plan)),
    }
    programs = compiled_in_threads(jobs)
    took = {name: round(1e6 * seconds_in_a_row(functools.partial(p, *jobs[name][1]))) for name, p in programs.items()}
    print(f"--- {rows} rows, {'forward and backward' if backward else 'forward'}, us: {took}", flush=True)
    show_kernels(programs["kernel"], jobs["kernel"][1])
    tune_kernels(x, plan, weights, backward, compiled_in_threads)


def key_of(row: Row) -> tuple[Any, ...]:
    """What a row is of."""
    about = ("case", "width", "backend", "pass", "rows", "experts")
    return tuple(str(row.get(name, "")) for name in about[:4]) + tuple(row.get(name, 0) for name in about[4:])


def main() -> None:
    """Measure and write results/gpu_grouped.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 2048, 32, 256, 1, 512, 8, 128])
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 4, EXPERTS])
    parser.add_argument(
        "--backends", nargs="+", default=["kernel", "decode", "masked", "static", "ragged"], choices=BACKENDS
    )
    parser.add_argument("--passes", nargs="+", default=["forward", "backward"], choices=("forward", "backward"))
    parser.add_argument("--seconds", type=float, default=140, help="after which no further number of rows is begun")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--widths", type=int, nargs=2, default=[4096, 5504], help="model and expert; for a quick look")
    parser.add_argument("--name", default=MAIN, help="of the results, where not the main ones")
    parser.add_argument("--merge", nargs="+", metavar="NAME", help="add the rows of these results to the main ones")
    args = parser.parse_args()
    if args.merge:
        merge(MAIN, args.merge, key_of)
        return
    began = time.perf_counter()
    width, own = args.widths
    keys = iter(jax.random.split(jax.random.key(0), 3 * EXPERTS))

    def matrix(*shape: int) -> Array:
        return 0.02 * jax.random.normal(next(keys), shape, jnp.bfloat16)

    weights = [Expert(matrix(own, width), matrix(own, width), matrix(width, own)) for _ in range(EXPERTS)]
    results = Rows(args.name)
    check(results)
    if not args.tune:
        results.tell(copy_bandwidth=copy_bandwidth(), matmul_rate=matmul_rate())
    for rows, each in itertools.product(args.rows, args.passes):
        if time.perf_counter() - began > args.seconds:
            print(f"{args.seconds:.0f} s are over: the rest was not begun", flush=True)
            break
        if each == "backward" and rows < 2048:
            continue
        if args.tune:
            tune(rows, weights, each == "backward")
        else:
            measure(results, args, rows, weights, each == "backward")


if __name__ == "__main__":
    main()
