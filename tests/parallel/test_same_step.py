"""What `readme-jax plan` compiles is what training runs: the same StableHLO, for a TPU, on the same abstract mesh."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from readme_jax import config
from readme_jax.models.layout import to_layout
from readme_jax.models.runtime import runtime_for
from readme_jax.parallel.mesh import MESH_AXES, make_mesh, replicated
from readme_jax.tuning.journal import Journal
from readme_jax.tuning.rounds import Parts, Progress, Tuner
from readme_jax.tuning.stages import Shapes, abstract_arguments, build_step
from readme_jax.tuning.step import backbone_table, place, shard_table

sys.path.insert(0, str(Path(__file__).parents[1] / "tuning"))

import tiny_run  # noqa: E402

ABSTRACT = AbstractMesh((2, 2, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
TPU = runtime_for(config.Model(compute_dtype="bfloat16", layout="scanned", remat="dots"), "tpu")
RUN = replace(tiny_run.RUN, expert_stage=replace(tiny_run.RUN.expert_stage, accumulate=1))


class Reached(Exception):
    """The first step's program and arguments."""


class Stopping(Tuner):
    """A tuner that stops where it would compile its first step."""

    def _compile(self, stage, step, *arguments):
        raise Reached(stage, arguments)


def trained(stage, tmp_path):
    """Arguments of a real first step of a stage, as the training loop passes them on one device."""
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    run = RUN if stage == "router" else replace(RUN, router_stage=replace(RUN.router_stage, steps=0))
    with jax.set_mesh(mesh):
        parts, progress = tiny_run.begin(run, mesh)
        table = backbone_table(parts.model, None, "scanned")
        dense = place(to_layout(parts.dense, "scanned"), shard_table(table, mesh))
        channels = jax.device_put(to_layout(parts.channels, "scanned"), replicated(mesh))
        parts = Parts(parts.model, parts.mixture, parts.router, TPU, dense, channels)
        sliced = shard_table(backbone_table(parts.model, parts.mixture, "scanned"), mesh)
        start = place(to_layout(progress.backbone, "scanned"), sliced)
        router = place(progress.router, build_step(run, parts, "router", mesh).shardings.params)
        journal = Journal(tmp_path, None)
        batches = {"router": tiny_run.Bytes(1), "experts": tiny_run.Bytes(2)}
        tuner = Stopping(run, parts, batches, mesh, journal, lambda progress: None)
        with pytest.raises(Reached) as reached:
            tuner.tune(Progress(0, start, router, progress.key))
        journal.close()
    found, arguments = reached.value.args
    assert found == stage
    return run, parts, tuner, arguments


def text(step, arguments):
    """StableHLO of a step for a TPU on the abstract mesh, without locations."""

    def abstract(x):
        spec = getattr(getattr(x, "sharding", None), "spec", None)
        sharding = None if spec is None else NamedSharding(ABSTRACT, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    with jax.sharding.use_abstract_mesh(ABSTRACT):
        traced = step.update.trace(*jax.tree.map(abstract, arguments))
        return traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("stage", ["router", "experts"])
def test_plan_compiles_the_step_that_training_runs(stage, tmp_path):
    run, parts, tuner, arguments = trained(stage, tmp_path)
    tuner.mesh = ABSTRACT
    want = text(tuner._build(stage), arguments)
    shapes = Shapes(parts.model, parts.mixture, parts.router, TPU)
    step = build_step(run, shapes, stage, ABSTRACT)
    got = text(step, abstract_arguments(run, shapes, stage, ABSTRACT, step))
    assert len(want.splitlines()) > 300 and "stablehlo.dot_general" in want
    assert ("tpu_custom_call" in want) == (stage == "experts")
    assert got == want


def test_other_settings_are_another_step():
    """The comparison can fail: half the batch is another program."""
    shapes = Shapes(tiny_run.MODEL, config.MixtureConfig(3, 16, 8), tiny_run.ROUTER, TPU)
    texts = []
    for batch in (4, 8):
        run = replace(RUN, router_stage=replace(RUN.router_stage, batch=batch))
        step = build_step(run, shapes, "router", ABSTRACT)
        texts.append(text(step, abstract_arguments(run, shapes, "router", ABSTRACT, step)))
    assert texts[0] != texts[1]
