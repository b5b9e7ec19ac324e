"""Table 5 on real text: perplexity by domain of the dense model, of mixtures and of dense slices tuned on equal tokens.

Mixtures are routed by their own router, never by the known domain. Resumable: each arm is a run that goes on from its
newest checkpoint. `lr_search.py` comes first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from _arms import ARMS, HERE, arguments, arm_run, searched_rate
from _report import write_results
from rich.console import Console
from rich.table import Table

from readme_jax.cli.settings import resolved
from readme_jax.config import Run
from readme_jax.runner import execute

COLUMNS = ("dense", "sliced", "tuned", "paper", "dense_slice", "dense_slice_refit")
LABELS = ("dense, untuned", "best, untuned", "best, tuned", "paper's recipe", "dense slice", "dense slice, refit")


def summary_of(run: Run, dense: dict[str, float] | None) -> dict[str, Any]:
    """The run's summary: what it left when it is finished, or else of running it (on); `dense` as in `execute`."""
    folder = Path(run.output)
    done = [folder / name for name in ("config.json", "summary.json")]
    if all(path.exists() for path in done) and json.loads(done[0].read_text()) == json.loads(resolved(run)):
        return json.loads(done[1].read_text())
    return execute(run, dense=dense)


def row(summaries: dict[str, dict[str, Any]], pick: Any) -> dict[str, float]:
    """One row of the table: `pick` takes a summary's perplexities by stage."""
    best = pick(summaries["best"])
    others = {arm: pick(summaries[arm])["tuned"] for arm in ARMS if arm != "best"}
    return {"dense": best["dense"], "sliced": best["sliced"], "tuned": best["tuned"], **others}


def show(geo_mean: dict[str, float], domains: dict[str, dict[str, float]]) -> None:
    """The table in the terminal."""
    table = Table("domain", *LABELS, title="Validation perplexity after equal tuning tokens")
    for name, values in [*domains.items(), ("geometric mean", geo_mean)]:
        table.add_row(name, *(f"{values[c]:.2f}" for c in COLUMNS))
    table.add_row("over dense", *(f"{geo_mean[c] / geo_mean['dense']:.3f}" for c in COLUMNS))
    Console().print(table)


def plot(geo_mean: dict[str, float], domains: dict[str, dict[str, float]], path: Path) -> None:
    """Bars by domain, as a ratio to the dense model."""
    rows = {**domains, "geo. mean": geo_mean}
    kinds = ("tuned", "paper", "dense_slice_refit", "dense_slice")
    colours = ("#0f766e", "#b45309", "#64748b", "#cbd5e1")
    figure, axis = plt.subplots(figsize=(9, 4.2))
    for i, (kind, colour) in enumerate(zip(kinds, colours, strict=True)):
        ratios = [values[kind] / values["dense"] for values in rows.values()]
        axis.bar(np.arange(len(rows)) + 0.2 * i - 0.3, ratios, 0.19, color=colour, label=LABELS[COLUMNS.index(kind)])
    axis.axhline(1, color="#334155", linewidth=0.8)
    axis.set_xticks(range(len(rows)), list(rows), rotation=20)
    axis.set_ylabel("perplexity over the dense model's")
    axis.set_title("Half the feed-forward width, equal tuning tokens (lower is better)")
    axis.legend(frameon=False, ncols=2)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run every arm and write results/table5.json and its plot."""
    args = arguments(__doc__, "runs/table5", ARMS)
    summaries: dict[str, dict[str, Any]] = {}
    rates, dense = {}, None  # the dense model is the same in all arms
    for arm in [args.arm] if args.arm else ARMS:
        run = arm_run(arm, args.data, args.output, args.gin_param, searched_rate(arm))
        rates[arm] = run.expert_stage.lr
        summaries[arm] = summary_of(run, dense)
        dense = {domain: values["dense"] for domain, values in summaries[arm]["domains"].items()}
    if args.arm:
        return
    geo_mean = row(summaries, lambda s: s["geo_mean"])
    domains = {d: row(summaries, lambda s, d=d: s["domains"][d]) for d in summaries["best"]["domains"]}
    show(geo_mean, domains)
    plot(geo_mean, domains, HERE / "results" / "table5.png")
    write_results(
        "table5",
        geo_mean=geo_mean,
        domains=domains,
        tokens={arm: summary["tokens"] for arm, summary in summaries.items()},
        learning_rates=rates,
        untuned={arm: summary["geo_mean"]["sliced"] for arm, summary in summaries.items()},
        seconds={arm: summary["seconds"] for arm, summary in summaries.items()},
    )


if __name__ == "__main__":
    main()
