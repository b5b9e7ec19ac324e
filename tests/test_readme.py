"""The README's tables show what the committed results hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TABLE5 = ("dense", "sliced", "tuned", "paper", "dense_slice", "dense_slice_refit")


def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def table(heading: str) -> list[list[str]]:
    """The rows of the table whose first line begins so, without emphasis."""
    text = (ROOT / "README.md").read_text()
    lines = text[text.index(f"| {heading}") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines]


def demo() -> list[list[str]]:
    columns = ("dense", "sliced", "tuned", "dense_slice")
    return [[row["domain"], *(f"{row[c]:.2f}" for c in columns)] for row in results("demo")["rows"]]


def table5() -> list[list[str]]:
    held = results("table5")
    rows = [*held["domains"].items(), ("geometric mean", held["geo_mean"])]
    return [[name, *(f"{row[c]:.2f}" for c in TABLE5)] for name, row in rows]


@pytest.mark.parametrize("heading, rows", [("validation perplexity", demo), ("SmolLM2-135M, validation", table5)])
def test_tables_of_perplexity(heading, rows):
    assert table(heading) == rows()


def test_routes():
    rows = [row for row in results("router")["rows"] if row["run"] == "best"]
    by_perplexity = sorted(f"{row['geo_mean']:.2f}" for row in rows)
    assert sorted(row[3] for row in table("routes of")) == by_perplexity


def test_training_and_segments():
    held = results("training")
    assert [row[2] for row in table("SmolLM2-135M, fp32")] == [
        "1.00", f"{held['dense_step_ratio']:.2f}", f"{held['expert_step_ratio']:.2f}"
    ]  # fmt: skip
    known = {(r["case"], r["pass"], r["backend"]): r["ratio"] for r in results("segments")["rows"]}
    backends = {"ours": "segments", "`jax.lax.ragged_dot`": "ragged_dot", "all experts, masked": "masked"}
    for name, *ratios in table("grouped feed-forward on CPU"):
        who, case = re.fullmatch(r"(.*), (even|skewed|one)(?: expert)?", name).groups()
        wanted = [known[case, each, backends[who]] for each in ("forward", "forward_backward")]
        assert [float(ratio) for ratio in ratios] == pytest.approx(wanted, abs=0.0051), name
