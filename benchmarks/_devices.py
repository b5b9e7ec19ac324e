"""The devices part of replay.py: the models and accelerators that `readme_jax.serving.cost` names, one run each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from _batching import BUDGETS, LOOKAHEAD_BUDGET
from _replay import BASELINES, Case, measure_all, model_of

from readme_jax.serving.cost import DEVICES, SHAPES

LOAD = 0.7


def device_rows(base: Case, processes: int) -> list[dict[str, Any]]:
    """Each baseline at its best budget, and lookahead, at 70% of the best one's saturated throughput."""
    rows = []
    for shape in SHAPES:
        for device in DEVICES:
            here = replace(base, shape=shape, device=device)
            trials = [replace(here, scheduler=s, budget=b, rate=None) for s in BASELINES for b in BUDGETS]
            saturated = {case: found["throughput"] for case, found in measure_all(trials, processes).items()}
            best = [max((c for c in trials if c.scheduler == s), key=saturated.__getitem__) for s in BASELINES]
            best.append(replace(here, scheduler="lookahead", budget=LOOKAHEAD_BUDGET))
            rate = LOAD * max(saturated.values())
            for case, found in measure_all([replace(c, rate=rate) for c in best], processes).items():
                about = {"shape": shape, "device": device, "load_ms": 1e3 * model_of(case).costs().load}
                figures = {name: found[name] for name in ("unique_experts", "mean", "p95", "p99_ttft")}
                rows.append({**about, "rate": rate, "scheduler": case.scheduler, "budget": case.budget, **figures})
    return rows
