"""What the parts of replay.py share: traffic of traces and routers, one simulated run, and what it measures."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from _report import RESULTS

from readme_jax.serving.cost import DEVICES, SHAPES, CostModel
from readme_jax.serving.expert_cache import ExpertCache
from readme_jax.serving.scheduler import make_scheduler
from readme_jax.serving.simulate import Outcome, Setup, simulate
from readme_jax.serving.traffic import Arrival, Request, load_streams, load_trace, make_traffic

SHARED = Path(os.environ.get("READ_ME_DATA", Path(__file__).parents[2] / "shared" / "data"))
ROUTERS = {"label": "best", "eq4": "eq4"}  # the runs of routes.npz: tuned on domain labels, and by Eq. 4
TRACES = ("conv", "code")
BASELINES = ("decode_first", "prefill_first", "algorithm1")
STAGING = 3  # slots of the ring


@dataclass(frozen=True)
class Case:
    """One simulated run."""

    trace: str
    router: str
    scheduler: str
    budget: int
    slots: int  # 0: all resident
    rate: float | None  # requests a second; None: all at once
    shape: str
    device: str
    count: int
    seed: int = 0


@cache
def trace(name: str) -> list[Arrival]:
    """The Azure trace of a service."""
    return load_trace(SHARED / "traces" / f"azure_2023_{name}.jsonl.gz")


@cache
def streams(router: str) -> dict[str, np.ndarray]:
    """Routes of real text by a tuned router."""
    return load_streams(RESULTS / "routes.npz", ROUTERS[router])


def model_of(case: Case) -> CostModel:
    """The cost model of a case."""
    return CostModel(SHAPES[case.shape], DEVICES[case.device])


def requests_of(case: Case) -> list[Request]:
    """The requests of a case."""
    return make_traffic(trace(case.trace), streams(case.router), case.count, case.rate, case.seed)


def serve(case: Case) -> Outcome:
    """Simulate a case, with staging, Belady and roll-out for every scheduler; only lookahead gains from swaps."""
    model = model_of(case)
    experts = model.shape.num_experts
    scheduler = make_scheduler(case.scheduler, case.budget, model.costs(), experts)
    setup = Setup(swaps=case.scheduler == "lookahead")
    return simulate(requests_of(case), scheduler, ExpertCache(experts, case.slots, STAGING), model, setup)


def measure(case: Case) -> dict[str, Any]:
    """The figures of batching.json for a case, and its throughput."""
    outcome = serve(case)
    latency, first = outcome.latency(), outcome.first_token()
    return {
        "unique_experts": outcome.unique_experts,
        "mean": float(latency.mean()),
        "p95": float(np.percentile(latency, 95)),
        "p99_ttft": float(np.percentile(first, 99)),
        "longest_wait": max(served.longest_wait for served in outcome.served),
        "throughput": outcome.throughput(),
    }


def measure_all(cases: list[Case], processes: int) -> dict[Case, dict[str, Any]]:
    """`measure` of many cases, in so many processes."""
    if processes == 1:
        return {case: measure(case) for case in cases}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return dict(zip(cases, pool.map(measure, cases), strict=True))


def finish(figure: Any, axes: Any, path: Path, across: str, up: str) -> None:
    """Legend, labels of the outer panels, and the file of a figure of rows and columns of panels."""
    axes[0, 0].legend(frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel(across)
    for axis in axes[:, 0]:
        axis.set_ylabel(up)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
