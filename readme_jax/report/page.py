"""From the plain files of a run folder to one HTML page.

What is read, all written by the run; a part whose data is absent is left out of the page:

    config.json     the resolved config
    summary.json    {"domains": {NAME: {"dense", "sliced", "tuned", "dense_slice"}},   validation perplexities
                     "geo_mean": {the same},
                     "experts": [NAME of each expert],
                     "matrix": [E][D] perplexity of each domain forced through each expert,
                     "usage": {NAME: [E] shares of the domain's tokens}, "repeats": share of tokens,
                     "oracle": perplexity, geometric mean, of the best expert a sequence,
                     "tokens": {"calibration", "router", "expert"}, "seconds", "peak_memory_gb",
                     "prompt", "answer", "dense_answer"}
    facts.json      {"experts": [NAME], "overlap": [E][E], "permanent_share": [L]}       of the slices
    metrics.jsonl   the journal (tuning/journal.py): a line a step {"kind": "train", "step", "round", "stage", "loss"}
                    and a line an evaluation {"kind": "evaluation", ..., "perplexity": {NAME: perplexity}}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2

from readme_jax import __version__
from readme_jax.errors import CheckpointError
from readme_jax.files import write_text
from readme_jax.report import plots
from readme_jax.report.style import MODELS
from readme_jax.tuning.journal import read_metrics

NAME = "report.html"
Records = list[dict[str, Any]]


def write_report(run: str | Path) -> Path:
    """Write `report.html` in a run folder and return its path. Raises CheckpointError without a summary.json."""
    run = Path(run)
    if not (run / "summary.json").is_file():
        raise CheckpointError(f"{run}: no summary.json: not the folder of a finished run")
    page = render(_json(run / "summary.json"), _json(run / "facts.json"), read_metrics(run),
                  _json(run / "config.json"))  # fmt: skip
    write_text(run / NAME, page)
    return run / NAME


def render(summary: dict[str, Any], facts: dict[str, Any], metrics: Records, config: dict[str, Any]) -> str:
    """The page as text: see the module's docstring for what it reads."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("readme_jax.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    present = [m for m in MODELS if any(m in row for row in summary["domains"].values())]
    return environment.get_template("page.html").render(
        summary=summary,
        facts=facts,
        config={k: v for k, v in config.items() if isinstance(v, dict)},
        top={k: v for k, v in config.items() if not isinstance(v, dict)},
        models={m: MODELS[m] for m in present},
        tiles=tiles(summary),
        figures=figures(summary, facts, metrics),
        version=__version__,
    )


def figures(summary: dict[str, Any], facts: dict[str, Any], metrics: Records) -> dict[str, str]:
    """Inline SVG of each figure whose data is there."""
    experts = summary.get("experts") or facts.get("experts") or []
    drawn = {"domains": plots.perplexity_by_domain(summary["domains"], summary["geo_mean"])}
    if summary.get("matrix"):
        drawn["matrix"] = plots.expert_matrix(summary["matrix"], experts, list(summary["domains"]))
    if any(r["kind"] == "train" for r in metrics):
        drawn["training"] = plots.training(metrics)
    if len(facts.get("overlap", [])) > 1:
        drawn["overlap"] = plots.overlap(facts["overlap"], experts)
    if any(facts.get("permanent_share", [])):
        drawn["permanent"] = plots.permanent_share(facts["permanent_share"])
    if summary.get("usage"):
        drawn["usage"] = plots.expert_use(summary["usage"], experts)
    return drawn


def tiles(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The headline figures: (value, what it is)."""
    mean = summary["geo_mean"]
    out = [(_number(mean["tuned"]), "perplexity of the tuned mixture, geometric mean over domains")]
    for other, label in (("dense", "the dense model's"), ("dense_slice", "the equally tuned dense slice's")):
        if other in mean:
            out.append((f"{mean['tuned'] / mean[other]:.2f}×", f"{label} perplexity ({_number(mean[other])})"))
    if "repeats" in summary:
        out.append((f"{summary['repeats']:.0%}", "of tokens repeat the last token's expert"))
    if "tokens" in summary and "expert" in summary["tokens"]:
        out.append((f"{summary['tokens']['expert']:,}", "tokens of expert tuning"))
    return out


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
