"""What the GPU benchmarks share: times of calls, ceilings of the card, rows written as soon as they are known."""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent.parent))
from _report import RESULTS, write_results

Row = dict[str, Any]
Job = tuple[Callable[..., Any], tuple[Any, ...]]  # a function and its arguments
THREADS = 24  # candidates compiled at once
CLOSE = 2**-6  # of the largest entry: sums in float32, factors and results in bfloat16


class Rows:
    """Rows of a result: each is printed, and the file written again, as soon as it is measured."""

    def __init__(self, name: str, resume: bool = False, **about: Any) -> None:
        """With `resume` the rows that the file holds come first."""
        self.name, self.about, self.rows = name, about, held(name) if resume else []

    def add(self, **row: Any) -> Row:
        """Append a row."""
        self.rows.append(row)
        print(json.dumps({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}), flush=True)
        write_results(self.name, **self.about, rows=self.rows)
        return row

    def tell(self, **about: Any) -> None:
        """More about the whole result."""
        self.about |= about
        print(json.dumps(about), flush=True)


def held(name: str) -> list[Row]:
    """Rows of a result; none where it is not there."""
    return _result(name)["rows"]


def merge(main: str, names: Sequence[str], key: Callable[[Row], Any]) -> list[Row]:
    """Add rows of other results, as of two processes on two GPUs or of a later commit, to those of `main`, and write
    them in the order of `key`; each says its commit. Of equal keys, also of what is said about all rows, the first of
    `main` and `names` counts. Commit and machine are those of the last of `names`; `runs` has every command."""
    found = {name: _result(name) for name in (main, *names)}
    for name in names:
        if not found[name]["rows"]:
            raise SystemExit(f"no rows in results/{name}.json")
    runs, rows, about = list[str](), dict[Any, Row](), dict[str, Any]()
    for result in (r for r in found.values() if r["rows"]):
        runs += result.pop("runs", [f"{result['commit']}: {result['command']}"])
        rows = {key(row): {"commit": result["commit"]} | row for row in result.pop("rows")} | rows
        about = result | about | {each: result[each] for each in ("commit", "machine")}
    del about["command"]  # this one's
    order = [rows[each] for each in sorted(rows)]
    write_results(main, **about, runs=runs, rows=order)
    return order


def _result(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"rows": []}


def apart(found: Any, wanted: Any) -> float:
    """The largest difference, of the largest wanted entry."""
    found, wanted = found.astype(jnp.float32), wanted.astype(jnp.float32)
    return float(jnp.abs(found - wanted).max() / jnp.abs(wanted).max())


def seconds_of(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def seconds_in_a_row(call: Callable[[], Any], least: float = 0.03, repeats: int = 3) -> float:
    """Seconds of a call among so many in a row that they take `least` seconds: launches overlap, as in a model."""
    once = seconds_of(call, 2)
    count = min(max(int(least / once), 3), 200)

    def several() -> Any:
        for _ in range(count):
            out = call()
        return out

    return seconds_of(several, repeats) / count


def copy_bandwidth(size: int = 2**28) -> float:
    """Bytes a second read and written by a pass over `size` float32 numbers. Of bfloat16 XLA's pass reaches four fifths
    of it on an H200."""
    x = jax.random.normal(jax.random.key(0), (size,), jnp.float32)
    double = jax.jit(lambda x: x * 2)
    return 2 * x.nbytes / seconds_in_a_row(lambda: double(x))


def matmul_rate(size: int = 8192) -> float:
    """FLOPs a second of a bf16 matmul of size^3."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    multiply = jax.jit(lambda a: a @ a)
    return 2 * size**3 / seconds_in_a_row(lambda: multiply(a))


def arrival_rate(megabytes: int) -> float:
    """Bytes a second from pinned host memory to the device, in one array."""
    device = jax.devices()[0]
    host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    there = jax.sharding.SingleDeviceSharding(device, memory_kind="device")
    waiting = jax.device_put(jnp.ones(megabytes * 2**19, jnp.bfloat16), host)
    return waiting.nbytes / seconds_of(lambda: jax.device_put(waiting, there), 5)


def compiled(lower: Callable[[], Any], about: str) -> Any:
    """The compiled program that `lower` gives, with a printed line of seconds after each of the two."""
    began = time.perf_counter()
    program = lower()
    lowered = time.perf_counter()
    print(f"{about}: lowered in {lowered - began:.1f} s", flush=True)
    program = program.compile()
    print(f"{about}: compiled in {time.perf_counter() - lowered:.1f} s", flush=True)
    return program


def compiled_in_threads(
    jobs: Mapping[Any, Job], donated: tuple[int, ...] = (), options: dict[str, str | bool] | None = None
) -> dict[Any, Any]:
    """Programs by key, with `options` of the compiler; those that do not compile, as tiles that need too much shared
    memory, are left out, with a line that says why."""

    def build(job: Job) -> Any:
        try:
            return jax.jit(job[0], donate_argnums=donated).lower(*job[1]).compile(options)
        except Exception as error:  # the others are still measured
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(jobs, pool.map(build, jobs.values()), strict=True))
    for key, program in found.items():
        if isinstance(program, Exception):
            print({"failed": str(key), "why": str(program).strip().splitlines()[0][:200]}, flush=True)
    return {key: program for key, program in found.items() if not isinstance(program, Exception)}


def random_weights(abstract: Any, shardings: Any) -> Any:
    """Weights of a tree's shapes where `shardings` lay them, norms one. Each shape is a program: one program for all
    weights takes minutes to compile."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [
        _draw(x.shape, sharding, path[-1].key.endswith("norm"))(key)
        for (path, x), sharding, key in zip(leaves, jax.tree.leaves(shardings), keys, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)


@functools.cache
def _draw(shape: tuple[int, ...], sharding: Any, norm: bool) -> Callable[[jax.Array], jax.Array]:
    def draw(key: jax.Array) -> jax.Array:
        return jnp.ones(shape) if norm else 0.02 * jax.random.normal(key, shape)

    return jax.jit(draw, out_shardings=sharding)
