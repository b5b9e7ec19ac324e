"""The prefetch part of replay.py: latency with and without, and how much load time hides behind compute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from _cache import CAPACITIES
from _replay import STAGING, Case, model_of, requests_of

from readme_jax.serving.expert_cache import ExpertCache
from readme_jax.serving.scheduler import make_scheduler
from readme_jax.serving.simulate import Outcome, Setup, simulate

BATCHES = (1, 8, 32, 128)  # sequences that decode together
# How far ahead, and staging slots; `swaps` is lookahead with residents swapped in the background.
MODES = (("off", 0), ("layer", 0), ("batch", 0), ("off", STAGING), ("batch", STAGING), ("swaps", STAGING))
PREFILL = 512  # tokens a batch beside the decodes


def prefetch_rows(base: Case) -> list[dict[str, Any]]:
    """Rows of prefetch.json: a queue that never empties, at every capacity and batch, decode-first but for `swaps`."""
    rows = []
    for batch in BATCHES:
        case = replace(base, scheduler="decode_first", budget=batch + PREFILL, rate=None, count=max(32, 2 * batch))
        for capacity in CAPACITIES:
            for prefetch, staging in MODES:
                rows.append(_row(case, capacity, batch, prefetch, staging))
    return rows


def _row(case: Case, capacity: int, batch: int, prefetch: str, staging: int) -> dict[str, Any]:
    model = model_of(case)
    swaps = prefetch == "swaps"
    setup = Setup(rows=batch, prefetch="batch" if swaps else prefetch, swaps=swaps)  # type: ignore[arg-type]
    experts = model.shape.num_experts
    scheduler = make_scheduler("lookahead" if swaps else "decode_first", case.budget, model.costs(), experts)
    outcome = simulate(requests_of(case), scheduler, ExpertCache(experts, capacity, staging), model, setup)
    return {
        "capacity": capacity,
        "batch": batch,
        "prefetch": prefetch,
        "staging": staging,
        "mean": float(service(outcome).mean()),
        "hidden_share": hidden_share(outcome, model.costs().load),
        "step_over_limit": float(np.mean([s.total / max(s.compute, s.transfer) for s in outcome.steps if s.transfer])),
        "late": sum(s.late for s in outcome.steps),
    }


def service(outcome: Outcome) -> np.ndarray:
    """Seconds a generated token of each request from its first token on: the queue before it says nothing here."""
    return np.array([(s.done - s.first_token) / max(s.request.output - 1, 1) for s in outcome.served])


def hidden_share(outcome: Outcome, load: float) -> float:
    """Share of the link's time that no step waited for; `load` is the seconds of a swap."""
    moved = sum(s.transfer for s in outcome.steps) + outcome.swaps * load
    waited = sum(s.total - s.compute for s in outcome.steps)
    return 1.0 if moved == 0 else 1 - waited / moved


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Latency over on-demand loading against capacity (Fig 6), a panel a batch."""
    figure, axes = plt.subplots(1, len(BATCHES), figsize=(12, 3.4), sharey=True)
    colours = ("#94a3b8", "#64748b", "#b45309", "#5eead4", "#0f766e", "#0f172a")
    for axis, batch in zip(axes, BATCHES, strict=True):
        here = [r for r in rows if r["batch"] == batch]
        base = {r["capacity"]: r["mean"] for r in here if (r["prefetch"], r["staging"]) == MODES[0]}
        for (prefetch, staging), colour in zip(MODES, colours, strict=True):
            same = [r for r in here if (r["prefetch"], r["staging"]) == (prefetch, staging)]
            values = [r["mean"] / base[r["capacity"]] for r in same]
            label = f"{prefetch}{', staging' if staging else ''}"
            axis.plot([r["capacity"] for r in same], values, "o-", color=colour, label=label)
        axis.set_title(f"batch {batch}")
        axis.set_xticks(CAPACITIES)
        axis.set_xlabel("experts resident, of 7")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("latency over on-demand loading")
    axes[0].legend(frameon=False, title="prefetch")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
