"""The router alone: where it sends validation text, against untrained routes: `python benchmarks/router.py`.

For finished runs (table5.py leaves them): the share of tokens sent to the expert with the highest overlap score (Eq. 4,
summed over layers, on the dense model), how often a token repeats its predecessor's expert, and perplexity when so
routed, the geometric mean over domains. `oracle` gives every window the one expert that predicts it best; `common` is
the expert that most tokens of calibration text overlap best; `table` is mean overlap by token id, smoothed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _report import write_results
from rich.console import Console
from rich.table import Table

from readme_jax import config
from readme_jax.checkpoints.hf import load_dense
from readme_jax.checkpoints.mixture import Mixture, load_mixture
from readme_jax.data.corpus import open_corpus
from readme_jax.errors import CheckpointError, ReadMeError
from readme_jax.evaluation.matrix import expert_matrix
from readme_jax.evaluation.perplexity import Evaluator, geometric_mean
from readme_jax.evaluation.usage import repeat_rate
from readme_jax.models.layout import to_layout
from readme_jax.models.runtime import runtime_for
from readme_jax.parallel.mesh import make_mesh, put_batch
from readme_jax.progress import meter
from readme_jax.runner import EXPORT, WINDOW
from readme_jax.tuning.distill import overlap_scores, overlap_share
from readme_jax.tuning.routes import OverlapTable, RandomRoutes, RouterRoutes, Routes, TableRoutes

Windows = dict[str, np.ndarray]  # domain -> [n, T]


class Finished:
    """A finished run: its mixture, the dense model it was cut from, and its text."""

    def __init__(self, folder: Path, validation_tokens: int | None, mesh: Any) -> None:
        path = folder / "config.json"
        if not path.exists():
            raise CheckpointError(f"{folder}: no finished run there (no config.json); run benchmarks/table5.py first")
        saved = json.loads(path.read_text())
        data = saved["data"] | ({} if validation_tokens is None else {"validation_tokens": validation_tokens})
        self.mesh, self.seed, self.slice = mesh, saved["seed"], config.Slice(**saved["slice"])
        self.mixture: Mixture = load_mixture(folder / EXPORT)
        self.dense = load_dense(saved["model"]["checkpoint"])
        assert self.dense.tokenizer is not None  # the run has read text with it
        self.corpus = open_corpus(config.Data(**data), self.dense.tokenizer)
        if self.mixture.router is None or self.mixture.mixture.num_experts != len(self.corpus.domains):
            raise CheckpointError(f"{folder}: its experts are not one a domain, so there is no router to measure")
        window = min(WINDOW, self.corpus.config.sequence_length)
        self.validation = {d: self.corpus.validation(d, window) for d in self.corpus.domains}
        self.runtime = runtime_for(config.Model(**(saved["model"] | {"layout": "unrolled"})))
        self.evaluator = Evaluator(self.mixture.config, self.mixture.mixture, self.runtime, mesh)
        self.params = jax.device_put(self.mixture.params)
        self.channels = jax.device_put(self.mixture.channels)

    def calibration(self, tokens: int) -> Windows:
        """Training sequences of each domain, in the order that the run's experts were chosen on."""
        batch = self.slice.calibration_batch
        return {
            d: np.concatenate(list(self.corpus.calibration(d, tokens, batch, self.seed))) for d in self.corpus.domains
        }


def overlaps(run: Finished, text: Windows, name: str) -> Windows:
    """Overlap scores [n, T, E] summed over layers, of every token of `text`, on the dense model."""
    params = to_layout(jax.device_put(run.dense.params), "unrolled")
    rows = run.evaluator.batch

    @jax.jit
    def step(params: Any, channels: Any, tokens: jax.Array) -> jax.Array:
        return overlap_scores(params, run.dense.config, run.runtime, channels, tokens).sum(0)

    def scores(windows: np.ndarray, tick: Any) -> np.ndarray:
        parts = []
        for start in range(0, len(windows), rows):
            some = windows[start : start + rows]
            full = np.concatenate([some, np.repeat(some[-1:], rows - len(some), axis=0)])
            with jax.set_mesh(run.mesh):
                out = step(params, run.channels, put_batch({"tokens": full}, run.mesh)["tokens"])
            parts.append(np.asarray(out)[: len(some)])
            tick(some.size)
        return np.concatenate(parts)

    with meter(f"overlap on {name} text", sum(w.size for w in text.values())) as tick:
        return {domain: scores(windows, tick) for domain, windows in text.items()}


def from_calibration(run: Finished, tokens: int) -> tuple[TableRoutes, int]:
    """What calibration text teaches without training: the table's routes, and the most common expert."""
    text, mixture = run.calibration(tokens), run.mixture
    known = overlaps(run, text, "calibration")
    experts, top_k = mixture.mixture.num_experts, mixture.mixture.top_k
    table, counts = OverlapTable(mixture.config.vocab_size, experts), np.zeros(experts, np.int64)
    for domain, scores in known.items():
        table.add(text[domain], scores[None])
        counts += np.bincount(scores.argmax(-1).reshape(-1), minlength=experts)
    return TableRoutes(jax.numpy.asarray(table.mean()), top_k=top_k), int(counts.argmax())


def row(routes: str, experts: Windows, scores: Windows, perplexity: Mapping[str, float]) -> dict[str, Any]:
    """One row: `experts` [n, T] that each domain's tokens ran first."""
    chosen, known = (np.concatenate(list(each.values())) for each in (experts, scores))
    return {
        "routes": routes,
        "agrees_with_overlap": overlap_share(chosen, known[None]),
        "repeats": float(np.mean([repeat_rate(each[..., None]) for each in experts.values()])),
        "geo_mean": geometric_mean(perplexity.values()),
    }


def per_token(run: Finished, name: str, routes: Routes, scores: Windows) -> dict[str, Any]:
    """The row of routes that choose an expert for every token."""
    with meter(f"routes: {name}", sum(w.size for w in run.validation.values())) as tick:
        losses = run.evaluator.domains(run.params, run.validation, routes, run.channels, tick)
    experts = {d: each.experts[..., 0] for d, each in losses.items() if each.experts is not None}
    return row(name, experts, scores, {d: each.perplexity for d, each in losses.items()})


def per_window(run: Finished, common: int, scores: Windows) -> list[dict[str, Any]]:
    """The rows of routes that choose an expert for a whole window, from one matrix of experts and windows."""
    number, total = run.mixture.mixture.num_experts, sum(w.size for w in run.validation.values())
    with meter("every expert on every window", number * total) as tick:
        nats = expert_matrix(run.evaluator, run.params, run.validation, run.channels, tick).nats  # [E, n] a domain
    choices = {
        "domain": {d: np.full(each.shape[1], i) for i, (d, each) in enumerate(nats.items())},
        "common": {d: np.full(each.shape[1], common) for d, each in nats.items()},
        "oracle": {d: each.argmin(axis=0) for d, each in nats.items()},
    }
    rows = []
    for name, of in choices.items():
        experts = {d: np.broadcast_to(e[:, None], run.validation[d].shape) for d, e in of.items()}
        losses = {d: np.take_along_axis(nats[d], e[None], axis=0) for d, e in of.items()}
        rows.append(row(name, experts, scores, {d: math.exp(float(each.mean())) for d, each in losses.items()}))
    return rows


def measure(run: Finished, calibration_tokens: int) -> list[dict[str, Any]]:
    """Every row of one run."""
    shape, router = run.mixture.mixture, run.mixture.router_config
    assert router is not None and run.mixture.router is not None
    scores = overlaps(run, run.validation, "validation")
    table, common = from_calibration(run, calibration_tokens)
    free: dict[str, Routes] = {
        "router": RouterRoutes(jax.device_put(run.mixture.router), router, shape.top_k),
        "random": RandomRoutes(run.seed, shape.num_experts, shape.top_k),
        "table": table,
    }
    rows = [per_token(run, name, routes, scores) for name, routes in free.items()]
    rows += per_window(run, common, scores)
    order = ("router", "domain", "common", "random", "table", "oracle")
    return sorted(rows, key=lambda each: order.index(each["routes"]))


def show(rows: list[dict[str, Any]]) -> None:
    """All rows in the terminal."""
    table = Table("run", "routes", "agrees with overlap", "repeats", "perplexity", title="Routes on validation text")
    for each in rows:
        shares = (f"{each[key]:.1%}" for key in ("agrees_with_overlap", "repeats"))
        table.add_row(each["run"], each["routes"], *shares, f"{each['geo_mean']:.2f}")
    Console().print(table)


def main() -> None:
    """Measure the routers of finished runs and write results/router.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="+", default=[Path("runs/table5/best")], help="finished runs")
    parser.add_argument("--calibration_tokens", type=int, default=16384, help="a domain, for table and common")
    parser.add_argument("--validation_tokens", type=int, help="a domain; the run's own number by default")
    args = parser.parse_args()
    mesh, rows = make_mesh(config.Mesh()), []
    jax.set_mesh(mesh)
    try:
        for folder in args.run:
            finished = Finished(folder, args.validation_tokens, mesh)
            rows += [{"run": folder.name, **each} for each in measure(finished, args.calibration_tokens)]
    except ReadMeError as error:
        raise SystemExit(str(error)) from None
    show(rows)
    tokens = {"validation": sum(w.size for w in finished.validation.values()), "calibration": args.calibration_tokens}
    write_results("router", tokens=tokens, rows=rows)


if __name__ == "__main__":
    main()
