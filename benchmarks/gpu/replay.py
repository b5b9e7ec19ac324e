"""Azure traces on a real engine and one GPU: `python benchmarks/gpu/replay.py --schedulers lookahead decode_first`.

A mixture of Llama-2-7B's shape with random weights and scripted routes (`_model.py`): each request is a place in a
stream of real text's routes by a tuned router, `label` or `eq4` (results/routes.npz). Arrivals and lengths are a window
of a trace, stretched in time to a share (`--load`) of the rate that decode-first with everything resident serves of a
full queue here; prompts are cut to what a row holds. Rows are batching.json's, with how long a run's steps took over
the larger of compute (by costs measured here) and transfer. Results are written after every run. Two processes, one a
GPU, write results of their own, `--name gpu_replay_0` and `_1`; `--merge gpu_replay_0 gpu_replay_1` adds their rows to
gpu_replay.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax
import numpy as np
from _measure import Rows, arrival_rate, merge
from _model import EXPERTS, script, shape
from _served import Served

sys.path.insert(0, str(Path(__file__).parent.parent))
import _engine
from _engine import SCHEDULERS, Ask
from _replay import ROUTERS, TRACES
from _report import RESULTS, show_rows

from readme_jax import config
from readme_jax.errors import ConfigError
from readme_jax.parallel.mesh import make_mesh
from readme_jax.serving.buckets import Limits
from readme_jax.serving.engine import Engine
from readme_jax.serving.footprint import footprint
from readme_jax.serving.loop import Logged
from readme_jax.serving.traffic import Arrival, load_streams, load_trace

MAIN = "gpu_replay"
ABOUT = ("router", "trace", "capacity", "prefetch", "scheduler", "rate", "requests")  # what a row is of
SHOWN = ("mean", "p95", "p99_ttft", "loads", "over_limit", "throughput")
FULL = 48  # requests of the queue that the rate is measured with


class Logging:
    """What `_engine.run` serves with: the engine and its log stay at hand."""

    def __init__(self, served: Served) -> None:
        self.served, self.log = served, list[Logged]()
        self.last: Engine | None = None

    def engine(self, settings: config.Serving, log: list[Logged]) -> Engine:
        """An engine in the place of the last one, see `Served.engine`."""
        self.log, self.last = log, None
        self.last = self.served.engine(settings, log)
        return self.last


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
    compute = float(np.sum(costs.compute(tokens, np.full(len(tokens), found["unique_experts"]))))
    transfer = store.bytes_loaded / link
    return found | {
        "steps_seconds": busy,
        "compute_seconds": compute,
        "transfer_seconds": transfer,
        "over_limit": busy / max(compute, transfer),
        "throughput": sum(ask.output for ask in asks) / found["seconds"],
        "predicted_bytes": footprint(server.served.programs).most,
        "in_use_bytes": (jax.devices()[0].memory_stats() or {}).get("bytes_in_use", 0),
    }


def replay(results: Rows, args: argparse.Namespace, router: str, began: float) -> None:
    """All runs of one router."""
    c = shape(args.layers, args.tiny)
    limits = Limits(args.rows, args.length, chunks=args.chunks, decode=(args.rows,), prompts=(args.length,))
    server = Logging(Served(c, script(load_streams(RESULTS / "routes.npz", ROUTERS[router]), c.vocab_size), limits))
    link = arrival_rate(512)
    print(
        f"ready after {time.perf_counter() - began:.0f} s; {server.served.costs}; link {link / 1e9:.1f} GB/s; "
        f"temporaries {server.served.temporaries() / 1e9:.1f} GB",
        flush=True,
    )
    rate = args.rate
    for name in args.traces:
        trace = load_trace(args.data / f"azure_2023_{name}.jsonl.gz")
        if rate is None:
            full = window(trace, FULL, 1, args.length, c.vocab_size, args.longest)
            seconds = run(server, full, server.served.settings("decode_first"), 0.0, link)["seconds"]
            rate = FULL / seconds
            results.tell(**{f"saturated_{router}_{name}": rate})
        count = max(round(args.load * rate * args.seconds), 4)
        asks = window(trace, count, args.seed, args.length, c.vocab_size, args.longest)
        stretch = args.seconds / max(asks[-1].arrival, 1e-9)
        for slots in args.slots:
            for scheduler, prefetch in [*((s, True) for s in args.schedulers), *((s, False) for s in args.on_demand)]:
                if slots == 0 and not prefetch:
                    continue
                if time.perf_counter() - began > args.minutes * 60 - args.seconds:
                    print(f"{args.minutes} minutes: the rest was not begun", flush=True)
                    return
                settings = server.served.settings(scheduler, slots, args.staging, prefetch)
                about = {
                    "trace": name,
                    "load": args.load,
                    "rate": args.load * rate,
                    "scheduler": scheduler,
                    "router": router,
                }
                held = {"resident": "slots" if slots else "all", "capacity": slots or EXPERTS, "prefetch": prefetch}
                found = run(server, asks, settings, stretch, link)
                results.add(**about, **held, budget=settings.budget, requests=count, **found)
        rate = args.rate


def main() -> None:
    """Replay and write results/gpu_replay.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=RESULTS.parents[2] / "shared" / "data" / "traces")
    parser.add_argument("--seconds", type=float, default=60, help="of a window")
    parser.add_argument("--minutes", type=float, default=9, help="after which no run is begun")
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--rate", type=float, help="saturated requests a second; default: measured")
    parser.add_argument("--traces", nargs="+", default=["conv"], choices=TRACES)
    parser.add_argument("--routers", nargs="+", default=["label"], choices=tuple(ROUTERS))
    parser.add_argument("--schedulers", nargs="*", default=list(SCHEDULERS), choices=SCHEDULERS)
    parser.add_argument("--on_demand", nargs="*", default=[], choices=SCHEDULERS, help="also without prefetching")
    parser.add_argument("--slots", type=int, nargs="+", default=[0], help="experts a layer on the device; 0: all")
    parser.add_argument("--staging", type=int, default=1, help="experts that stream beside the slots")
    parser.add_argument("--rows", type=int, default=24, help="with 24 and 4096 tokens 88 GB")
    parser.add_argument("--length", type=int, default=4096, help="tokens a row")
    parser.add_argument("--longest", type=int, default=512, help="answer")
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 2048])
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
    results = Rows(args.name, layers=args.layers, window_seconds=args.seconds, rows_of_cache=args.rows)
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        for router in args.routers:
            try:
                replay(results, args, router, began)
            except ConfigError as error:
                raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
