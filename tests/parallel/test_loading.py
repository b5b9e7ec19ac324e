"""Weights from files onto a mesh: the values of `load_dense`, and no more memory than what is kept and one tensor."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from multihost import free_port

import readme_jax
from readme_jax import config
from readme_jax.checkpoints.hf import Dense, load_dense, open_dense, save_dense
from readme_jax.checkpoints.hf_config import to_hf
from readme_jax.checkpoints.mixture import open_mixture, save_mixture
from readme_jax.checkpoints.tensors import backbone_shapes, hf_names
from readme_jax.config import ModelConfig
from readme_jax.loading import dense_on_mesh, load_on_mesh
from readme_jax.models.layout import to_layout
from readme_jax.parallel.mesh import make_mesh
from readme_jax.tuning.step import backbone_table

SCRIPT = Path(__file__).with_name("load_on_mesh.py")
LLAMA = ModelConfig(32000, 4096, 2, num_heads=32, num_kv_heads=32, head_dim=128, ffn_dim=11008)  # two layers of it
SLACK = 64 << 20  # what a process allocates beside: threads' arenas, the runtime's own


@pytest.mark.parametrize("layout", ["unrolled", "scanned"])
def test_weights_on_a_mesh_are_those_of_the_files(tmp_path, tiny_model, layout):
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    dense, mixture = tiny_model("dense"), tiny_model("top1")
    save_dense(tmp_path / "dense", Dense(dense.config, jax.tree.map(np.asarray, dense.params), None))
    save_mixture(tmp_path / "mixture", mixture)
    got = dense_on_mesh(open_dense(tmp_path / "dense"), layout, mesh)
    want = load_dense(tmp_path / "dense").params
    jax.tree.map(np.testing.assert_array_equal, got.params, to_layout(want, layout))
    shape, tensors = open_mixture(tmp_path / "mixture")
    experts = load_on_mesh(tensors, backbone_table(shape.config, shape.mixture, layout), mesh)
    jax.tree.map(np.testing.assert_array_equal, experts, to_layout(mixture.params, layout))


def empty_model(folder: Path) -> None:
    """A safetensors folder in bfloat16, all zeros, that takes no room on the disk."""
    names = {path: name for name, path in hf_names(LLAMA.num_layers).items()}
    header, at = {}, 0
    for path, shape in backbone_shapes(LLAMA).items():
        size = 2 * int(np.prod(shape))
        header[names[path]] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    (folder / "config.json").write_text(json.dumps(to_hf(LLAMA, "bfloat16", None, ())))


def test_two_processes_hold_their_share_and_one_tensor_at_most(tmp_path):
    """Two layers of 7B widths over 2 processes x 4 devices: the memory of each process, which on a CPU is its devices'
    too, grows by what its devices keep and at most one tensor, and no device has more than an eighth."""
    empty_model(tmp_path / "model")
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(Path(readme_jax.__file__).parents[1]),
    }
    port = free_port()
    commands = [[sys.executable, str(SCRIPT), str(tmp_path / "model"), str(port), str(n)] for n in range(2)]
    jobs = [subprocess.Popen(c, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    sizes = [4 * int(np.prod(s)) for s in backbone_shapes(LLAMA).values()]
    for job in jobs:
        out, said = job.communicate(timeout=120)
        assert job.returncode == 0, said[-3000:]
        told = json.loads(out)
        assert told["whole"] == sum(sizes)
        assert len(told["devices"]) == 4 and max(told["devices"]) == sum(sizes) / 8
        assert told["grown"] <= sum(told["devices"]) + max(sizes) + SLACK
