"""A whole run from gin files, and what it is compared with: an equally tuned dense slice, the dense model's answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from readme_jax import config
from readme_jax.checkpoints.hf import load_dense
from readme_jax.checkpoints.mixture import load_mixture
from readme_jax.cli.answer import answer
from readme_jax.cli.settings import LoadedRun, load, save_settings
from readme_jax.cli.sources import tokenizer_of
from readme_jax.cli.tables import print_summary
from readme_jax.errors import ConfigError
from readme_jax.files import write_text
from readme_jax.generate import Generator
from readme_jax.parallel.distributed import lead
from readme_jax.parallel.job import take_part
from readme_jax.report.page import write_report
from readme_jax.runner import EXPORT, execute

SLICE = "dense_slice"  # folder of the baseline's run, inside the run's own


def refactor(
    gin_files: Sequence[str],
    gin_params: Sequence[str] = (),
    output: str | None = None,
    resume: bool = True,
    compare: bool = False,
    prompt: str | None = None,
) -> dict[str, Any]:
    """Run what gin files say and return its summary, also in `<output>/summary.json`.

    `compare` tunes a dense slice of the same width on the same tokens too; `prompt` is answered by the tuned mixture
    and by the dense model. An interrupted run goes on where it was unless `resume` is false. Raises ReadMeErrors on
    bad input and Interrupted (a SystemExit) once a run that got SIGINT or SIGTERM has saved itself. Started on every
    host of a pod or cluster, it is one job of all of them (docs/pods.md).
    """
    loaded = load(gin_files, gin_params)
    if output is not None:
        loaded = loaded._replace(run=replace(loaded.run, output=output))
    for place in (Path(loaded.run.output), *Path(loaded.run.output).parents):
        if place.is_file():
            raise ConfigError(f"Run.output = {loaded.run.output!r}: {place} is a file; give a folder")
    with take_part(loaded.run):
        return _refactor(loaded, resume, compare, prompt)


def _refactor(loaded: LoadedRun, resume: bool, compare: bool, prompt: str | None) -> dict[str, Any]:
    summary = _execute(loaded, resume)
    run = loaded.run
    if compare:
        dense = {domain: row["dense"] for domain, row in summary["domains"].items()}
        baseline = execute(dense_slice(run), resume, dense)
        for domain, row in summary["domains"].items():
            row[SLICE] = baseline["domains"][domain]["tuned"]
        summary["geo_mean"][SLICE] = baseline["geo_mean"]["tuned"]
        summary["seconds"] += baseline["seconds"]
        summary["peak_memory_gb"] = baseline["peak_memory_gb"]  # of the process, which it only ever raises
    if not lead():
        return summary
    if prompt is not None:
        summary |= answers(run, prompt)
    if compare or prompt is not None:
        write_text(Path(run.output) / "summary.json", json.dumps(summary, indent=2) + "\n")
        write_report(run.output)
    print_summary(summary, str(Path(run.output) / "report.html"), Console())
    return summary


def _execute(loaded: LoadedRun, resume: bool) -> dict[str, Any]:
    """Execute a run and leave its settings beside it; one that ends on bad input leaves none."""
    try:
        summary = execute(loaded.run, resume)
    except SystemExit:  # interrupted, and saved
        if lead():
            save_settings(loaded, loaded.run.output)
        raise
    if lead():
        save_settings(loaded, loaded.run.output)
    return summary


def dense_slice(run: config.Run) -> config.Run:
    """The baseline of Table 5: one slice of the same width for all domains, tuned on the same tokens."""
    one = replace(run.slice, experts="one", num_experts=0, top_k=1)
    return replace(run, output=str(Path(run.output) / SLICE), slice=one)


def answers(run: config.Run, prompt: str) -> dict[str, str]:
    """Greedy answers of the run's exported mixture and of its dense model."""
    out = {"prompt": prompt}
    mixture = load_mixture(Path(run.output) / EXPORT)
    out["answer"] = answer(Generator(mixture), tokenizer_of(mixture, run.output), prompt)
    del mixture
    dense = load_dense(run.model.checkpoint)
    out["dense_answer"] = answer(Generator(dense), tokenizer_of(dense, run.model.checkpoint), prompt)
    return out
