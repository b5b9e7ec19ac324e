"""`--dry_run`: what a run would be, from its settings alone."""

from __future__ import annotations

import jax
from rich.console import Console
from rich.table import Table

from readme_jax import config
from readme_jax.checks import check_model, check_run, check_text
from readme_jax.cli.settings import resolved
from readme_jax.data.redpajama.files import SOURCES
from readme_jax.parallel.mesh import axis_sizes
from readme_jax.tuning.estimate import PERMANENT, Estimate, estimate

WHAT = {"calibration": "calibration", "router": "router stages", "expert": "expert stages"}


def dry_run(run: config.Run, devices: int | None = None) -> Estimate:
    """Check a run and print its resolved config, parameters, tokens and FLOPs; no weights are read.

    `devices` (default: those here) is what the mesh is checked against. Raises the errors that the run would end with
    before it compiles anything.
    """
    count = len(jax.devices()) if devices is None else devices
    check_run(run, count)
    shape = check_model(run)
    domains = check_text(run.data)
    told = estimate(run, shape, len(domains or SOURCES))
    console = Console(highlight=False, soft_wrap=True)
    console.print(resolved(run), markup=False)
    console.print(_parameters(run, told))
    console.print(_work(told))
    mesh = " x ".join(f"{axis} {size}" for axis, size in axis_sizes(run.mesh, count).items())
    console.print(f"mesh on {count} devices: {mesh}")
    if not run.data.folder:
        console.print("Data.folder is not set: the run will need it")
    if domains is None:
        console.print(f"Data.domains is not known: {len(SOURCES)} are assumed")
    return told


def _parameters(run: config.Run, told: Estimate) -> Table:
    table = Table(title="parameters", title_justify="left")
    table.add_column("model")
    table.add_column("parameters", justify="right")
    sizes = told.parameters
    table.add_row(f"dense, {run.model.checkpoint}", f"{sizes['dense']:,}")
    table.add_row(f"mixture of {told.experts}, total", f"{sizes['total']:,}")
    if sizes["total_most"] != sizes["total"]:
        table.add_row("   where no channel is kept by every expert, at most", f"{sizes['total_most']:,}")
        table.caption = (
            f"calibration decides how many channels are permanent; counted: {PERMANENT:.0%} of an expert's, the paper's"
        )
    table.add_row("   active a token", f"{sizes['active']:,}")
    table.add_row(f"router, {run.router.kind}", f"{sizes['router']:,}")
    return table


def _work(told: Estimate) -> Table:
    table = Table(title="work", title_justify="left")
    table.add_column("stage")
    table.add_column("tokens", justify="right")
    table.add_column("FLOPs", justify="right")
    for name, what in WHAT.items():
        table.add_row(what, f"{told.tokens[name]:,}", f"{told.flops[name]:.3g}")
    table.add_section()
    tuning = told.tokens["router"] + told.tokens["expert"]
    table.add_row("tuning in all", f"{tuning:,}", f"{told.flops['router'] + told.flops['expert']:.3g}")
    table.caption = "evaluation, refit's solves and recomputation by remat not counted"
    return table
