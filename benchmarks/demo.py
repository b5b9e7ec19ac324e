"""What `make demo` showed on this machine: results/demo.json and its picture, perplexity over the dense model's."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from _report import RESULTS, write_results

BARS = (
    ("tuned", "#0f766e", "domain experts, own router, tuned"),
    ("dense_slice", "#94a3b8", "one slice for all domains, equally tuned"),
    ("sliced", "#cbd5e1", "domain experts, not yet tuned"),
)


def plot(rows: list[dict[str, Any]], tokens: int, path: Path) -> None:
    """Bars by domain of perplexity over the dense model's."""
    figure, axis = plt.subplots(figsize=(8.4, 3.6))
    for i, (kind, colour, label) in enumerate(BARS):
        heights = [row[kind] / row["dense"] for row in rows]
        axis.bar(np.arange(len(rows)) + 0.26 * (i - 1), heights, 0.25, color=colour, label=label)
    axis.axhline(1, color="#334155", linewidth=0.8)
    axis.set_xticks(range(len(rows)), [row["domain"] for row in rows])
    axis.set_ylabel("perplexity / dense")
    axis.set_title(f"SmolLM2-135M at half its feed-forward width, {tokens:,} tuning tokens", loc="left", fontsize=11)
    axis.legend(frameon=False, loc="upper left", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Read the demo's summary, write results/demo.json and results/demo.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of a finished demo")
    path = parser.parse_args().run / "summary.json"
    if not path.exists():
        raise SystemExit(f"no {path}: run make demo first")
    summary = json.loads(path.read_text())
    rows = [{"domain": d, **values} for d, values in summary["domains"].items()]
    rows.append({"domain": "geometric mean", **summary["geo_mean"]})
    kept = ("tokens", "parameters", "repeats", "seconds", "peak_memory_gb", "answer", "dense_answer")
    write_results("demo", rows=rows, **{name: summary.get(name) for name in kept})
    plot(rows, summary["tokens"]["expert"], RESULTS / "demo.png")


if __name__ == "__main__":
    main()
