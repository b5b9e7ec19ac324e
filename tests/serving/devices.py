"""Run by test_devices.py in a process of its own with 8 CPU devices: the engine on several meshes against one device.

Prints one JSON object: {case: {close (places where rounding may choose), differ (those where it chose), whole (weights
and caches of two and more dimensions that lie whole on a device, but for the router's), alike (whether all devices end
with the same last tokens, routes and router's cache), loads, missing, drawn alike (whether a sampled request's tokens
are those of one device)}}.
"""

from __future__ import annotations

import copy
import functools
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from alone import Bench, run_out  # noqa: E402
from conftest import build_tiny  # noqa: E402
from tiny_shape import TINY  # noqa: E402

from readme_jax import config  # noqa: E402
from readme_jax.config import Mesh  # noqa: E402
from readme_jax.models.runtime import Runtime  # noqa: E402
from readme_jax.serving.buckets import Limits  # noqa: E402
from readme_jax.serving.build import mesh_of  # noqa: E402
from readme_jax.serving.programs import Programs  # noqa: E402
from readme_jax.serving.request import Request, SamplingParams  # noqa: E402
from readme_jax.serving.store import ExpertStore  # noqa: E402

ROWS, LENGTH, REQUESTS, CLOSE = 4, 48, 7, 1e-4
LIMITS = Limits(ROWS, LENGTH, chunks=(8,), decode=(ROWS,), prompts=(LENGTH,), stretches=(LENGTH,))
GPU = Runtime(segments="kernel", decode="kernel")  # as on a GPU, but in float32 and its kernels interpreted


class Case(NamedTuple):
    """A model's kind, its experts, the mesh, settings of the engine, how it computes, and whether a request draws."""

    kind: str
    experts: int
    mesh: Mesh
    serving: dict[str, Any] = {}
    runtime: Runtime = Runtime()
    drawn: bool = False


CASES = {
    "tensor 2": Case("top2", 3, Mesh(tensor=2)),
    "tensor 2, dense": Case("dense", 0, Mesh(tensor=2), drawn=True),
    "tensor 2, slots": Case("top2", 3, Mesh(tensor=2), {"slots": 2}),
    "tensor 2, kernels": Case("top2", 2, Mesh(tensor=2), runtime=GPU),
    "expert 2 x tensor 2": Case("top2", 3, Mesh(expert=2, tensor=2)),
    "expert 7": Case("own_rows", 7, Mesh(expert=7)),
    "expert 8": Case("top1", 7, Mesh(expert=8)),
    "fsdp 8": Case("dense", 0, Mesh(fsdp=8)),
    "tensor 2 x fsdp 4": Case("top2", 2, Mesh(fsdp=4, tensor=2)),
    "data 8": Case("top2", 2, Mesh(data=8)),
    "data 2 x fsdp 4": Case("top2", 2, Mesh(data=2, fsdp=4)),
    "data 2 x expert 2 x tensor 2": Case("top2", 2, Mesh(data=2, expert=2, tensor=2)),
}


@functools.cache
def bench(kind: str, experts: int) -> Bench:
    """What requests get alone on one device."""
    rng = random.Random(kind)
    prompts = [[rng.randrange(260) for _ in range(rng.randrange(1, 16))] for _ in range(REQUESTS)]
    counts = [rng.randrange(4, 12) for _ in prompts]
    shape = replace(TINY, num_layers=2 if experts == 3 else 1)
    return Bench(build_tiny(kind, experts=experts, config=shape), LIMITS, prompts, counts, CLOSE)


def on(case: Case, mesh: jax.sharding.Mesh) -> Bench:
    """The same requests on a mesh."""
    here = copy.copy(bench(case.kind, case.experts))
    here.programs = Programs(here.model, ExpertStore(here.model, mesh=mesh), LIMITS, case.runtime)
    return here


def serving(**chosen: Any) -> config.Serving:
    return config.Serving(rows=ROWS, length=LENGTH, scheduler="decode_first", budget=20, chunk=8, **chosen)


def run(case: Case) -> dict[str, Any]:
    """Requests arrive while others run; at last, of some cases, one draws its tokens."""
    here = on(case, mesh_of(case.mesh))
    engine = here.engine(serving(**case.serving))
    differ = here.check(engine, range(REQUESTS), {i: 3 * i for i in range(1, REQUESTS, 2)})
    stats, state = engine.stats(), engine._caller.state
    lying = {
        "weights": here.programs.weights._replace(router=None),
        "experts": here.programs.store.present((0, 1)),
        "caches": state.layers,
    }
    return {
        "close": here.places,
        "differ": differ,
        "whole": whole(lying),
        "alike": all(alike(x) for x in jax.tree.leaves((state.router, state.token, state.experts))),
        "loads": stats.loads,
        "missing": stats.missing,
        "drawn alike": not case.drawn or drawn(here) == drawn(bench(case.kind, case.experts)),
    }


def whole(tree: Any) -> list[str]:
    """Arrays of which every device holds all."""
    named = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(p) for p, x in named if x.ndim > 1 and x.sharding.is_fully_replicated]


def alike(x: jax.Array) -> bool:
    """Whether every device's copy is the same to the last bit."""
    first, *others = (np.asarray(s.data) for s in x.addressable_shards)
    return all(np.array_equal(first, o) for o in others)


def drawn(here: Bench) -> list[int]:
    """A request's tokens at temperature 1 with a seed."""
    engine = here.engine(serving())
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=7, top_p=0.9, ignore_eos=True)
    handle = engine.submit(Request(here.asks[0].prompt, params))
    run_out(engine)
    return handle.result().tokens


def main() -> None:
    jax.config.update("jax_disable_most_optimizations", True)  # compile faster
    print(json.dumps({name: run(CASES[name]) for name in sys.argv[1:] or CASES}))


if __name__ == "__main__":
    main()
