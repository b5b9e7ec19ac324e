"""A run that is killed again and again ends as one that never was: the same parameters, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from tiny_run import run_in

import readme_jax
from readme_jax.checkpoints.store import Store
from readme_jax.tuning import resume
from readme_jax.tuning.journal import read_metrics

SCRIPT = Path(__file__).with_name("tiny_run.py")
TOTAL = 20  # router 1-5, experts 6-10, router 11-15, experts 16-20; a checkpoint every third step


def start(folder: Path, cache: Path, **options: int) -> subprocess.Popen[str]:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(readme_jax.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, str(SCRIPT), str(folder), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> int:
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGKILL, 128 + signal.SIGTERM), errors
    return process.returncode


def committed(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder)]


def test_killed_and_resumed_equals_never_interrupted(tmp_path, compilation_cache):
    rng = np.random.default_rng()
    whole, broken, cache = tmp_path / "whole", tmp_path / "broken", compilation_cache
    kills = {
        "router": {"die_at": int(rng.integers(1, 6))},
        "experts": {"die_at": int(rng.integers(6, 11))},
        "saving": {"die_saving": int(rng.choice([12, 15]))},
    }
    print("killed at", kills)
    never = run_in(whole)
    for stage, when in kills.items():
        assert end(start(broken, cache, **when)) == -signal.SIGKILL, stage
        assert losses(broken)[-1][0] == next(iter(when.values()))
    before = committed(broken)
    assert kills["saving"]["die_saving"] - 3 in before, "the checkpoint before the one being written is intact"

    at = int(rng.integers(16, TOTAL))
    assert end(start(broken, cache, term_at=at)) == 128 + signal.SIGTERM
    assert committed(broken)[-1] == at, "interrupted: saved where it was"

    resumed = run_in(broken)
    assert [step for step, _ in losses(broken)] == list(range(1, TOTAL + 1)), "no line twice, none missing"
    assert losses(broken) == losses(whole)
    for name in ("backbone", "router"):
        jax.tree.map(np.testing.assert_array_equal, getattr(resumed, name), getattr(never, name))
    assert jax.random.key_data(resumed.key).tolist() == jax.random.key_data(never.key).tolist()


@pytest.mark.parametrize("permanent", [True, False])
def test_everything_comes_back_from_a_checkpoint(tmp_path, mesh, permanent):
    """Also when there is no permanent part, whose channels are then arrays without entries."""
    parts, progress = tiny_run.begin(tiny_run.RUN, mesh, permanent)
    store = Store(tmp_path)
    resume.save(store, progress, parts.channels, {"config": {}})
    back, channels = resume.load(
        store, 0, tiny_run.RUN, tiny_run.MODEL, parts.mixture, tiny_run.ROUTER, tiny_run.RUNTIME, mesh
    )
    store.close()
    for one, other in ((progress.backbone, back.backbone), (progress.router, back.router), (parts.channels, channels)):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert back.moments is None and jax.random.key_data(back.key).tolist() == jax.random.key_data(progress.key).tolist()
