"""A run from dense checkpoint to exported mixture: slice, tune, evaluate, export. Both recipes are settings of it."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from readme_jax import config
from readme_jax.checkpoints.hf import Dense, open_dense
from readme_jax.checkpoints.mixture import Mixture, save_mixture
from readme_jax.checkpoints.store import Store
from readme_jax.checks import check_run
from readme_jax.config import MixtureConfig, RouterConfig
from readme_jax.data.corpus import Corpus, open_corpus
from readme_jax.errors import CheckpointError
from readme_jax.evaluation.matrix import expert_matrix
from readme_jax.evaluation.perplexity import Evaluator, Losses, geometric_mean, perplexities
from readme_jax.evaluation.usage import repeat_rate, usage
from readme_jax.files import write_text
from readme_jax.loading import dense_on_mesh
from readme_jax.memory import trim
from readme_jax.models.layout import to_layout
from readme_jax.models.runtime import Runtime, runtime_for
from readme_jax.models.sizes import dense_parameters
from readme_jax.models.weights import router_table
from readme_jax.parallel.distributed import lead
from readme_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from readme_jax.parallel.placing import fetch, put, share_of, wait_for_all
from readme_jax.progress import meter
from readme_jax.refactor.groups import ByExpert, Grouping, expert_count, group_text
from readme_jax.report.page import write_report
from readme_jax.slicing import forget, start
from readme_jax.tuning import resume as resumption
from readme_jax.tuning.journal import Journal, NoJournal
from readme_jax.tuning.rounds import Parts, Progress, Tuner
from readme_jax.tuning.routes import DomainRoutes, LayerwiseRoutes, RouterRoutes, routes_of
from readme_jax.tuning.schedule import STAGES, Position, Stage, check_same, schedule_of
from readme_jax.tuning.stages import reads_dense
from readme_jax.tuning.step import place, shard_table

WINDOW = 1024  # tokens of a validation window, or the sequence length where that is shorter
CURVE_WINDOWS = 2  # a domain, for the curves during tuning
MATRIX_TOKENS = 1024  # a domain, for the matrix of experts and domains

CHECKPOINTS, EXPORT = "checkpoints", "export"


@dataclass(frozen=True)
class Setting:
    """What a run works with and never changes."""

    run: config.Run
    output: Path
    mesh: Any
    runtime: Runtime
    dense: Dense  # parameters on the mesh, in the runtime's layout; none where no stage reads them (`reads_dense`)
    corpus: Corpus
    validation: dict[str, np.ndarray]  # windows [n, T] a domain
    store: Store
    began: float  # on the monotonic clock, less what the run had taken before it was interrupted

    @property
    def seconds(self) -> float:
        """How long the run has taken so far, in all."""
        return time.monotonic() - self.began


def execute(run: config.Run, resume: bool = True, dense: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Refactor, tune, evaluate, export and report; returns what `<output>/summary.json` holds.

    `dense` is the dense model's perplexity by domain where an earlier run on the same text has measured it.

    Also leaves there config.json, facts.json (of the slices), metrics.jsonl, report.html, export/ and checkpoints/.
    Goes on from the newest checkpoint in `<output>/checkpoints`; `resume=False` removes what is there and starts anew.
    Raises ConfigError when a saved run had other settings, DataError and CheckpointError on bad input, Interrupted
    (a SystemExit) once a run that got SIGINT or SIGTERM has saved itself. Of several processes (parallel/job.py) the
    first writes; `<output>` is a folder that all of them see.
    """
    check_run(run, len(jax.devices()))
    began, output = time.monotonic(), Path(run.output)
    if not resume and lead():
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    wait_for_all("checkpoints removed")
    store = Store(output / CHECKPOINTS)
    done = store.latest()
    meta = None if done is None else store.meta(done)
    if meta is not None:
        check_same(meta["config"], run, str(output))
        began -= meta["seconds"]
    mesh = make_mesh(run.mesh)
    with jax.set_mesh(mesh):
        setting = prepare(run, output, mesh, store, began)
        if meta is None:
            meta = slice_dense(setting, dense)
        if not reads_dense(run):
            setting = replace(setting, dense=replace(setting.dense, params={}))
        trim()
        parts, progress = take_up(setting, meta)
        tune(setting, meta, parts, progress, fresh=done is None)
        trim()
        summary = finish(setting, meta, parts, progress)
    if lead():
        _write(output / "config.json", config.to_dict(run))
        _write(output / "facts.json", meta["facts"])
        _write(output / "summary.json", summary)
        write_report(output)
    return summary


def _write(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


# --- before tuning ------------------------------------------------------------------------------------------------


def prepare(run: config.Run, output: Path, mesh: Any, store: Store, began: float) -> Setting:
    """The dense model on the mesh and the text."""
    opened = open_dense(run.model.checkpoint)
    if opened.tokenizer is None:
        raise CheckpointError(f"{run.model.checkpoint}: no tokenizer; put its tokenizer.json beside the weights")
    corpus = open_corpus(run.data, opened.tokenizer)
    window = min(WINDOW, run.data.sequence_length)
    validation = {domain: corpus.validation(domain, window) for domain in corpus.domains}
    runtime = runtime_for(run.model)
    dense = dense_on_mesh(opened, runtime.layout, mesh)
    return Setting(run, output, mesh, runtime, dense, corpus, validation, store, began)


def slice_dense(s: Setting, dense: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Slice the dense model, start the router, and save both as the checkpoint of step 0; returns its meta."""
    run, settings = s.run, s.run.slice
    calibration = calibration_text(s)
    sliced = start(run, s.dense, calibration, s.runtime, s.mesh)
    backbone, router = sliced.params, place(sliced.router, shard_table(router_table(sliced.router_config), s.mesh))
    channels = on_mesh(to_layout(sliced.channels, s.runtime.layout), s.mesh)
    untuned = Evaluator(s.dense.config, sliced.mixture, s.runtime, s.mesh)
    routes = DomainRoutes(sliced.mixture.num_experts, sliced.mixture.top_k)
    grouping = group_text(calibration, settings)
    if dense is None:
        dense = perplexities(_losses(s, "dense", Evaluator(s.dense.config, None, s.runtime, s.mesh), s.dense.params))
    meta = {
        "config": config.to_dict(run),
        "mixture": asdict(sliced.mixture),
        "router": asdict(sliced.router_config),
        "facts": sliced.facts,
        "dense": dict(dense),
        "sliced": perplexities(_losses(s, "sliced", untuned, backbone, routes, channels, grouping)),
    }
    key = resumption.random_key(run.seed, s.mesh)
    resumption.save(s.store, Progress(0, backbone, router, key), channels, meta | {"seconds": s.seconds})
    s.store.wait()
    forget(run)
    return meta


def on_mesh(channels: Any, mesh: Any) -> Any:
    """Slices on every device of the mesh."""
    return jax.tree.map(lambda rows: put(rows, replicated(mesh)), channels)


def calibration_text(s: Setting) -> dict[str, np.ndarray]:
    """Calibration tokens [n, T] of each domain."""
    settings = s.run.slice
    return {
        d: np.concatenate(
            list(s.corpus.calibration(d, settings.calibration_tokens, settings.calibration_batch, s.run.seed))
        )
        for d in s.corpus.domains
    }


def text_groups(s: Setting) -> Grouping:
    """Which text is whose expert's; calibration text is read again only where it decides that."""
    domains, settings = s.corpus.domains, s.run.slice
    if expert_count(settings, len(domains)) > len(domains):
        return group_text(calibration_text(s), settings)
    return group_text({d: np.zeros((0, 1), np.int32) for d in domains}, settings)


def take_up(s: Setting, meta: Mapping[str, Any]) -> tuple[Parts, Progress]:
    """Everything as the newest checkpoint has it."""
    done = s.store.latest()
    assert done is not None, "a run saves its slices before it tunes them"
    mixture, router = MixtureConfig(**meta["mixture"]), RouterConfig(**meta["router"])
    progress, channels = resumption.load(s.store, done, s.run, s.dense.config, mixture, router, s.runtime, s.mesh)
    return Parts(s.dense.config, mixture, router, s.runtime, s.dense.params, channels), progress


# --- tuning -------------------------------------------------------------------------------------------------------


def tune(s: Setting, meta: dict[str, Any], parts: Parts, progress: Progress, fresh: bool) -> None:
    """The alternating rounds, from wherever `progress` is; it is changed in place."""
    run = s.run
    grouping = text_groups(s)
    sizes: dict[Stage, int] = {"router": run.router_stage.batch, "experts": run.expert_stage.batch}
    share = {stage: share_of(batch_sharding(s.mesh), rows) for stage, rows in sizes.items()}
    batches = {stage: s.corpus.batches(stage, rows, run.seed, *share[stage]) for stage, rows in sizes.items()}
    curve = {domain: windows[:CURVE_WINDOWS] for domain, windows in s.validation.items()}
    evaluator = Evaluator(parts.model, parts.mixture, s.runtime, s.mesh)

    def evaluate(position: Position, backbone: Any, router: Any) -> dict[str, Any]:
        by_domain = perplexities(evaluator.domains(backbone, curve, own_routes(parts, router), parts.channels))
        return {"perplexity": by_domain, "geo_mean": geometric_mean(by_domain.values())}

    def save(progress: Progress) -> None:
        resumption.save(s.store, progress, parts.channels, meta | {"seconds": s.seconds})

    journal = Journal(s.output, None if fresh else progress.done) if lead() else NoJournal()
    sources: dict[Stage, Any] = {stage: ByExpert(batches[stage], grouping) for stage in STAGES}
    try:
        Tuner(run, parts, sources, s.mesh, journal, save, evaluate, share).tune(progress)
    finally:
        journal.close()
        s.store.close()


def own_routes(parts: Parts, router: Any) -> RouterRoutes | LayerwiseRoutes | DomainRoutes:
    """The routes a mixture is served with: its router's, or of one expert the only ones."""
    if parts.mixture.num_experts == 1:
        return DomainRoutes(1)
    return routes_of(router, parts.router, parts.mixture.top_k)


# --- after tuning -------------------------------------------------------------------------------------------------


def finish(s: Setting, meta: dict[str, Any], parts: Parts, progress: Progress) -> dict[str, Any]:
    """Evaluate the tuned mixture, export it, and sum the run up."""
    evaluator = Evaluator(parts.model, parts.mixture, s.runtime, s.mesh)
    routes = own_routes(parts, progress.router)
    losses = _losses(s, "tuned", evaluator, progress.backbone, routes, parts.channels)
    each = {"dense": meta["dense"], "sliced": meta["sliced"], "tuned": perplexities(losses)}
    schedule = schedule_of(s.run, parts.mixture.num_experts)
    length, run = s.run.data.sequence_length, s.run
    summary = {
        "domains": {d: {name: values[d] for name, values in each.items()} for d in s.corpus.domains},
        "geo_mean": {name: geometric_mean(values.values()) for name, values in each.items()},
        "experts": meta["facts"]["experts"],
        "tokens": {
            "calibration": meta["facts"]["calibration_tokens"],
            "router": schedule.rounds * schedule.router * run.router_stage.batch * length,
            "expert": schedule.rounds * schedule.experts * run.expert_stage.batch * length,
        },
        "parameters": count_parameters(progress, parts),
    }
    if parts.mixture.num_experts > 1:
        summary |= use_of_experts(s, evaluator, parts, progress, losses)
    export(s, meta, parts, progress)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    return summary | {"seconds": s.seconds, "peak_memory_gb": peak}


def use_of_experts(
    s: Setting, evaluator: Evaluator, parts: Parts, progress: Progress, losses: Mapping[str, Losses]
) -> dict[str, Any]:
    """What experts know and when they are used: the matrix of experts and domains, shares and repeats."""
    length = next(iter(s.validation.values())).shape[1]
    some = {d: windows[: max(1, MATRIX_TOKENS // length)] for d, windows in s.validation.items()}
    experts = parts.mixture.num_experts
    with meter("experts by domain", experts * sum(w.size for w in some.values())) as tick:
        matrix = expert_matrix(evaluator, progress.backbone, some, parts.channels, tick)
    repeats = [repeat_rate(each.experts) for each in losses.values() if each.experts is not None]
    known: dict[str, Any] = {"matrix": matrix.perplexity.tolist()}  # [expert][domain]
    if repeats:  # routes are one for all layers
        known |= {"usage": usage(losses, experts), "repeats": float(np.mean(repeats))}
    if any(len(windows) > len(some[d]) for d, windows in s.validation.items()):
        return known  # the oracle of other text than `geo_mean` is of would mislead
    return known | {"oracle": geometric_mean(matrix.oracle.values())}


def count_parameters(progress: Progress, parts: Parts) -> dict[str, int]:
    """Parameters, padding left out, of the dense model, of the mixture, of what one token runs, and of the router."""

    def channels(part: str) -> int:
        layers = to_layout(parts.channels, "unrolled").values()
        return sum(int((np.asarray(layer[part]) < model.ffn_dim).sum()) for layer in layers)

    model, mixture = parts.model, parts.mixture
    whole, channel = dense_parameters(model), 3 * model.embed_dim
    outside = whole - channel * model.ffn_dim * model.num_layers
    permanent, own = channels("permanent"), channels("experts")
    return {
        "dense": whole,
        "total": whole if mixture.tied else outside + channel * (permanent + own),
        "active": outside + channel * (permanent + own * mixture.top_k // mixture.num_experts),
        "router": sum(leaf.size for leaf in jax.tree.leaves(progress.router)),
    }


def export(s: Setting, meta: dict[str, Any], parts: Parts, progress: Progress) -> None:
    """Write the mixture to `<output>/export`, in safetensors, unrolled."""
    mixture = Mixture(
        parts.model,
        parts.mixture,
        jax.tree.map(fetch, to_layout(progress.backbone, "unrolled")),
        jax.tree.map(fetch, to_layout(parts.channels, "unrolled")),
        parts.router,
        jax.tree.map(fetch, dict(progress.router)),
        s.dense.tokenizer,
        {"config": meta["config"], "facts": meta["facts"]},
    )
    if lead():
        save_mixture(s.output / EXPORT, mixture)


def _losses(
    s: Setting,
    name: str,
    evaluator: Evaluator,
    params: Any,
    routes: Any = None,
    channels: Any = None,
    grouping: Grouping | None = None,
) -> dict[str, Losses]:
    def label(windows: np.ndarray, domain: int) -> int | np.ndarray:
        return domain if grouping is None else grouping.experts(windows, np.full(len(windows), domain))

    with meter(f"evaluate {name}", sum(w.size for w in s.validation.values())) as tick:
        losses = evaluator.domains(params, s.validation, routes, channels, tick, label)
    trim()
    return losses
