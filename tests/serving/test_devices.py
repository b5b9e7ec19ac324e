"""The engine on several devices answers as on one, with every weight and cache spread: see devices.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from readme_jax.checkpoints.known import shape_of
from readme_jax.config import Mesh
from readme_jax.errors import ConfigError
from readme_jax.parallel.mesh import MESH_AXES
from readme_jax.serving.build import mesh_of
from readme_jax.serving.spread import Spread
from readme_jax.serving.store import ExpertStore

ROOT = Path(__file__).parents[2]
HEADS = ("q", "k", "v", "o")
UNEVEN = {"expert 7", "expert 8", "fsdp 8", "tensor 2 x fsdp 4", "data 2 x fsdp 4"}
MESHES = UNEVEN | {
    "tensor 2", "tensor 2, dense", "tensor 2, slots", "tensor 2, kernels", "expert 2 x tensor 2", "data 8",
    "data 2 x expert 2 x tensor 2",
}  # fmt: skip


def test_tokens_and_logprobs_are_those_of_one_device_and_no_large_array_is_replicated():
    """One test, as its process takes a minute: parallel workers would each start one."""
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "serving")]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    script = Path(__file__).with_name("devices.py")
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert set(report) == MESHES
    for mesh, found in report.items():
        assert found["differ"] <= found["close"], mesh
        assert found["alike"] and found["drawn alike"], mesh
        if mesh in UNEVEN:  # two kv heads do not divide over so many devices
            assert all("caches" in name or name.split("'")[-2] in HEADS for name in found["whole"]), mesh
        elif mesh != "data 8":  # copies are what it asks for
            assert found["whole"] == [], mesh
    slots = report["tensor 2, slots"]
    assert slots["loads"] > 0 and slots["missing"] > 0


def abstract(**sizes: int) -> jax.sharding.AbstractMesh:
    return jax.sharding.AbstractMesh(tuple(sizes.get(a, 1) for a in MESH_AXES), MESH_AXES)


@pytest.mark.parametrize(
    "sizes, heads",
    [
        ({"tensor": 2}, ("tensor",)),
        ({"expert": 2, "tensor": 4}, ("expert", "tensor")),
        ({"expert": 8, "tensor": 2}, ("expert",)),  # 8 kv heads
        ({"expert": 7, "tensor": 2}, ("tensor",)),
        ({"data": 4, "fsdp": 3}, ()),
    ],
)
def test_heads_are_cut_over_as_many_devices_as_divide_them(sizes, heads):
    spread = Spread(abstract(**sizes), shape_of("mistralai/Mistral-7B-v0.1"))
    assert spread.heads == heads
    assert spread.own.num_kv_heads * spread.ways(heads) == 8 and spread.own.num_heads * spread.ways(heads) == 32


def test_what_cannot_be_spread_is_told_in_one_line(tiny_model):
    with pytest.raises(ConfigError, match="tensor 64.* does not match"):
        mesh_of(Mesh(tensor=64))
    with pytest.raises(ConfigError, match="slots 2 and Mesh.expert = 2"):
        ExpertStore(tiny_model("top1"), 2, mesh=abstract(expert=2))
    assert mesh_of(Mesh()).size == 1
