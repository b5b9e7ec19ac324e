"""Two processes of two CPU devices each, as one job by jax.distributed, take the steps of one process alone.

A short run from dense model to export; `make multihost` has longer ones, which are killed and started again.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from multihost import Job

from readme_jax import runner
from readme_jax.cli.settings import load_run
from readme_jax.models.runtime import Runtime
from readme_jax.tuning.journal import read_metrics

SHORT = [
    "RouterStage.steps = 2",
    "ExpertStage.steps = 3",
    "ExpertStage.accumulate = 1",
    "Slice.refit = 'none'",
    "Slice.score = 'mean_abs'",
]


@pytest.mark.usefixtures("quickly_compiled")
def test_two_processes_take_the_steps_of_one(folder, monkeypatch):
    two = Job(folder, "two", 2, 2, options=dict.fromkeys(range(2), ["--masked"]), params=dict.fromkeys(range(2), SHORT))
    monkeypatch.setenv("READ_ME_CACHE", str(folder / "alone"))
    monkeypatch.setattr(runner, "runtime_for", lambda model: Runtime(segments="masked"))
    alone = folder / "one"
    summary = runner.execute(load_run([folder / "two.gin"], [*SHORT, f"Run.output = '{alone}'"]))
    two.succeed()
    want = [line["loss"] for line in read_metrics(alone) if line["kind"] == "train"]
    assert len(want) == 5
    np.testing.assert_allclose(list(two.losses.values()), want, rtol=1e-5)
    told = json.loads((two.output / "summary.json").read_text())
    for stage, perplexity in summary["geo_mean"].items():
        assert told["geo_mean"][stage] == pytest.approx(perplexity, rel=1e-3), "AdamW's first steps enlarge rounding"
    assert two.status["status"] == "finished" and two.status["attempts"][0]["processes"] == 2
    assert two.committed[-1] == 5
