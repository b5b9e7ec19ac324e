"""A whole run on tiny files: from a model folder and text to an exported mixture, a summary and a report."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from tiny_run import MODEL, dense_params
from tiny_text import WORDS, write_text
from tokenizers import decoders, models, pre_tokenizers

from readme_jax import config, runner
from readme_jax.checkpoints.hf import Dense, save_dense
from readme_jax.checkpoints.mixture import load_mixture
from readme_jax.checkpoints.tokenizer import Tokenizer
from readme_jax.errors import ConfigError
from readme_jax.tuning.journal import read_metrics

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, eos_ids=[0])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Run:
    monkeypatch.setenv("READ_ME_CACHE", str(tmp_path / "cache"))
    save_dense(tmp_path / "dense", Dense(MODEL, jax.tree.map(np.asarray, dense_params()), byte_tokenizer()))
    write_text(tmp_path / "text", train=60)
    return config.Run(
        output=str(tmp_path / "run"),
        model=config.Model(checkpoint=str(tmp_path / "dense")),
        data=config.Data(folder=str(tmp_path / "text"), sequence_length=32, validation_tokens=128),
        slice=config.Slice(calibration_tokens=256, refit="one_shot", score="rmsw"),
        router=config.Router(dim=16, num_heads=2, head_dim=8, mlp_dim=16),
        router_stage=config.RouterStage(objective="domain", steps=20, batch=8, lr=1e-2),
        expert_stage=config.ExpertStage(steps=30, batch=8, lr=1e-2),
        tuning=config.Tuning(rounds=1),
    )


def test_from_dense_model_to_exported_mixture(run, monkeypatch):
    summary = runner.execute(run)
    output = Path(run.output)
    assert json.loads((output / "summary.json").read_text()) == summary
    assert list(summary["domains"]) == list(WORDS) == summary["experts"]
    for name, row in summary["domains"].items():
        assert row["tuned"] < row["dense"] / 4 and row["tuned"] < row["sliced"] / 4, name
    assert summary["tokens"] == {"calibration": 3 * 256, "router": 20 * 8 * 32, "expert": 30 * 8 * 32}
    assert np.shape(summary["matrix"]) == (3, 3) and summary["oracle"] > 1
    np.testing.assert_allclose([sum(shares) for shares in summary["usage"].values()], 1)
    sizes = summary["parameters"]
    assert sizes["active"] < sizes["total"]
    assert (output / "report.html").stat().st_size > 10_000
    curve = [line["geo_mean"] for line in read_metrics(output) if line["kind"] == "evaluation"]
    assert len(curve) == 2 and curve[1] < curve[0]

    exported = load_mixture(output / "export")
    assert exported.router is not None and exported.tokenizer is not None
    half = MODEL.num_layers * MODEL.ffn_dim // 2
    assert sizes["active"] == sizes["dense"] - 3 * MODEL.embed_dim * half, "half of the channels, padding left out"

    monkeypatch.setattr(runner, "start", None)  # a finished run is neither sliced nor tuned again
    again = runner.execute(run)
    assert again["domains"] == summary["domains"]
    with pytest.raises(ConfigError, match=r"expert_stage\.lr \(0\.01 -> 0\.02\)"):
        runner.execute(replace(run, expert_stage=replace(run.expert_stage, lr=0.02)))


def test_dense_slice_is_the_same_run_with_one_expert(run):
    known = {name: 2.0 + i for i, name in enumerate(WORDS)}
    summary = runner.execute(replace(run, slice=replace(run.slice, experts="one")), dense=known)
    assert {name: row["dense"] for name, row in summary["domains"].items()} == known, "measured by an earlier run"
    assert summary["experts"] == ["code+news+verse"] and summary["tokens"]["router"] == 0
    assert "matrix" not in summary and summary["parameters"]["total"] < summary["parameters"]["dense"]
    assert {line["stage"] for line in read_metrics(run.output)} == {"experts"}
    assert summary["geo_mean"]["tuned"] < summary["geo_mean"]["sliced"] / 4


class Reached(Exception):
    """The run came to its tuning."""


@pytest.mark.parametrize(("objective", "matrices"), [("domain", 0), ("overlap", 2 * MODEL.num_layers)])
def test_the_dense_model_leaves_the_devices_where_no_stage_reads_it(run, monkeypatch, objective, matrices):
    """Gate and up of its layers are alive during tuning for an objective that needs them alone."""
    before, alive = {id(x) for x in jax.live_arrays()}, []

    def tune(*_, **__):
        gc.collect()
        shape = (MODEL.ffn_dim, MODEL.embed_dim)
        alive.append(sum(x.shape == shape and id(x) not in before for x in jax.live_arrays()))
        raise Reached

    monkeypatch.setattr(runner, "tune", tune)
    with pytest.raises(Reached):
        runner.execute(replace(run, router_stage=replace(run.router_stage, objective=objective)))
    assert alive == [matrices]
