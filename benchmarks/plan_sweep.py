"""Meshes of a small pod compared by `readme-jax plan --sweep`: results/plan_sweep.json and docs/plans/sweep_MODEL.txt.

    python benchmarks/plan_sweep.py --model tinyllama_1_1b --topology v5e:2x4 --meshes 4

The paper's run on RedPajama with a model of configs/models/. Run it where the extra [plan] is installed.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from _report import write_document, write_results
from rich.console import Console

from readme_jax.cli.plan import plan
from readme_jax.plan.report import row

DOCS = Path("docs/plans")
RECIPE = "configs/recipes/readme_llama2_7b.gin"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinyllama_1_1b")
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--meshes", type=int, default=4)
    at = parser.parse_args()
    gin = [RECIPE, f"configs/models/{at.model}.gin"]
    text = io.StringIO()
    console = Console(file=text, width=110, highlight=False, soft_wrap=True)
    console.print(f"{' and '.join(gin)}, the first {at.meshes} meshes of {at.topology} that suit\n", markup=False)
    plans = plan(at.topology, gin, [], at.meshes, None, console)
    write_results("plan_sweep", gin=gin, rows=[row(p) for p in plans])
    write_document(DOCS / f"sweep_{at.model}.txt", text.getvalue())
    print(text.getvalue())


if __name__ == "__main__":
    main()
