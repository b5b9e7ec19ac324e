"""Perplexity against tokens spent, SmolLM2 on one GPU: `python benchmarks/gpu/quality.py --minutes 8`.

Each row is a recipe, tuned on so many tokens with one seed, and its validation perplexity by domain; mixtures are
routed by their own router. Tuning computes in bf16 with float32 masters, slicing in float32. Slices are cut once a
recipe, text is tokenised once, programs are compiled once a recipe and batch (the rate of each step is passed in, by
the product's own schedule), and a router that is tuned before its experts serves all budgets of a seed. Several rates
(`--factors`) are a row each; the plot has the best of a recipe and budget. Rows that the results already hold are not
run again; they are written after every row, the plot at the end.

Two processes, one a GPU, write results of their own, `--name gpu_quality_0` and `_1`; then
`--merge gpu_quality_0 gpu_quality_1` adds their rows to gpu_quality.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, ScalarFormatter

sys.path.insert(0, str(Path(__file__).parent.parent))
from _arms import ARMS, CORPUS, arm_run
from _measure import Row, Rows, held, merge
from _report import RESULTS, show_rows

from readme_jax import config
from readme_jax.checkpoints.store import Store
from readme_jax.config import Model
from readme_jax.data.corpus import Corpus
from readme_jax.evaluation.perplexity import Evaluator, geometric_mean, perplexities
from readme_jax.models.layout import to_layout
from readme_jax.models.router import start_router
from readme_jax.models.runtime import runtime_for
from readme_jax.parallel.mesh import make_mesh, put_batch
from readme_jax.refactor.groups import ByExpert, group_text
from readme_jax.runner import Setting, calibration_text, on_mesh, own_routes, prepare
from readme_jax.slicing import start
from readme_jax.tuning.rounds import Parts
from readme_jax.tuning.routes import DomainRoutes
from readme_jax.tuning.schedule import Stage
from readme_jax.tuning.stages import build_step
from readme_jax.tuning.step import Step, build_expert_step, learning_rate, round_peak

RECIPES = ("dense", *ARMS)
LABELS = {"dense": "dense, tuned", "best": "experts, tuned (best)", "paper": "the paper's recipe"} | {
    "dense_slice": "dense slice, tuned",
    "dense_slice_refit": "dense slice, our score and refit, tuned",
}
TOKENS = (100_000, 1_000_000, 4_000_000, 16_000_000, 64_000_000)
BATCHES = {100_000: 2, 1_000_000: 8}  # sequences of a step for budgets up to so many tokens; 16 for larger ones
RATES = {"dense": 2e-4, "dense_slice": 5e-4, "dense_slice_refit": 3e-4, "best": 3e-4, "paper": 5e-5}
SMALL_RATES = {"dense": 1e-4, "dense_slice": 3e-4, "dense_slice_refit": 2e-4, "best": 1e-4}  # at 100k: lr_search.json
LONG = 10**9  # steps that a program is built for: its own cosine stays at the start, the rate that it is given
LENGTH = 1024
SPEED = {"dense": 380e3, "dense_slice": 450e3, "dense_slice_refit": 450e3, "best": 340e3, "paper": 170e3}  # predicted
COMPILE, SLICE, EVALUATE = 45.0, 40.0, 3.0  # seconds, predicted
SETTINGS = (
    "Model.compute_dtype = 'bfloat16'",
    "Model.layout = 'scanned'",
    "Slice.align = 128",
)  # scanned: compiles soon
MAIN = "gpu_quality"


class Wanted(NamedTuple):
    """What a row is of; `share` and `distill` are ExpertStage's, `warmup` Tuning's."""

    recipe: str
    tokens: int
    seed: int
    lr: float
    share: float
    distill: float
    warmup: int


def batch_of(tokens: int) -> int:
    """Sequences of a step."""
    return next((batch for most, batch in BATCHES.items() if tokens <= most), 16)


def rate_of(name: str, tokens: int) -> float:
    """The learning rate of the expert stage, before `--factors`."""
    small = SMALL_RATES if tokens <= min(BATCHES) else RATES
    return small.get(name, RATES[name])


def key_of(row: Row) -> Wanted:
    """What a row is of; an untuned model has no rate."""
    found = {name: row.get(name, 0) for name in Wanted._fields[3:]}
    return Wanted(row["recipe"], row["tokens"], row["seed"], **found)


@dataclass
class Arm:
    """One recipe: what tuning starts from, and programs that its rows share."""

    run: config.Run
    parts: Parts | None  # None: the dense model
    backbone: Any
    router: Any
    domains: int
    evaluator: Evaluator
    steps: dict[tuple[Any, ...], Step] = field(default_factory=dict)
    routers: dict[int, Any] = field(default_factory=dict)  # by seed, where tuned before the experts


def cut(s: Setting, name: str, run: config.Run, calibration: Mapping[str, np.ndarray]) -> Arm:
    """Slice the dense model by a recipe; the dense model itself for `dense`."""
    runtime, model = s.runtime, s.dense.config
    if name == "dense":
        return Arm(run, None, s.dense.params, None, 1, Evaluator(model, None, runtime, s.mesh, batch=16))
    began = time.perf_counter()
    exact = replace(runtime_for(Model(), None), segments="masked", attention="blocks")
    sliced = start(run, s.dense, calibration, exact, s.mesh)
    channels = on_mesh(to_layout(sliced.channels, runtime.layout), s.mesh)
    parts = Parts(model, sliced.mixture, sliced.router_config, runtime, s.dense.params, channels)
    print(f"{name}: sliced in {time.perf_counter() - began:.0f} s", flush=True)
    evaluator = Evaluator(model, sliced.mixture, runtime, s.mesh, batch=16)
    backbone = to_layout(sliced.params, runtime.layout)
    return Arm(run, parts, backbone, sliced.router, sliced.mixture.num_experts, evaluator)


class Trainer:
    """Stages of an arm, as `tuning.rounds.Tuner` runs them, on programs that all of its rows share."""

    def __init__(self, s: Setting, arm: Arm, corpus: Corpus, wanted: Wanted) -> None:
        self.s, self.arm, self.corpus, self.seed = s, arm, corpus, wanted.seed
        self.share, self.distill, self.warmup = wanted.share, wanted.distill, wanted.warmup

    def tune(self, tokens: int, batch: int, lr: float) -> tuple[Any, Any, int]:
        """Backbone, router, and tokens spent on experts."""
        arm, backbone = self.arm, self.arm.backbone
        rounds = arm.run.tuning.rounds if arm.parts is not None else 1
        steps = max(round(tokens / (rounds * batch * LENGTH)), 1)
        router, stage = arm.router, arm.run.router_stage
        if arm.parts is not None and arm.parts.mixture.num_experts > 1 and rounds == 1:
            if self.seed not in arm.routers:
                fresh = start_router(jax.random.key(self.seed), arm.parts.router, self.s.dense.params["embed"])
                arm.routers[self.seed] = self._stage("router", fresh, {}, stage.steps, stage.batch, stage.lr, 0)
            router = arm.routers[self.seed]
        for round_ in range(rounds):
            if arm.parts is not None and rounds > 1:
                peak = round_peak(stage.lr, arm.run.tuning, round_)
                frozen = {"backbone": arm.parts.dense, "channels": arm.parts.channels}
                few = max(steps // 4, 1)  # as the paper: a quarter of the experts' tokens
                router = self._stage("router", router, frozen, few, batch, peak, round_)
            peak = round_peak(lr, arm.run.tuning, round_)
            backbone = self._stage("experts", backbone, self._beside(router), steps, batch, peak, round_)
        return backbone, router, rounds * steps * batch * LENGTH

    def _beside(self, router: Any) -> dict[str, Any]:
        """What tuning experts reads and does not train."""
        parts = self.arm.parts
        if parts is None:
            return {}
        routes = {"routes": own_routes(parts, router)} if parts.mixture.num_experts > 1 else {}
        teacher = {"teacher": parts.dense} if self.distill else {}
        return {"channels": parts.channels, **routes, **teacher}

    def _stage(self, stage: Stage, weights: Any, frozen: Any, steps: int, batch: int, peak: float, round_: int) -> Any:
        step = self._step(stage, batch)
        source: Any = self.corpus.batches(stage, batch, self.seed)
        if self.arm.parts is not None:
            source = ByExpert(
                source, group_text({d: np.zeros((0, 1), np.int32) for d in self.corpus.domains}, self.arm.run.slice)
            )
        state = step.start(weights)
        metrics: Any = {}
        rates = np.asarray(learning_rate(peak, jnp.arange(steps), steps, self.warmup), np.float32)
        for i, lr in enumerate(rates):
            state, metrics = step.update(state, put_batch(source[round_ * steps + i], self.s.mesh), frozen, lr)
        loss = float(metrics["loss"])
        if not np.isfinite(loss):
            raise SystemExit(f"the loss of the {stage} stage is {loss}: lower its learning rate")
        return state.params

    def _step(self, stage: Stage, batch: int) -> Step:
        arm, run = self.arm, self.arm.run
        key = (stage, batch, self.share, self.distill)
        if key not in arm.steps:
            experts = replace(run.expert_stage, steps=LONG, batch=batch, accumulate=1)
            experts = replace(experts, share=self.share, distill=self.distill)
            run = replace(run, expert_stage=experts, router_stage=replace(run.router_stage, steps=LONG, batch=batch))
            if arm.parts is None:
                arm.steps[key] = build_expert_step(
                    self.s.dense.config, None, self.s.runtime, experts, run.tuning, self.s.mesh
                )
            else:
                arm.steps[key] = build_step(run, arm.parts, stage, self.s.mesh)
        return arm.steps[key]


def evaluate(s: Setting, arm: Arm, backbone: Any, router: Any) -> dict[str, float]:
    """Validation perplexity by domain."""
    if arm.parts is None:
        return perplexities(arm.evaluator.domains(backbone, s.validation))
    routes = own_routes(arm.parts, router)
    return perplexities(arm.evaluator.domains(backbone, s.validation, routes, arm.parts.channels))


def predicted(name: str, tokens: int, fresh: bool, compiled: bool) -> float:
    """Seconds of a row."""
    return tokens / SPEED[name] + EVALUATE + (SLICE if fresh else 0) + (0 if compiled else COMPILE)


def at_best_rate(rows: list[Row]) -> list[Row]:
    """Of one recipe and budget the rows of the rate and warm-up whose mean over seeds is lowest."""
    by_rate: dict[tuple[float, int], list[Row]] = {}
    for row in rows:
        by_rate.setdefault((row["lr"], row.get("warmup", 0)), []).append(row)
    return min(by_rate.values(), key=lambda found: np.mean([row["geo_mean"] for row in found]))


def plot(rows: list[Row], path: Path) -> None:
    """Mean and range over seeds at the best rate, on logarithmic axes."""
    figure, axis = plt.subplots(figsize=(7, 4.8), layout="constrained")
    for name in RECIPES:
        mine = [
            r for r in rows if r["recipe"] == name and r["tokens"] > 0 and not r.get("share") and not r.get("distill")
        ]
        sizes = sorted({r["tokens"] for r in mine})
        if sizes:
            best = [at_best_rate([r for r in mine if r["tokens"] == size]) for size in sizes]
            found = [[r["geo_mean"] for r in at] for at in best]
            (line,) = axis.plot(sizes, [float(np.mean(f)) for f in found], "o-", label=LABELS[name])
            axis.fill_between(
                sizes, [min(f) for f in found], [max(f) for f in found], color=line.get_color(), alpha=0.2
            )
    for row in rows:
        if row["recipe"] == "dense" and row["tokens"] == 0:
            axis.axhline(row["geo_mean"], color="grey", linestyle="--", label="dense, untuned")
    axis.set(xscale="log", yscale="log", xlabel="tuning tokens", ylabel="validation perplexity, geometric mean")
    budgets = sorted({r["tokens"] for r in rows} - {0})
    axis.set_xticks(budgets, [f"{n / 1e6:g}M" if n >= 1e6 else f"{n / 1e3:g}k" for n in budgets])
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.2, 1.4, 1.6, 2.0, 2.4, 2.8, 3.2, 4.0, 5.0, 6.0, 8.0)))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def arguments() -> argparse.Namespace:
    """What the script is told."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipes", nargs="+", default=["best", "dense_slice_refit", "dense", "dense_slice", "paper"], choices=RECIPES
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", type=float, default=8, help="after which no row is begun")
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0], help="of the learning rate, a row each")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0], help="ExpertStage.share of `best`, a row")
    parser.add_argument("--distills", type=float, nargs="+", default=[0.0], help="ExpertStage.distill of `best`, a row")
    parser.add_argument("--warmup", type=int, default=0, help="steps of the expert stage at a rising rate")
    spec = "RECIPE:TOKENS:SEED:RATE:SHARE:WARMUP"
    parser.add_argument("--rows", nargs="+", type=row_of, metavar=spec, help="these rows and no others")
    parser.add_argument("--data", default=str(CORPUS), help="folder of domains")
    parser.add_argument("--gin_param", action="append", default=[], help="binding for all recipes")
    parser.add_argument("--name", default=MAIN, help="of the results, where not the main ones")
    parser.add_argument("--merge", nargs="+", metavar="NAME", help="add the rows of these results to the main ones")
    parser.add_argument("--plan", action="store_true", help="print the predicted seconds of each row and stop")
    return parser.parse_args()


def row_of(text: str) -> Wanted:
    """A row of `--rows`."""
    recipe, tokens, seed, lr, share, warmup = text.split(":")
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe}: one of {', '.join(RECIPES)}")
    return Wanted(recipe, int(float(tokens)), int(seed), float(lr), float(share), 0.0, int(warmup))


def rows_wanted(args: argparse.Namespace) -> list[Wanted]:
    """What is asked for and not yet measured, each recipe's default rates first."""
    done = {key_of(row) for name in {MAIN, args.name} for row in held(name)}
    asked = args.rows or [
        Wanted(name, tokens, seed, float(f"{factor * rate_of(name, tokens):.2g}"), share, distill, args.warmup)
        for name in args.recipes
        for share in (args.shares if name == "best" else [0.0])
        for distill in (args.distills if name == "best" else [0.0])
        for factor in args.factors
        for seed in args.seeds
        for tokens in args.tokens
    ]
    return [each for each in asked if each not in done]


def main() -> None:
    """Run what fits into the time and write results/gpu_quality.json and its plot."""
    args = arguments()
    if args.merge:
        rows = merge(MAIN, args.merge, key_of)
        show_rows("perplexity", [{k: v for k, v in row.items() if k != "domains"} for row in rows], ".4g")
        return plot(rows, RESULTS / f"{MAIN}.png")
    began = time.perf_counter()
    results, wanted = Rows(args.name, resume=True), rows_wanted(args)
    table(wanted)
    if args.plan or not wanted:
        return None
    output = Path("runs") / args.name
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        bind = [*SETTINGS, *args.gin_param]
        base = arm_run("best", args.data, output, bind)
        s = prepare(base, output, mesh, Store(output / "checkpoints"), time.monotonic())
        print(f"text and model after {time.perf_counter() - began:.0f} s", flush=True)
        for name in args.recipes:
            mine = [each for each in wanted if each[0] == name]
            run = base if name == "dense" else arm_run(name, args.data, output, bind)
            if mine and time.perf_counter() - began + SLICE < 60 * args.minutes:
                rows_of(results, replace(s, run=run), name, mine, args, began)
    plot(results.rows, RESULTS / f"{args.name}.png")
    return None


def rows_of(results: Rows, s: Setting, name: str, wanted: list[Wanted], args: Any, began: float) -> None:
    """The rows of one recipe."""
    arm = cut(s, name, s.run, calibration_text(s) if name != "dense" else {})
    if not any(r["recipe"] == name and r["tokens"] == 0 for r in [*results.rows, *held(MAIN)]):
        routes = DomainRoutes(arm.domains)
        channels = None if arm.parts is None else arm.parts.channels
        start_ = arm.evaluator.domains(arm.backbone, s.validation, None if arm.parts is None else routes, channels)
        add(results, name, 0, 0, perplexities(start_), 0.0)
    for each in wanted:
        _, tokens, seed, lr, share, distill, warmup = each
        batch = batch_of(tokens)
        expected = predicted(name, tokens, False, ("experts", batch, share, distill) in arm.steps)
        if time.perf_counter() - began + expected > 60 * args.minutes:
            print(f"{name} {tokens} seed {seed}: {expected:.0f} s do not fit into what is left", flush=True)
            continue
        at = time.perf_counter()
        backbone, router, spent = Trainer(s, arm, s.corpus, each).tune(tokens, batch, lr)
        found = evaluate(s, arm, backbone, router)
        about = {"spent": spent, "lr": lr, "batch": batch, "share": share, "distill": distill, "warmup": warmup}
        add(results, name, tokens, seed, found, time.perf_counter() - at, **about)


def add(
    results: Rows, name: str, tokens: int, seed: int, domains: dict[str, float], seconds: float, **more: Any
) -> None:
    """Append a row."""
    about = {"recipe": name, "tokens": tokens, "seed": seed, "geo_mean": geometric_mean(domains.values())}
    results.add(**about, seconds=seconds, domains=domains, **more)


def table(wanted: list[Wanted]) -> None:
    """Predicted seconds of each row, and in all."""
    total, seen = 0.0, set[Any]()
    for name, tokens, seed, lr, share, distill, warmup in wanted:
        batch = batch_of(tokens)
        program = (name, batch, share, distill)
        seconds = predicted(name, tokens, name not in seen and name != "dense", program in seen)
        seen |= {name, program}
        total += seconds
        about = f"{name:18} {tokens:>11,} seed {seed} lr {lr:g} share {share:g} distill {distill:g} warmup {warmup}"
        print(f"{about}  {seconds:5.0f} s, {total / 60:5.1f} min in all")


if __name__ == "__main__":
    main()
