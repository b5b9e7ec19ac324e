"""The batching part of replay.py: four schedulers at three loads, each baseline at its best budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from _replay import BASELINES, ROUTERS, TRACES, Case, finish, measure_all

BUDGETS = (64, 512, 4096)  # tokens a batch; the baselines' best is searched among these
LOOKAHEAD_BUDGET = 4096
UNIQUE = ("decode_first", "algorithm1")  # whose experts a batch are compared, at the smallest budget
LOADS = (0.3, 0.7, 1.2)
WORTH = 0.7  # a budget is tried at all loads when it saturates at this share of its scheduler's best
FIGURES = ("unique_experts", "mean", "p95", "p99_ttft", "longest_wait")


def batching(base: Case, capacity: int, processes: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of batching.json, and lookahead's ratios to the best baseline."""
    rows, ratios = [], []
    for router in ROUTERS:
        for trace in TRACES:
            for slots in (capacity, 0):
                here = replace(base, router=router, trace=trace, slots=slots)
                found = _configuration(here, processes)
                rows += found
                ratios += [_compare([r for r in found if r["load"] == load]) for load in LOADS]
    return rows, ratios


def _configuration(here: Case, processes: int) -> list[dict[str, Any]]:
    trials = [replace(here, scheduler=s, budget=b, rate=None) for s in BASELINES for b in BUDGETS]
    saturated = {case: found["throughput"] for case, found in measure_all(trials, processes).items()}
    limit = max(saturated.values())
    best = {s: max(v for case, v in saturated.items() if case.scheduler == s) for s in BASELINES}
    kept = [case for case, v in saturated.items() if v >= WORTH * best[case.scheduler]]
    kept.append(replace(here, scheduler="lookahead", budget=LOOKAHEAD_BUDGET))
    cases = {replace(case, rate=load * limit): load for case in kept for load in LOADS}
    if here.slots:  # for the comparison of unique experts
        small = [replace(here, scheduler=s, budget=BUDGETS[0]) for s in UNIQUE]
        cases |= {replace(case, rate=load * limit): load for case in small for load in LOADS}
    rows = [_row(case, cases[case], found) for case, found in measure_all(list(cases), processes).items()]
    for load in LOADS:
        for scheduler in (*BASELINES, "lookahead"):
            same = [r for r in rows if (r["load"], r["scheduler"]) == (load, scheduler)]
            min(same, key=lambda r: r["mean"])["best_budget"] = True
    return [r for r in rows if r["best_budget"] or r["budget"] == BUDGETS[0]]


def _row(case: Case, load: float, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "trace": case.trace,
        "load": load,
        "rate": case.rate,
        "scheduler": case.scheduler,
        "router": case.router,
        "resident": "slots" if case.slots else "all",
        "capacity": case.slots or 7,
        "budget": case.budget,
        "best_budget": False,
        **{name: found[name] for name in FIGURES},
    }


def _compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Lookahead against the best of the others, figure by figure; Algorithm 1's experts against decode-first's."""
    ours = next(r for r in rows if r["scheduler"] == "lookahead")
    others = [r for r in rows if r["scheduler"] in BASELINES and r["best_budget"]]
    small = {r["scheduler"]: r["unique_experts"] for r in rows if r["budget"] == BUDGETS[0]}
    ratio = {"algorithm1_unique_experts": small[UNIQUE[1]] / small[UNIQUE[0]]} if set(UNIQUE) <= set(small) else {}
    return {
        **{key: ours[key] for key in ("trace", "load", "router", "resident")},
        **{name: ours[name] / min(r[name] for r in others) for name in ("mean", "p95", "p99_ttft")},
        **ratio,
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Mean normalised latency against load, a panel a trace and residency, for the label router."""
    panels = [(trace, resident) for resident in ("slots", "all") for trace in TRACES]
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True)
    colours = dict(zip((*BASELINES, "lookahead"), ("#94a3b8", "#64748b", "#b45309", "#0f766e"), strict=True))
    for axis, (trace, resident) in zip(axes.flat, panels, strict=True):
        for scheduler, colour in colours.items():
            wanted = {"trace": trace, "resident": resident, "scheduler": scheduler, "router": "label"}
            same = [r for r in rows if r["best_budget"] and all(r[k] == v for k, v in wanted.items())]
            values = [next(r["mean"] for r in same if r["load"] == load) for load in LOADS]
            axis.plot(np.array(LOADS) * 100, values, "o-", color=colour, label=scheduler)
        axis.set_yscale("log")
        capacity = next(r["capacity"] for r in rows if r["resident"] == "slots")
        axis.set_title(f"{trace}, {'all resident' if resident == 'all' else f'{capacity} slots'}")
        axis.spines[["top", "right"]].set_visible(False)
    finish(figure, axes, path, "load, % of the best baseline's saturated throughput", "latency, s a generated token")
