"""Azure traces on a real engine and one GPU: `python benchmarks/gpu/replay.py`.

A mixture of Llama-2-7B's shape with random weights and scripted routes (`_model.py`): each request is a place in a
stream of real text's routes by a tuned router, `label` or `eq4` (results/routes.npz). Arrivals and lengths are a window
of a trace, stretched in time to a share (`--load`) of the rate that decode-first with everything resident serves of a
full queue here; prompts are cut to what a row holds. With everything resident the four schedulers run, and two of them
on the other router's routes. With fewer experts on the device (`--slots`) `lookahead` runs with prefetching, and
`decode_first` without, each expert loaded when it is needed, and with it: at a lower load, with shorter answers and
windows, which loading on demand can follow.

Rows are batching.json's, with how long a run's steps took over the larger of compute (by costs measured here) and
transfer of all of them (`over_limit`), and over the sum of each step's larger one (`over_steps`). Results are written
after every run. Several processes write results of their own, `--name gpu_replay_0` and `_1`; `--merge gpu_replay_0
gpu_replay_1` adds their rows to gpu_replay.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax
import numpy as np
from _measure import Rows, arrival_rate, merge
from _model import EXPERTS, script, shape
from _served import Served

sys.path.insert(0, str(Path(__file__).parent.parent))
import _engine
from _engine import SCHEDULERS, Ask
from _replay import BASELINES, ROUTERS, TRACES
from _report import RESULTS, show_rows

from readme_jax import config
from readme_jax.errors import ConfigError
from readme_jax.parallel.mesh import make_mesh
from readme_jax.serving.buckets import Limits
from readme_jax.serving.engine import Engine
from readme_jax.serving.footprint import footprint
from readme_jax.serving.loop import Logged
from readme_jax.serving.scheduler import Policy
from readme_jax.serving.traffic import Arrival, load_streams, load_trace

MAIN = "gpu_replay"
ABOUT = ("router", "trace", "capacity", "prefetch", "scheduler", "load", "requests", "budget")  # what a row is of
SHOWN = ("mean", "p95", "p99_ttft", "loads", "over_limit", "throughput")
FULL = 48  # requests of the queue that the rate is measured with
CACHED: tuple[tuple[Policy, bool], ...] = (("lookahead", True), ("decode_first", False), ("decode_first", True))
COMPARED = ("lookahead", "decode_first")  # by both routers


class Logging:
    """What `_engine.run` serves with: the engine and its log stay at hand."""

    def __init__(self, served: Served) -> None:
        self.served, self.log = served, list[Logged]()
        self.last: Engine | None = None
        self.loaded: list[int] = []  # bytes so far, after each step

    def engine(self, settings: config.Serving, log: list[Logged]) -> Engine:
        """An engine in the place of the last one, see `Served.engine`."""
        self.log, self.last = log, None
        self.last = engine = self.served.engine(settings, log)
        self.loaded, store = [engine._caller.residency.store.bytes_loaded], engine._caller.residency.store

        def told(step: Logged) -> None:
            log.append(step)
            self.loaded.append(store.bytes_loaded)

        engine._loop.log = told
        return engine


def window(trace: list[Arrival], count: int, seed: int, length: int, vocabulary: int, longest: int) -> list[Ask]:
    """`count` consecutive requests at random places of the script, cut to rows of `length` tokens."""
    rng = np.random.default_rng(seed)
    first = int(rng.integers(len(trace) - count))
    asks = []
    for row in trace[first : first + count]:
        output = min(max(row.output, 2), longest)
        prompt = min(row.prompt, length - output)
        place = int(rng.integers(vocabulary - prompt - output))
        asks.append(Ask(row.arrival - trace[first].arrival, list(range(place, place + prompt)), output))
    return asks


def run(server: Logging, asks: list[Ask], settings: config.Serving, stretch: float, link: float) -> dict[str, Any]:
    """Figures of `_engine.run`, and the steps' seconds against their limits."""
    found = _engine.run(server, asks, settings, stretch)
    assert server.last is not None
    costs, store = server.served.costs, server.last._caller.residency.store
    tokens = np.array([sum(count for _, _, count in step.chunks) for step in server.log])
    busy = sum(step.seconds for step in server.log)
    computes = costs.compute(tokens, np.full(len(tokens), found["unique_experts"]))
    compute, transfer = float(np.sum(computes)), store.bytes_loaded / link
    steps = float(np.sum(np.maximum(computes, np.diff(server.loaded) / link)))
    return found | {
        "steps_seconds": busy,
        "compute_seconds": compute,
        "transfer_seconds": transfer,
        "over_limit": busy / max(compute, transfer),
        "over_steps": busy / steps,
        "throughput": sum(ask.output for ask in asks) / found["seconds"],
        "predicted_bytes": footprint(server.served.programs).most,
        "in_use_bytes": (jax.devices()[0].memory_stats() or {}).get("bytes_in_use", 0),
    }


class Plan(NamedTuple):
    """Runs on one window: of a trace and a router's routes, at a share of the saturated rate, for so many seconds, with
    answers of so many tokens at most; how many slots (0: all resident), and which schedulers with and without
    prefetching."""

    trace: str
    router: str
    load: float
    seconds: float
    longest: int
    slots: int
    runs: tuple[tuple[Policy, bool], ...]


def plans(args: argparse.Namespace) -> list[Plan]:
    """The first capacity, everything resident on each trace, the other router, then the other capacities."""
    resident = tuple((s, True) for s in args.schedulers)
    compared = tuple(run for run in resident if run[0] in COMPARED)
    main, *others = args.routers
    few = [
        Plan(args.slots_trace, main, args.slots_load, args.slots_seconds, args.slots_longest, k, CACHED)
        for k in args.slots
    ]
    all_ = [Plan(trace, main, args.load, args.seconds, args.longest, 0, resident) for trace in args.traces]
    all_ += [Plan(args.slots_trace, r, args.load, args.slots_seconds, args.longest, 0, compared) for r in others]
    return [plan for plan in few[:1] + all_ + few[1:] if plan.runs]


def saturated(server: Logging, args: argparse.Namespace, trace: list[Arrival], vocabulary: int, link: float) -> float:
    """Requests a second that decode-first with everything resident serves of a full queue."""
    full = window(trace, FULL, 1, args.length, vocabulary, args.longest)
    return FULL / run(server, full, server.served.settings("decode_first"), 0.0, link)["seconds"]


def replay(results: Rows, args: argparse.Namespace, began: float) -> None:
    """All runs of all plans that are begun before the time is up."""
    c = shape(args.layers, args.tiny)
    limits = Limits(args.rows, args.length, chunks=args.chunks, decode=(args.rows,), prompts=(args.length,))
    scripts = {r: script(load_streams(RESULTS / "routes.npz", ROUTERS[r]), c.vocab_size) for r in args.routers}
    server = Logging(Served(c, scripts[args.routers[0]], limits))
    link = arrival_rate(512)
    print(
        f"ready after {time.perf_counter() - began:.0f} s; {server.served.costs}; link {link / 1e9:.1f} GB/s; "
        f"temporaries {server.served.temporaries() / 1e9:.1f} GB",
        flush=True,
    )
    traces = {name: load_trace(args.data / f"azure_2023_{name}.jsonl.gz") for name in {*args.traces, args.slots_trace}}
    rates: dict[str, float] = {}
    for plan in plans(args):
        server.served.follow(scripts[plan.router])
        trace = traces[plan.trace]
        if plan.trace not in rates:
            rates[plan.trace] = args.rate or saturated(server, args, trace, c.vocab_size, link)
            results.tell(saturated=rates, link=link)
        rate = rates[plan.trace]
        count = max(round(plan.load * rate * plan.seconds), 4)
        asks = window(trace, count, args.seed, args.length, c.vocab_size, plan.longest)
        stretch = plan.seconds / max(asks[-1].arrival, 1e-9)
        about = {"trace": plan.trace, "router": plan.router, "load": plan.load, "rate": plan.load * rate}
        about |= {"window_seconds": plan.seconds, "longest_answer": plan.longest}
        for scheduler, prefetch in plan.runs:
            if time.perf_counter() - began > args.minutes * 60 - plan.seconds:
                print(f"{args.minutes} minutes: {plan} was not run to its end", flush=True)
                return
            settings = server.served.settings(scheduler, plan.slots, args.staging, prefetch)
            settings = replace(settings, budget=args.budget or settings.budget)
            held = {"resident": "slots" if plan.slots else "all", "capacity": plan.slots or EXPERTS}
            found = run(server, asks, settings, stretch, link)
            held |= {"prefetch": prefetch, "scheduler": scheduler, "budget": settings.budget}
            results.add(**about, **held, requests=count, **found)


def main() -> None:
    """Replay and write results/gpu_replay.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=RESULTS.parents[2] / "shared" / "data" / "traces")
    parser.add_argument("--seconds", type=float, default=60, help="of a window")
    parser.add_argument("--minutes", type=float, default=9, help="after which no run is begun")
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--rate", type=float, help="saturated requests a second; default: measured")
    parser.add_argument("--traces", nargs="*", default=["conv", "code"], choices=TRACES, help="with all resident")
    parser.add_argument("--routers", nargs="+", default=["label", "eq4"], choices=tuple(ROUTERS))
    parser.add_argument("--schedulers", nargs="*", default=["lookahead", *BASELINES], choices=SCHEDULERS)
    parser.add_argument("--slots", type=int, nargs="*", default=[3, 4, 2, 5], help="experts a layer on the device")
    parser.add_argument("--slots_trace", default="conv", choices=TRACES)
    parser.add_argument("--slots_load", type=float, default=0.4)
    parser.add_argument("--slots_seconds", type=float, default=20, help="of a window; the other router's, too")
    parser.add_argument("--slots_longest", type=int, default=64, help="answer")
    parser.add_argument("--staging", type=int, default=1, help="experts that stream beside the slots")
    parser.add_argument("--rows", type=int, default=24, help="with 24 and 4096 tokens 88 GB")
    parser.add_argument("--length", type=int, default=4096, help="tokens a row")
    parser.add_argument("--longest", type=int, default=512, help="answer")
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--budget", type=int, help="tokens a step; default: the longest chunk")
    parser.add_argument("--layers", type=int, default=32, help="fewer for a quick look")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default=MAIN, help="of the results, where not the main ones")
    parser.add_argument("--merge", nargs="+", metavar="NAME", help="add the rows of these results to the main ones")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script without a GPU")
    args = parser.parse_args()
    if args.merge:
        rows = merge(MAIN, args.merge, lambda row: tuple(row[name] for name in ABOUT))
        show_rows("replay", [{name: row[name] for name in (*ABOUT, *SHOWN)} for row in rows])
        return
    args.chunks, began = tuple(args.chunks), time.perf_counter()
    results = Rows(args.name, layers=args.layers, rows_of_cache=args.rows)
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        try:
            replay(results, args, began)
        except ConfigError as error:
            raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
