"""How long `table5.py` takes on this machine, from its parts: `python benchmarks/table5_time.py`.

Every arm is sliced on two small amounts of calibration text (the cost is a line in tokens), tuned for a few steps of
each stage, and evaluated on a few windows, after what compiles has compiled; the whole is summed from the full amounts.
Writes results/table5_time.json: rows {arm, part, seconds, measured}, `measured` the seconds that were run, and `hours`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _arms import ARMS, arguments, arm_run, searched_rate
from _report import write_results
from lr_search import tuned
from rich.console import Console
from rich.table import Table

from readme_jax import runner
from readme_jax.checkpoints.store import Store
from readme_jax.config import Run
from readme_jax.evaluation.perplexity import Evaluator
from readme_jax.parallel.mesh import make_mesh
from readme_jax.slicing import start
from readme_jax.tuning.journal import read_metrics
from readme_jax.tuning.rounds import Progress
from readme_jax.tuning.schedule import schedule_of

SIZES = (4096, 12288)  # calibration tokens a domain
STEPS = 5
WINDOWS = 4  # of an evaluation


class Clock:
    """Rows of one arm."""

    def __init__(self, arm: str) -> None:
        self.arm = arm
        self.rows: list[dict[str, Any]] = []

    def note(self, part: str, seconds: float, measured: float) -> None:
        """A part's seconds in full, and those that were run."""
        self.rows.append({"arm": self.arm, "part": part, "seconds": seconds, "measured": measured})
        print(f"{self.arm:18} {part:10} {seconds:8.0f} s (ran {measured:.0f} s)", flush=True)


def slicing(s: runner.Setting, clock: Clock) -> None:
    """Slice on both sizes; the last one is saved as the run's start."""
    took = []
    for size in SIZES:
        run = replace(s.run, slice=replace(s.run.slice, calibration_tokens=size))
        text = runner.calibration_text(replace(s, run=run))
        began = time.perf_counter()
        jax.block_until_ready(start(run, s.dense, text, s.runtime, s.mesh).params)
        took.append(time.perf_counter() - began)
    rate = max(took[1] - took[0], 0.0) / (SIZES[1] - SIZES[0])
    clock.note("slice", took[1] + rate * (s.run.slice.calibration_tokens - SIZES[1]), sum(took))


def tuning(s: runner.Setting, parts: Any, progress: Progress, clock: Clock) -> None:
    """A few steps of each stage; the first, which compiles, is counted once."""
    schedule = schedule_of(s.run, parts.mixture.num_experts)
    for stage, steps in (("router", schedule.router), ("experts", schedule.experts)):
        if not steps:
            continue
        run = s.run
        few = replace(
            run,
            router_stage=replace(run.router_stage, steps=STEPS),
            expert_stage=replace(run.expert_stage, steps=STEPS),
            tuning=replace(run.tuning, rounds=1),
        )
        name = s.output / f"time-{stage}"
        tuned(replace(s, run=few, output=name), parts, progress, run.expert_stage.lr, int(stage == "router"))
        (folder,) = name.iterdir()
        seconds = [line["seconds"] for line in read_metrics(folder) if "seconds" in line]
        step = float(np.median(seconds[1:]))
        clock.note(stage, seconds[0] + step * (steps * schedule.rounds - 1), sum(seconds))


def evaluation(s: runner.Setting, parts: Any, progress: Progress, first: bool, clock: Clock) -> None:
    """Validation text through the mixture (untuned, tuned, the curves, every expert alone) and in the first arm through
    the dense model."""
    of = {"mixture": (Evaluator(parts.model, parts.mixture, s.runtime, s.mesh), progress.backbone)}
    if first:
        of["dense"] = (Evaluator(s.dense.config, None, s.runtime, s.mesh), s.dense.params)
    routes = runner.own_routes(parts, progress.router)
    some = next(iter(s.validation.values()))[:WINDOWS]
    tokens, window = sum(w.size for w in s.validation.values()), some.shape[1]
    rounds = schedule_of(s.run, parts.mixture.num_experts).rounds
    curves = (2 * rounds + 1) * len(s.validation) * runner.CURVE_WINDOWS * window
    experts = parts.mixture.num_experts
    matrix = experts * len(s.validation) * window if experts > 1 else 0
    for name, (evaluator, params) in of.items():
        given = (None, None) if name == "dense" else (routes, parts.channels)
        times = []
        for _ in range(2):
            began = time.perf_counter()
            evaluator.losses(params, some, *given)
            times.append(time.perf_counter() - began)
        much = tokens if name == "dense" else 2 * tokens + curves + matrix
        clock.note(f"evaluate {name}", times[0] + times[1] / some.size * much, sum(times))


def arm_time(arm: str, run: Run, first: bool) -> list[dict[str, Any]]:
    """Rows of an arm."""
    clock, mesh = Clock(arm), make_mesh(run.mesh)
    with jax.set_mesh(mesh):
        began = time.perf_counter()
        s = runner.prepare(run, Path(run.output), mesh, Store(Path(run.output) / "checkpoints"), 0.0)
        took = time.perf_counter() - began
        if first:  # the others find the text tokenised
            clock.note("prepare", took, took)
        slicing(s, clock)
        small = replace(s, run=replace(run, slice=replace(run.slice, calibration_tokens=SIZES[0])))
        few = {domain: windows[:1] for domain, windows in s.validation.items()}
        meta = runner.slice_dense(replace(small, validation=few), dict.fromkeys(s.corpus.domains, 1.0))
        parts, progress = runner.take_up(small, meta)
        tuning(s, parts, progress, clock)
        evaluation(s, parts, progress, first, clock)
        s.store.close()
    return clock.rows


def main() -> None:
    """Time all arms, or one alone, and write the rows."""
    args = arguments(__doc__, "runs/table5_time", ARMS)
    rows = []
    for i, arm in enumerate([args.arm] if args.arm else ARMS):
        rows += arm_time(arm, arm_run(arm, args.data, args.output, args.gin_param, searched_rate(arm)), i == 0)
    hours = sum(row["seconds"] for row in rows) / 3600
    table = Table("arm", "part", "minutes", title=f"table5.py here: {hours:.2f} hours")
    for row in rows:
        table.add_row(row["arm"], row["part"], f"{row['seconds'] / 60:.1f}")
    Console().print(table)
    if not args.arm:
        write_results("table5_time", hours=hours, rows=rows)


if __name__ == "__main__":
    main()
