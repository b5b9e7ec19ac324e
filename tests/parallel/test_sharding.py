"""Both stages on 8 devices equal one device, with every large array spread: see eight_devices.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

EVERYWHERE = ("experts", "tied experts", "router, Eq. 4")
ROOT = Path(__file__).parents[2]
MESHES = {
    "fsdp 8",
    "data 2 x fsdp 4",
    "data 8",
    "fsdp 4 x tensor 2",
    "expert 7",
    "data 2 x expert 2 x tensor 2",
}
CASES = {"experts", "experts, scanned, accumulated", "tied experts", "router, Eq. 4", "router, domain labels"}


def run_on_eight_devices():
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(ROOT),
    }
    script = Path(__file__).with_name("eight_devices.py")
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Involuntary full rematerialization" not in done.stderr  # of an activation: XLA's word for a bad layout
    return json.loads(done.stdout)


def test_loss_and_gradients_equal_one_device_and_no_large_array_is_replicated():
    """One test, as its process takes a minute: parallel workers would each start one."""
    report = run_on_eight_devices()
    assert report.pop("start_router") < 1e-6
    measured = report.pop("measured")  # by calibration and by perplexity
    assert set(measured) == MESHES and max(measured.values()) < 1e-5, measured
    generated = report.pop("generated")
    assert set(generated) == MESHES and all(generated.values()), generated
    assert set(report) == CASES
    for case, results in report.items():
        assert "data 2 x fsdp 4" in results and (case not in EVERYWHERE or set(results) == MESHES)
        for mesh, result in results.items():
            assert result["loss"] < 1e-5, (case, mesh)
            assert result["gradients"] < 1e-5, (case, mesh)
            assert result["large"] >= 9, (case, mesh)  # embedding and feed-forward weights, each with two moments
            assert result["moved"] == [], (case, mesh)
            if mesh != "data 8":  # plain data parallelism: a copy on every device is what it asks for
                assert result["replicated"] == [], (case, mesh)
