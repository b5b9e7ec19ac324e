"""Serving replayed: `python benchmarks/replay.py --part cache|batching|prefetch|devices`, simulated at 7B, and
`--part engine`, a real engine on this machine.

Azure traces give arrivals and lengths, tuned routers on real text the routes (`results/routes.npz`, which routes.py
writes), `readme_jax.serving.cost` the seconds. Every scheduler gets the same rows, ring of staging slots and Belady
cache with roll-out. Writes results/PART.json and PART.png.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import matplotlib

matplotlib.use("Agg")
import _batching
import _cache
import _devices
import _engine
import _prefetch
from _replay import ROUTERS, SHARED, TRACES, Case
from _report import RESULTS, show_rows, write_results

from readme_jax.serving.cost import DEVICES, SHAPES

OVERLOAD = 1.2


def cache(base: Case, name: str, about: dict[str, Any]) -> None:
    """cache.json: hit ratios of policies, in overload at 64 tokens a batch, and Table 4."""
    limits = {(t, r): _cache.saturated(base, t, r) for t in TRACES for r in ROUTERS}
    rows = _cache.cache_rows(base, limits, OVERLOAD)
    table4, summary = _cache.table4_rows(), _cache.summary(rows)
    show_rows("Table 4", table4)
    show_rows("Belady with roll-out against LRU and the optimum", summary)
    write_results(name, **about, rows=rows, table4=table4, summary=summary)
    _cache.plot(rows, RESULTS / f"{name}.png")


def batching(base: Case, name: str, about: dict[str, Any], capacity: int, processes: int) -> None:
    """batching.json: four schedulers on two traces, at three loads, with two routers, resident or not."""
    rows, ratios = _batching.batching(base, capacity, processes)
    show_rows("lookahead over the best baseline", ratios)
    write_results(name, **about, rows=rows, ratios=ratios)
    _batching.plot(rows, RESULTS / f"{name}.png")


def prefetch(base: Case, name: str, about: dict[str, Any]) -> None:
    """prefetch.json: latency, hidden load time and steps against their limit."""
    rows = _prefetch.prefetch_rows(base)
    show_rows("Prefetch", rows)
    write_results(name, **about, rows=rows)
    _prefetch.plot(rows, RESULTS / f"{name}.png")


def devices(base: Case, name: str, about: dict[str, Any], capacity: int, processes: int) -> None:
    """devices.json: both models on every accelerator, conversations, label router."""
    rows = _devices.device_rows(replace(base, slots=capacity), processes)
    show_rows(f"{capacity} experts resident, 70% load", rows)
    write_results(
        name, **{k: v for k, v in about.items() if k not in ("shape", "device")}, capacity=capacity, rows=rows
    )


def engine(name: str, args: argparse.Namespace) -> None:
    """replay_engine.json: a real engine, and the simulation of its log."""
    rows, fig6, about = _engine.engine_rows(args.checkpoint, args.engine_requests, args.seed)
    show_rows("Real engine", [{name: row[name] for name in _engine.SHOWN} for row in rows])
    show_rows("Loads ahead or on demand", fig6)
    write_results(name, **about, seed=args.seed, rows=rows, prefetch=fig6)
    _engine.plot(fig6, RESULTS / f"{name}.png")


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("cache", "batching", "prefetch", "devices", "engine"), required=True)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama2_7b")
    parser.add_argument("--device", choices=tuple(DEVICES), default="a100")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--capacity", type=int, default=3, help="resident experts a layer (batching)")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="of the result, when not the part's: another shape or device")
    parser.add_argument("--checkpoint", default="runs/demo/export", help="a mixture (engine); absent: a random one")
    parser.add_argument("--engine_requests", type=int, default=24)
    args = parser.parse_args()
    if not (SHARED / "traces").is_dir():
        parser.exit(1, f"no traces at {SHARED / 'traces'}: set READ_ME_DATA to the folder that holds them\n")
    base = Case("conv", "label", "decode_first", 64, 3, None, args.shape, args.device, args.requests, args.seed)
    about = {"shape": args.shape, "device": args.device, "requests": args.requests, "seed": args.seed}
    name = args.name or args.part
    if args.part == "cache":
        cache(base, name, about)
    elif args.part == "batching":
        batching(base, name, about, args.capacity, args.processes)
    elif args.part == "devices":
        devices(base, name, about, args.capacity, args.processes)
    elif args.part == "engine":
        engine(args.name or "replay_engine", args)
    else:
        prefetch(base, name, about)


if __name__ == "__main__":
    main()
