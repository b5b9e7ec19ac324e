"""Plans of the 7B recipes on TPU pods: results/plan_MODEL.json and docs/plans/MODEL.txt.

    python benchmarks/plan.py llama2_7b v5p:4x4x4=2,32,1,1 v5p:4x4x4=2,32,1,1,full v6e:8x8=2,32,1,1 v5e:16x16=2,32,1,4

Each argument after the model is a topology and its mesh (data, fsdp, expert, tensor), and where it is not the recipe's
the remat policy. Run it where the extra [plan] is installed: `pip install -e .[plan]` in an environment of its own. A
topology is kept as soon as it is planned.
"""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from _report import write_document, write_results
from rich.console import Console

from readme_jax import config
from readme_jax.checks import check_model
from readme_jax.cli.settings import load_run
from readme_jax.plan.chips import topology
from readme_jax.plan.compiled import Planner, TooLarge
from readme_jax.plan.report import row, show

DOCS = Path("docs/plans")
DOMAINS = 7
WANTED = {"flops_over_active": 1.10, "router_over_dense": 1.15, "mfu": {"v5p": 0.5, "v6e": 0.35}}
# A pod shares the whole batch at once: nothing is accumulated.
BINDINGS = ["ExpertStage.accumulate = 1"]


def main(name: str, *places: str) -> None:
    run = load_run([f"configs/recipes/readme_{name}.gin"], BINDINGS)
    text = io.StringIO()
    console = Console(file=text, width=110, highlight=False, soft_wrap=True)
    console.print(f"configs/recipes/readme_{name}.gin with {', '.join(BINDINGS)}\n", markup=False)
    rows: list[dict[str, Any]] = []
    for place in places:
        where, sizes = place.split("=")
        *axes, policy = [*sizes.split(","), run.model.remat][:5]
        remat = cast(config.Remat, policy)  # which `Model` checks
        mesh = config.Mesh(*(int(n) for n in axes))
        this = replace(run, model=replace(run.model, remat=remat))
        try:
            plan = Planner(this, check_model(run), DOMAINS, topology(where)).plan(mesh)
        except TooLarge as e:
            console.print(f"{where}, mesh {sizes}: {e}\n", markup=False)
            rows.append({"topology": where, "mesh": sizes, "remat": remat, "fits": False, "why": str(e)})
        else:
            show(plan, console)
            console.print()
            rows.append(row(plan))
        write_results(f"plan_{name}", wanted=WANTED, bindings=BINDINGS, rows=rows)
        write_document(DOCS / f"{name}.txt", text.getvalue())
    print(text.getvalue())


if __name__ == "__main__":
    main(*sys.argv[1:])
