"""The best learning rate of each arm of Table 5, at its number of tuning tokens: every arm is given its own.

Each arm is sliced and its router trained once; every rate then starts from there. A rate at the end of an arm's range
is followed by the next beyond it, so that no arm's best is at an end. Arms that `--output` holds are not run again.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from _arms import LEARNING_RATES, arguments, arm_run
from _report import write_results
from rich.console import Console
from rich.table import Table

from readme_jax import runner
from readme_jax.checkpoints.store import Store
from readme_jax.evaluation.perplexity import Evaluator, geometric_mean, perplexities
from readme_jax.files import write_text
from readme_jax.parallel.mesh import make_mesh
from readme_jax.tuning.journal import Journal
from readme_jax.tuning.rounds import Parts, Progress, Tuner


def tuned(s: runner.Setting, parts: Parts, start: Progress, lr: float, router_steps: int) -> Progress:
    """Run only the router stage (lr 0) or only the expert stage at a rate, from `start`, which is left as it is."""
    run = s.run
    stages = (
        {"expert_stage": replace(run.expert_stage, steps=0)}
        if router_steps
        else {"router_stage": replace(run.router_stage, steps=0), "expert_stage": replace(run.expert_stage, lr=lr)}
    )
    run = replace(run, **stages)
    sources: dict[Any, Any] = {
        "router": s.corpus.batches("router", run.router_stage.batch, run.seed),
        "experts": s.corpus.batches("experts", run.expert_stage.batch, run.seed),
    }
    progress = replace(start, done=0)
    journal = Journal(s.output / f"lr-{lr:g}", None)
    Tuner(run, parts, sources, s.mesh, journal, lambda progress: None).tune(progress)
    journal.close()
    return progress


def search(arm: str, data: str, output: Path, params: list[str]) -> list[dict[str, Any]]:
    """Rows {arm, lr, tokens, geo_mean} of one arm, kept in its folder."""
    run = arm_run(arm, data, output, params)
    kept = Path(run.output) / "rows.json"
    if kept.exists():
        return json.loads(kept.read_text())
    mesh = make_mesh(run.mesh)
    rows: dict[float, float] = {}
    with jax.set_mesh(mesh):
        s = runner.prepare(run, Path(run.output), mesh, Store(Path(run.output) / "checkpoints"), 0.0)
        done = s.store.latest()
        meta = runner.slice_dense(s) if done is None else s.store.meta(done)
        parts, start = runner.take_up(s, meta)
        if parts.mixture.num_experts > 1:
            start = tuned(s, parts, start, 0.0, run.router_stage.steps)
        evaluator = Evaluator(parts.model, parts.mixture, s.runtime, mesh)

        def measure(lr: float) -> None:
            progress = tuned(s, parts, start, lr, 0)
            routes = runner.own_routes(parts, progress.router)
            losses = evaluator.domains(progress.backbone, s.validation, routes, parts.channels)
            rows[lr] = geometric_mean(perplexities(losses).values())
            print(f"{arm}: lr {lr:g} -> {rows[lr]:.3f}", flush=True)

        for lr in LEARNING_RATES[arm]:
            measure(lr)
        while (best := min(rows, key=rows.__getitem__)) in (min(rows), max(rows)):
            measure(best / 2 if best == min(rows) else best * 2)
    tokens = run.expert_stage.steps * run.expert_stage.batch * run.data.sequence_length
    found = [{"arm": arm, "lr": lr, "tokens": tokens, "geo_mean": value} for lr, value in sorted(rows.items())]
    write_text(kept, json.dumps(found))
    return found


def main() -> None:
    """Search all arms and write results/lr_search.json; with --arm search that one alone and write nothing there."""
    args = arguments(__doc__, "runs/lr_search", LEARNING_RATES)
    arms = [args.arm] if args.arm else list(LEARNING_RATES)
    rows = [row for arm in arms for row in search(arm, args.data, args.output, args.gin_param)]
    if args.arm:
        return
    table = Table("arm", "lr", "tokens", "geo mean", title="Learning rate of each arm")
    for row in rows:
        table.add_row(row["arm"], f"{row['lr']:g}", f"{row['tokens']:,}", f"{row['geo_mean']:.3f}")
    Console().print(table)
    write_results("lr_search", rows=rows)


if __name__ == "__main__":
    main()
