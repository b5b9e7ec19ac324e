"""Decode steps of Llama-2-7B's shape on one GPU, through the engine's own programs: `python benchmarks/gpu/decode.py`.

Random bf16 weights, seven experts of half the feed-forward width that own their rows. Parts:

  ratio   a step with every row on one expert, and `mixed` over experts as real prompts are (results/routes.npz), over
          our dense model, over transformers' (`--transformers`, up to 32 rows, after ours) and over the
          limit: the larger of what its bytes take at the copy bandwidth and its FLOPs at the matmul rate of the run.
          A chain of steps, none of which is read: results/gpu_decode.json
  split   kernels' time by router, attention, feed-forward, sampling (from a profile): results/gpu_decode_split.json
  gap     a step of the engine, its loop included, over a step of the chain, and that chain span by span, as steps run
          that something streams in, with the seconds until all is dispatched: the same file
  slots   the engine with k experts a layer on the device: memory and tokens a second: results/gpu_decode_slots.json
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.62")  # transformers' process takes the rest

import jax
import jax.numpy as jnp
import numpy as np
from _measure import Rows, copy_bandwidth, matmul_rate
from _model import EXPERTS, compile_all, model_of, script, shape, with_limits
from _profile import device_seconds, scopes
from _served import Served, generate

from readme_jax.config import Mesh, Model, ModelConfig
from readme_jax.memory import settle
from readme_jax.models.runtime import runtime_for
from readme_jax.models.sizes import forward_flops
from readme_jax.parallel.mesh import make_mesh
from readme_jax.serving.buckets import Limits
from readme_jax.serving.passes import DecodePass, Given, Pass
from readme_jax.serving.programs import Programs
from readme_jax.serving.sampling import Samplings
from readme_jax.serving.state import State
from readme_jax.serving.store import ExpertStore
from readme_jax.serving.traffic import load_streams

HERE = Path(__file__).parent
STREAMS = HERE.parent / "results" / "routes.npz"
TOKENS = 65536  # of all rows' caches together
CONTEXT, FILLED = 1024, 0.88  # tokens of a row at most, and how much of them is in the cache
STEPS = 30
PEER_ROWS = 32  # most rows of a step of transformers: the caches of more do not fit beside our process
Whole = Callable[[DecodePass, State, Given], State]
SCOPES = ("route", "attention", "feed_forward", "sample")


def length_of(batch: int) -> int:
    """Tokens a row."""
    return min(CONTEXT, TOKENS // batch)


class Steps:
    """Chains of decode steps of one model at one batch size."""

    def __init__(self, programs: Programs) -> None:
        self.programs, self.batch = programs, programs.limits.rows
        self.position = int(FILLED * programs.limits.length)

    def chain(self, experts: np.ndarray, whole: Whole = DecodePass.whole) -> Any:
        """run(steps) of rows whose tokens run `experts` [B]: dispatched one after another, then waited for. Returns the
        seconds until the last one was dispatched."""
        p, present = self.programs, sorted(set(experts.tolist())) if self.programs.shape.top_k else []
        weights, sampling, active = p.store.present(present), Samplings.greedy(self.batch), np.ones(self.batch, bool)
        kx = p.shape.top_k
        routes = jnp.asarray(np.repeat(experts[:, None], kx, axis=1), jnp.int32)
        position = jnp.full(self.batch, self.position, jnp.int32)
        state = p.new_state()

        def run(steps: int) -> float:
            nonlocal state
            began = time.perf_counter()
            for _ in range(steps):
                state = replace(state, experts=jnp.copy(routes), position=jnp.copy(position))
                state = whole(p.decode_pass(active, present, sampling), state, weights)
            dispatched = time.perf_counter() - began
            jax.block_until_ready(state)
            return dispatched

        return run

    def held(self, experts: np.ndarray) -> int:
        """How many experts' arrays a step of these rows gets."""
        return len(self.programs.store.padded(sorted(set(experts.tolist())))) if self.programs.shape.top_k else 0

    def seconds(self, experts: np.ndarray) -> float:
        """Of a step."""
        return self.both_seconds(experts)[0]

    def both_seconds(self, experts: np.ndarray, whole: Whole = DecodePass.whole) -> tuple[float, float]:
        """Of a step, and of its dispatch."""
        run, times = self.chain(experts, whole), []
        run(3)
        for _ in range(5):
            began = time.perf_counter()
            dispatched = run(STEPS)
            times.append(((time.perf_counter() - began) / STEPS, dispatched / STEPS))
        return statistics.median(t for t, _ in times), statistics.median(d for _, d in times)


def limit_of(c: ModelConfig, batch: int, position: int, experts: int, bandwidth: float, rate: float) -> float:
    """Seconds that a step cannot be shorter than: weights of the experts present (0: the dense model), attention, head
    and caches read once; the arithmetic of one expert a row."""
    own = c.ffn_dim if experts == 0 else c.ffn_dim // 2
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layer = c.embed_dim * (2 * heads + 2 * kv + 3 * own * max(experts, 1)) + 2 * batch * position * kv
    bytes_ = 2 * (c.num_layers * layer + c.vocab_size * c.embed_dim)
    return max(bytes_ / bandwidth, batch * forward_flops(c, own, 1) / rate)


def mixed_routes(batch: int) -> np.ndarray:
    """[batch]: the experts of tokens at places drawn from all domains' text."""
    streams = np.concatenate(list(load_streams(STREAMS, "best").values()))
    return np.random.default_rng(0).choice(streams, batch).astype(np.int64)


class Transformers:
    """The peer's process."""

    def __init__(self, c: ModelConfig) -> None:
        command = [sys.executable, str(HERE / "_torch_peer.py"), json.dumps(asdict(c))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds(self, batch: int, length: int, position: int, compiled: bool) -> float:
        """Of a step. Raises RuntimeError with the reason where there is none: out of memory, or the process ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        ask = {"batch": batch, "length": length + 128, "position": position, "compiled": compiled}
        with contextlib.suppress(BrokenPipeError):  # an ended process does not answer either
            self.process.stdin.write(json.dumps(ask) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["ms"] / 1e3

    def end(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def limits_of(batch: int) -> Limits:
    """Of decode steps of `batch` rows alone."""
    length = length_of(batch)
    return Limits(batch, length, chunks=(64,), decode=(batch,), prompts=(length,), stretches=(length,))


def steps_of(model: Any, batches: list[int]) -> dict[int, Steps]:
    """Of a model at each batch size, over the same weights."""
    runtime = replace(runtime_for(Model(compute_dtype="bfloat16")), decode="kernel", segments="kernel")
    base = Programs(model, ExpertStore(model, dtype=jnp.bfloat16), limits_of(batches[0]), runtime)
    return {batch: Steps(with_limits(base, limits_of(batch))) for batch in batches}


class Measured(NamedTuple):
    """A step of ours: what names its row, and its seconds."""

    batch: int
    experts: str
    present: int
    seconds: float

    def against(self, results: Rows, peer: str, seconds: float) -> None:
        """Write a row."""
        row = {"batch": self.batch, "experts": self.experts, "experts_present": self.present, "peer": peer}
        results.add(**row, ratio=self.seconds / seconds, ms=1e3 * self.seconds, peer_ms=1e3 * seconds)


def own_steps(results: Rows, c: ModelConfig, batches: list[int]) -> list[Measured]:
    """Our steps at each batch, the dense model's first, over that and over the limit."""
    bandwidth, rate = results.about["copy_bandwidth"], results.about["matmul_rate"]
    dense: dict[int, float] = {}
    found = []
    for experts in (0, EXPERTS):
        began, steps = time.perf_counter(), steps_of(model_of(c, experts), batches)
        cases = [("one" if experts else "dense", b, np.zeros(b, np.int64)) for b in batches]
        cases += [("mixed", b, mixed_routes(b)) for b in batches if experts]
        calls = {(batch, steps[batch].held(routes)) for _, batch, routes in cases}
        compile_all((steps[batch].programs, ("decode", batch, held)) for batch, held in calls)
        results.tell(**{f"compile_seconds_{experts}": time.perf_counter() - began})
        for name, batch, routes in cases:
            present = len(set(routes.tolist())) if experts else 0
            own = Measured(batch, name, present, steps[batch].seconds(routes))
            dense.setdefault(batch, own.seconds)
            own.against(results, "own_dense", dense[batch])
            own.against(results, "limit", limit_of(c, batch, steps[batch].position, present, bandwidth, rate))
            found.append(own)
        del steps
        gc.collect()
    return found


def ratios(results: Rows, c: ModelConfig, args: argparse.Namespace) -> None:
    """A row a batch, case and peer, and the milliseconds of each: ours first, whatever becomes of the peer."""
    found = own_steps(results, c, args.batch)
    if not args.transformers:
        return
    peer = Transformers(c)
    kinds = [("eager", [b for b in args.batch if b <= PEER_ROWS]), ("compiled", args.compiled)]
    for kind, batch in [(kind, batch) for kind, batches in kinds for batch in batches]:
        try:
            length = length_of(batch)
            seconds = peer.seconds(batch, length, int(FILLED * length), kind == "compiled")
        except RuntimeError as error:
            results.add(batch=batch, peer=f"transformers_{kind}", error=str(error))
            continue
        for own in found:
            if own.batch == batch:
                own.against(results, f"transformers_{kind}", seconds)
    peer.end()


def split(results: Rows, c: ModelConfig, batches: list[int]) -> None:
    """Milliseconds of a step's kernels by scope, all rows on one expert and mixed."""
    for batch, steps in steps_of(model_of(c, EXPERTS), batches).items():
        for name, routes in {"one": np.zeros(batch, np.int64), "mixed": mixed_routes(batch)}.items():
            run, count = steps.chain(routes), 5
            run(3)
            by = scopes(steps.programs.program("decode", batch, steps.held(routes)), SCOPES)
            scope, kernels = device_seconds(partial(run, count), by)
            ms = {f"{part}_ms": 1e3 * scope[part] / count for part in (*SCOPES, "rest", "unknown")}
            top = {kernel[:60]: round(1e3 * s / count, 4) for kernel, s in kernels.most_common(12)}
            results.add(batch=batch, experts=name, **ms, busy_ms=1e3 * scope.total() / count, kernels=top)
            del run  # and its caches


def gap(results: Rows, served: Served) -> None:
    """The engine at batch 1, one expert throughout, against a chain of the same steps."""
    engine = served.engine(served.settings("decode_first"), [])
    settle()  # as the server
    times = generate(engine, [served.prompt(0, 64)], 512, warm=16)
    wall, outside = float(np.mean(times)), engine.stats().overhead
    chain = Steps(served.programs)
    chain.position = 64 + 256
    routes = np.zeros(served.programs.limits.rows, np.int64)
    device, dispatch = chain.both_seconds(routes)
    spans, their_dispatch = chain.both_seconds(routes, Pass.whole)
    ms = {"wall_ms": 1e3 * wall, "median_ms": 1e3 * statistics.median(times), "longest_ms": 1e3 * max(times)}
    ms |= {"chain_ms": 1e3 * device, "dispatch_ms": 1e3 * dispatch}
    ms |= {"spans_ms": 1e3 * spans, "spans_dispatch_ms": 1e3 * their_dispatch}
    results.add(part="gap", batch=1, **ms, outside_calls=outside, gap=(wall - device) / wall)


def slots(results: Rows, served: Served, rows: int) -> None:
    """A row a number of slots: 4 requests of other domains at a time."""
    stats = jax.devices()[0].memory_stats
    for k in range(1, EXPERTS + 1):
        for staging in (0, 1) if k < EXPERTS else (0,):
            engine = served.engine(served.settings("lookahead", k, staging), [])
            places = np.linspace(0, served.programs.config.vocab_size - 256, rows).astype(int)
            began = time.perf_counter()
            generate(engine, [served.prompt(int(p), 64) for p in places], 64, warm=0)
            seconds, found = time.perf_counter() - began, engine.stats()
            results.add(
                slots=k,
                staging=staging,
                tokens_per_s=rows * 64 / seconds,
                held_bytes=served.held_bytes(),
                in_use_bytes=(stats() or {}).get("bytes_in_use", 0),
                loads=found.loads,
            )
            del engine
            gc.collect()


def main() -> None:
    """Measure one part or more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=["ratio"], choices=("ratio", "split", "gap", "slots"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128, 256], help="also 4, 16, 64")
    parser.add_argument("--transformers", action="store_true", help="as peers, in a process of its own")
    parser.add_argument("--compiled", type=int, nargs="*", default=[1], help="batches that torch.compile is tried at")
    parser.add_argument("--layers", type=int, default=32, help="fewer for a quick look")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script without a GPU")
    args = parser.parse_args()
    c = shape(args.layers, args.tiny)
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        if "ratio" in args.part:
            results = Rows("gpu_decode", layers=args.layers)
            results.tell(copy_bandwidth=copy_bandwidth(), matmul_rate=matmul_rate())
            ratios(results, c, args)
        parts = Rows("gpu_decode_split", layers=args.layers)
        if "split" in args.part:
            split(parts, c, args.batch)
        experts = script(load_streams(STREAMS, "best"), c.vocab_size)
        if "gap" in args.part:
            steady = np.zeros_like(experts)
            gap(parts, Served(c, steady, Limits(1, CONTEXT, chunks=(64,), decode=(1,), prompts=(CONTEXT,))))
        if "slots" in args.part:
            rows = 4
            limits = Limits(rows, CONTEXT, chunks=(64,), decode=(rows,), prompts=(CONTEXT,))
            slots(Rows("gpu_decode_slots", layers=args.layers, rows_at_once=rows), Served(c, experts, limits), rows)


if __name__ == "__main__":
    main()
