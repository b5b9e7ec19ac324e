"""Rates of a step against figures worked out by hand, and goodput over a run that was interrupted."""

from __future__ import annotations

import json
import time

import pytest

from readme_jax import config
from readme_jax.config import ModelConfig
from readme_jax.models.sizes import Channels
from readme_jax.parallel.job import Record
from readme_jax.tuning.journal import Journal, read_metrics
from readme_jax.tuning.schedule import Position
from readme_jax.tuning.speed import Speed, Trace, peak_of

LLAMA = ModelConfig(32000, 4096, 32, 32, 32, 128, 11008)


def test_expert_step_of_llama_2_7b():
    """6 x active parameters x tokens, and attention: 4 H h = 16384 FLOPs a key and layer, half of the keys, thrice."""
    run = config.Run(data=config.Data(sequence_length=4096))
    speed = Speed(run, LLAMA, Channels(7, own=3000, permanent=2504), devices=64, kind="TPU v5p")
    tokens = 128 * 4096
    active = 32 * (4 * 4096**2 + 3 * 4096 * 5504) + 32000 * 4096
    attention = 3 * 32 * 16384 * 4097 / 2
    router = 2 * (4 * 512 * 512 + 2 * 512 * 512 + 512 * 7) + 4 * 512 * 4097 / 2
    each = 6 * active + attention + router
    got = speed.of("experts", tokens, seconds=2.0)
    assert got["tokens_per_second"] == tokens / 2
    assert got["tflops"] == pytest.approx(each * tokens / 2 / 64 / 1e12)
    assert got["mfu"] == pytest.approx(each * tokens / 2 / 64 / 459e12)
    assert got["seconds"] == 2.0


def test_peaks_of_known_devices():
    kinds = {
        "TPU v4": 275e12,
        "TPU v5 lite": 197e12,
        "TPU v5": 459e12,
        "TPU v5p": 459e12,
        "TPU v6 lite": 918e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "cpu": None,
        "TPU v9": None,
    }
    assert {kind: peak_of(kind) for kind in kinds} == kinds


def test_mfu_is_left_out_where_the_peak_is_unknown():
    speed = Speed(config.Run(), LLAMA, Channels(7, 3000, 2504), 1, "cpu")
    assert "mfu" not in speed.of("router", 100, 1.0) and speed.of("router", 100, 1.0)["tflops"] > 0


def test_goodput_counts_steps_that_stand_over_all_the_time_since_the_first_start(tmp_path):
    Record(tmp_path).began({})
    record = json.loads((tmp_path / "status.json").read_text())
    record["attempts"][0]["began"] = time.time() - 100
    (tmp_path / "status.json").write_text(json.dumps(record))
    journal = Journal(tmp_path)
    for step in range(1, 5):
        journal.train(step, Position(0, "router", step - 1, step - 1), {"seconds": 10.0})
    journal.close()
    again = Journal(tmp_path, done=2)  # steps 3 and 4 were lost and are taken again
    again.train(3, Position(0, "router", 2, 2), {"seconds": 10.0})
    again.close()
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["goodput"] for line in lines] == pytest.approx([0.1, 0.2, 0.3], abs=0.02)


def test_a_trace_on_request(tmp_path):
    import jax.numpy as jnp

    trace = Trace(str(tmp_path), steps=2)
    for _ in range(4):
        trace.before("router")
        jnp.ones(3).sum().block_until_ready()
        trace.after("router", ended=False)
    trace.close()
    assert [p.name for p in (tmp_path / "trace").iterdir()] == ["router"]
    assert list((tmp_path / "trace" / "router").rglob("*.xplane.pb"))
    Trace(str(tmp_path / "none"), steps=0).before("router")
    assert not (tmp_path / "none").exists()
