"""Each grouped kernel alone over candidate tiles: what `grouped.py --tune` runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from _measure import seconds_in_a_row
from _profile import device_seconds

from readme_jax.models import grouped_gpu as gpu
from readme_jax.models.grouped_gpu import Blocks, Rows, Tiles
from readme_jax.models.segments import Expert, RoutePlan

Array = jax.Array
Compile = Callable[[dict[Any, tuple[Any, tuple[Any, ...]]]], dict[Any, Any]]

TILES = (
    Tiles(),
    Tiles(stages=3),
    Tiles(side=1, warps=4, stages=3),
    Tiles(side=1, warps=8, stages=3),
    Tiles(side=1, columns=256, stages=3),
    Tiles(side=1, columns=256, stages=4),
    Tiles(warps=16),
    Tiles(depth=32, stages=6),
    Tiles(columns=64, warps=4, stages=3),
)


def kernels(x: Array, plan: RoutePlan, weights: list[Expert], backward: bool) -> dict[str, tuple[Any, tuple]]:
    """By name: call(tiles, arguments) and those. Each is one kernel of a forward pass, or of one that trains."""
    rows, interpret = gpu.tiles_for(plan.slots.shape[0]).rows, jax.default_backend() == "cpu"
    blocks = gpu.block_rows(plan.slots, plan.inverse.reshape(-1), plan.sizes, rows)
    gates, ups, downs = zip(*weights, strict=True)
    hidden = 0.1 * jax.random.normal(jax.random.key(1), (blocks.pairs.shape[0], gates[0].shape[0]), x.dtype)
    hidden = jnp.where(blocks.real[:, None], hidden, 0)

    def product(join: gpu.Join, gathered: tuple[int, ...], **settings: Any) -> Any:
        def call(tiles: Tiles, blocks: Blocks, arrays: list[Array], weights: list[Any]) -> Any:
            rows = [Rows(a, of) for a, of in zip(arrays, gathered, strict=True)]
            return gpu._run(blocks, tiles, rows, weights, join, interpret, **settings)

        return call

    def triton(tiles: Tiles, blocks: Blocks, left: Array, right: Array) -> Any:
        return gpu._outer(blocks, tiles, interpret, left, right)

    down = product(gpu._same, (0,), scatter=True), (blocks, [hidden], [downs])
    if not backward:
        return {"gate, up": (product(gpu._swiglu, (1,)), (blocks, [x], [gates, ups])), "down": down}
    gate_up = product(gpu._swiglu_and_inputs, (1,), outputs=3)
    across = product(gpu._same, (0,), across=True)
    both = product(gpu._same, (0, 0), scatter=True, across=True)
    return {
        "gate, up": (gate_up, (blocks, [x], [gates, ups])),
        "gradient of h": (across, (blocks, [x[blocks.pairs]], [downs])),
        "gradient of rows": (both, (blocks, [hidden, hidden], [gates, ups])),
        "gradient of weights": (triton, (blocks, hidden, x[blocks.pairs])),
    }


def tune_kernels(x: Array, plan: RoutePlan, weights: list[Expert], backward: bool, compiled: Compile) -> None:
    """Print microseconds and TFLOP/s, padding not counted, of every kernel and its tiles, best first."""
    flops, known = 2 * plan.slots.shape[0] * weights[0].gate.size, kernels(x, plan, weights, backward)
    height = gpu.tiles_for(plan.slots.shape[0]).rows
    jobs: dict[Any, Any] = {
        (name, tiles): (functools.partial(call, tiles), arguments)
        for name, (call, arguments) in known.items()
        for tiles in (tiles._replace(rows=height) for tiles in TILES)
    }
    programs = compiled(jobs)
    calls = {key: functools.partial(program, *jobs[key][1]) for key, program in programs.items()}
    took = {key: seconds_in_a_row(call) for key, call in calls.items()}
    for (name, tiles), seconds in sorted(took.items(), key=lambda row: (row[0][0], row[1])):
        rate = flops * (2 if name in ("gate, up", "gradient of rows") else 1) / seconds / 1e12
        print(f"{name}: {1e6 * seconds:.0f} us, {rate:.0f} TFLOP/s  {tiles}", flush=True)


def show_kernels(program: Any, arguments: tuple[Any, ...]) -> None:
    """Print the microseconds of a program's kernels, from a profile."""
    jax.block_until_ready(program(*arguments))
    _, found = device_seconds(lambda: program(*arguments), {})
    print({name: round(1e6 * seconds) for name, seconds in found.most_common(12)}, flush=True)
