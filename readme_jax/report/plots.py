"""The report's figures, each from plain data to inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.patches import Patch

from readme_jax.evaluation.perplexity import geometric_mean
from readme_jax.palette import colour
from readme_jax.report.style import MODELS, MUTED, figure, heatmap, ink_on, styled, svg

STAGES = {"router": ("#009e73", "router stage"), "experts": ("#0072b2", "expert stage")}


@styled
def perplexity_by_domain(domains: Mapping[str, Mapping[str, float]], geo_mean: Mapping[str, float]) -> str:
    """One row a domain, one mark a model, on a logarithmic axis: distances are ratios."""
    names = [*domains, "geometric mean"]
    fig, ax = figure(8.2, 0.42 * len(names) + 1.3)
    rows = {**domains, "geometric mean": geo_mean}
    present = [m for m in MODELS if any(m in row for row in rows.values())]
    for y, name in enumerate(names):
        values = [rows[name][m] for m in present if m in rows[name]]
        ax.plot([min(values), max(values)], [y, y], color=MUTED, linewidth=1, zorder=1)
    for model in present:
        label, face, marker = MODELS[model]
        points = [(rows[name][model], y) for y, name in enumerate(names) if model in rows[name]]
        ax.scatter(*zip(*points, strict=True), s=58, color=face, marker=marker, label=label, zorder=2)
    ax.set_xscale("log")
    ax.set_xticks(*_log_ticks(row[m] for row in rows.values() for m in row if m in MODELS))
    ax.set_xticks([], minor=True)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.axhline(len(names) - 1.5, color=MUTED, linewidth=0.8)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("validation perplexity, logarithmic (left is better)")
    ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=len(present), handletextpad=0.2, columnspacing=1.4)
    return svg(fig, "Validation perplexity of each domain for each model")


def _log_ticks(values: Any) -> tuple[list[float], list[str]]:
    values = list(values)
    low, high = min(values) / 1.1, max(values) * 1.1
    steps = (1, 2, 3, 5, 7) if high / low < 12 else (1, 2, 5)
    ticks = [s * 10.0**p for p in range(-1, 7) for s in steps if low <= s * 10.0**p <= high]
    return ticks, [f"{t:g}" for t in ticks]


@styled
def expert_matrix(perplexity: Sequence[Sequence[float]], experts: Sequence[str], domains: Sequence[str]) -> str:
    """Perplexity [E][D] of each domain's text under each expert; dark is near the best expert of that domain."""
    values = np.asarray(perplexity, float)
    above = np.log(values / values.min(axis=0))  # 0 at the best expert of a column
    fig, ax = figure(1.9 + 0.85 * len(domains), 1.3 + 0.46 * len(experts))
    heatmap(ax, values, 1 - above / max(above.max(), 1e-9), experts, domains, ".1f")
    ax.set_ylabel("expert")
    ax.set_xlabel("text of domain")
    return svg(fig, "Perplexity of each domain's text when forced through each expert")


@styled
def overlap(shares: Sequence[Sequence[float]], experts: Sequence[str]) -> str:
    """Share of channels [E][E] that two experts have in common."""
    values = np.asarray(shares, float)
    low = float(values.min())
    fig, ax = figure(1.9 + 0.85 * len(experts), 1.1 + 0.46 * len(experts))
    heatmap(ax, values, (values - low) / max(1 - low, 1e-9), experts, experts, ".2f")
    return svg(fig, "Share of channels that each pair of experts has in common")


@styled
def permanent_share(shares: Sequence[float]) -> str:
    """Share of the dense FFN's channels that every expert keeps, by layer [L]."""
    fig, ax = figure(8.2, 2.5)
    ax.bar(range(len(shares)), [100 * s for s in shares], color=colour(0), width=0.8)
    ax.set_xlabel("layer")
    ax.set_ylabel("% of channels")
    ax.set_xlim(-0.7, len(shares) - 0.3)
    ax.grid(axis="x", visible=False)
    return svg(fig, "Share of channels kept by every expert, by layer")


@styled
def expert_use(usage: Mapping[str, Sequence[float]], experts: Sequence[str]) -> str:
    """Stacked bars: which experts each domain's tokens go to, usage[domain] [E]."""
    fig, ax = figure(8.2, 0.42 * len(usage) + 1.4)
    names = list(usage)
    shares = 100 * np.asarray([usage[n] for n in names], float)
    left = np.zeros(len(names))
    for e, expert in enumerate(experts):
        face, ink = colour(e), ink_on(colour(e))
        ax.barh(range(len(names)), shares[:, e], left=left, color=face, label=expert, height=0.7)
        for y, share in enumerate(shares[:, e]):
            if share >= 8:
                ax.text(left[y] + share / 2, y, f"{share:.0f}", ha="center", va="center", color=ink, fontsize=9)
        left += shares[:, e]
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(0, 100)
    ax.set_xlabel("% of the domain's tokens, by expert")
    ax.grid(axis="y", visible=False)
    ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=min(len(experts), 5), fontsize=9, handlelength=1.0)
    return svg(fig, "Experts used by each domain's tokens")


@styled
def training(records: Sequence[Mapping[str, Any]]) -> str:
    """Fig 7: validation perplexity and training loss over steps, with router and expert stages shaded.

    `records` are lines of metrics.jsonl (tuning/journal.py).
    """
    steps = [r for r in records if r["kind"] == "train"]
    runs = [list(run) for _, run in groupby(steps, key=lambda r: (r["round"], r["stage"]))]
    checks = [(r["step"], geometric_mean(r["perplexity"].values())) for r in records if r.get("perplexity")]
    stages = [s for s in STAGES if any(r["stage"] == s for r in steps)]
    rows = len(stages) + bool(checks)
    fig, axes = figure(8.2, 0.8 + 1.5 * rows, rows=rows, sharex=True)
    axes = list(np.atleast_1d(axes))
    panels = list(axes)
    if checks:
        ax = panels.pop(0)
        ax.plot(*zip(*checks, strict=True), color=colour(5), marker="o", markersize=5)
        ax.set_title("validation perplexity, geometric mean over domains")
    for ax, stage in zip(panels, reversed(stages), strict=True):
        for run in (r for r in runs if r[0]["stage"] == stage):
            marker = "." if len(run) < 40 else None
            ax.plot([r["step"] for r in run], [r["loss"] for r in run], color=STAGES[stage][0], marker=marker)
        ax.set_title(f"training loss, {STAGES[stage][1]}")
    for ax in axes:
        for run in runs:
            shade = STAGES[run[0]["stage"]][0]
            ax.axvspan(run[0]["step"] - 0.5, run[-1]["step"] + 0.5, color=shade, alpha=0.12, linewidth=0)
        ax.margins(x=0.01)
    axes[-1].set_xlabel("steps, all stages")
    shown = [Patch(color=STAGES[s][0], alpha=0.3, label=STAGES[s][1]) for s in stages]
    fig.legend(handles=shown, loc="outside upper right", ncols=2, fontsize=9)
    return svg(fig, "Training curves with router and expert stages shaded")
