"""`readme-jax plan`: compile a run's steps for a TPU topology here, and say what they need there."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from readme_jax import config
from readme_jax.checks import check_model
from readme_jax.cli.settings import load_run
from readme_jax.data.redpajama.files import SOURCES
from readme_jax.errors import ConfigError
from readme_jax.files import write_text
from readme_jax.plan.chips import topology
from readme_jax.plan.compiled import Plan, Planner, TooLarge
from readme_jax.plan.report import mesh_name, row, show
from readme_jax.plan.sweep import shapes


def plan(
    name: str, gin_files: Sequence[str], gin_params: Sequence[str], sweep: int, out: str | None, console: Console
) -> list[Plan]:
    """Plan a run's mesh, or with `sweep` the first so many that suit it, and recommend the cheapest that fits.

    Prints every plan; `out` is a JSON file of rows. Raises ConfigError where nothing suits or nothing fits.
    """
    run = load_run(gin_files, gin_params)
    target, model = topology(name), check_model(run)
    domains = len(run.data.domains or SOURCES)
    planner = Planner(run, model, domains, target)
    chips = math.prod(target.shape)
    meshes = shapes(run, model, planner.shapes.mixture, chips)[:sweep] if sweep else [run.mesh]
    if not meshes:
        raise ConfigError(
            f"no mesh of {chips} chips suits the batches: change a batch, ExpertStage.accumulate or the topology"
        )
    plans = []
    for mesh in meshes:
        made = _one(planner, mesh, console, stop=not sweep)
        plans += [made] if made else []
    if sweep:
        recommend(plans, console)
    if out:
        write_text(Path(out), json.dumps({"rows": [row(p) for p in plans]}, indent=2) + "\n")
    return plans


def _one(planner: Planner, mesh: config.Mesh, console: Console, stop: bool) -> Plan | None:
    try:
        made = planner.plan(mesh)
    except TooLarge as e:
        if stop:
            raise
        console.print(f"mesh {mesh}: {e}")
        return None
    show(made, console)
    return made


def recommend(plans: list[Plan], console: Console) -> Plan:
    """The plan of fewest chip-hours that fits. Raises ConfigError where none does."""
    fitting = [p for p in plans if p.fits]
    if not fitting:
        raise ConfigError(
            "no mesh of the sweep fits: raise ExpertStage.accumulate, set Model.remat = 'full', or rent more chips"
        )
    best = min(fitting, key=lambda p: p.chip_hours)
    lines = ", ".join(f"Mesh.{axis} = {size}" for axis, size in best.mesh.items())
    console.print(f"recommended: {mesh_name(best.mesh)} ({best.chip_hours:,.0f} chip-hours): {lines}")
    return best
