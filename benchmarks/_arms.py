"""The arms of Table 5: our recipe, the paper's, and dense slices as the paper makes them and with our score and refit.

Every arm sees the same tuning tokens of the same stream in the same order, with the same optimizer and loss.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from readme_jax.cli.settings import load_run
from readme_jax.config import Run

HERE = Path(__file__).parent
RECIPES = HERE.parent / "configs" / "recipes"
CORPUS = HERE.parent.parent / "shared" / "data" / "corpus"

DENSE_SLICE = ["Slice.experts = 'one'", "Slice.permanent = False"]
ARMS: dict[str, tuple[str, list[str]]] = {
    "best": ("best_small.gin", []),
    "paper": ("paper_small.gin", ["Data.mixture = 'even'"]),
    "dense_slice": ("best_small.gin", [*DENSE_SLICE, "Slice.score = 'mean_abs'", "Slice.refit = 'none'"]),
    # One expert reads all domains' text: half of best's a domain is still three and a half times as much.
    "dense_slice_refit": ("best_small.gin", [*DENSE_SLICE, "Slice.calibration_tokens = 65536"]),
}
LEARNING_RATES = {  # searched by lr_search.py; the paper's recipe keeps its own
    "best": (5e-5, 1e-4, 2e-4, 3e-4),
    "dense_slice": (2e-4, 3e-4, 5e-4, 1e-3),
    "dense_slice_refit": (5e-5, 1e-4, 2e-4, 3e-4),
}


def arm_run(arm: str, data: str, output: Path, params: list[str], lr: float | None = None) -> Run:
    """The settings of an arm on the text in `data`, saved under `output/arm`; `params` bind for all arms."""
    recipe, changes = ARMS[arm]
    rate = [] if lr is None else [f"ExpertStage.lr = {lr}"]
    place = [f"Data.folder = {data!r}", f"Run.output = {str(output / arm)!r}"]
    return load_run([RECIPES / recipe], [*changes, *rate, *place, *params])


def arguments(doc: str | None, output: str, arms: Iterable[str]) -> argparse.Namespace:
    """What both scripts are told: data, output, bindings for all arms, and one arm to run alone."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(CORPUS), help="folder of domains")
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument("--gin_param", action="append", default=[], help="binding for all arms")
    parser.add_argument("--arm", choices=list(arms), help="run one arm alone and write no results")
    return parser.parse_args()


def searched_rate(arm: str) -> float | None:
    """The best learning rate of an arm in results/lr_search.json; None for an arm that keeps its recipe's."""
    if arm not in LEARNING_RATES:
        return None
    path = HERE / "results" / "lr_search.json"
    if not path.exists():
        raise SystemExit(f"no {path.name}: run benchmarks/lr_search.py first")
    rows = [row for row in json.loads(path.read_text())["rows"] if row["arm"] == arm]
    return float(min(rows, key=lambda row: row["geo_mean"])["lr"])
