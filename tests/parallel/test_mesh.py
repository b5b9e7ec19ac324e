"""The mesh, the rules table, `constrain` and the placement of batches: what they accept and what they refuse."""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from readme_jax import config
from readme_jax.config import MixtureConfig, ModelConfig
from readme_jax.errors import ConfigError
from readme_jax.models.experts import plan_batch
from readme_jax.models.llama import Llama
from readme_jax.models.runtime import Runtime
from readme_jax.parallel import mesh as meshes
from readme_jax.parallel.mesh import constrain, make_mesh, partition_spec, put_batch, sharding_for, tree_shardings
from readme_jax.parallel.placing import WHOLE, Share, share_of


@dataclasses.dataclass
class Sizes:
    """A mesh by its sizes alone: what the checks on shapes look at."""

    shape: dict[str, int]


def abstract(data=1, fsdp=1, expert=1, tensor=1):
    return AbstractMesh((data, fsdp, expert, tensor), meshes.MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def test_a_mesh_of_one():
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    assert mesh.axis_names == ("data", "fsdp", "expert", "tensor")
    assert set(mesh.shape.values()) == {1}
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_sizes_that_do_not_match_the_devices():
    one = jax.devices()[:1]
    with pytest.raises(ConfigError, match=r"mesh \(data 2, fsdp 4, expert 1, tensor 1\) does not match 1 devices"):
        make_mesh(config.Mesh(data=2, fsdp=4), one)
    with pytest.raises(ConfigError, match="does not match 1 devices"):
        make_mesh(config.Mesh(data=2), one)  # nothing is left for fsdp


def test_constrain_refuses_what_it_cannot_lay_out():
    x = jnp.zeros((2, 3))
    with pytest.raises(ConfigError, match="no mesh"):
        constrain(x, "batch", None)
    with pytest.raises(ConfigError, match="no mesh"):
        jax.jit(lambda x: constrain(x, "batch", None))(x)
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        np.testing.assert_array_equal(constrain(x, "batch", None), x)
        with pytest.raises(ConfigError, match="unknown logical axis 'batches'"):
            constrain(x, "batches", None)
        with pytest.raises(ConfigError, match="1 axis names for an array of 2 dimensions"):
            constrain(x, "batch")


def test_every_rule_names_mesh_axes():
    assert {a for axes in meshes.RULES.values() for a in axes} <= set(meshes.MESH_AXES)
    assert partition_spec("batch", "length", None) == PartitionSpec(("data", "fsdp", "expert"), None, None)
    assert partition_spec("vocab", "embed") == PartitionSpec(("tensor",), ("fsdp", "expert"))


def test_a_large_tensor_must_divide_and_a_small_one_may_stay_whole():
    mesh = abstract(fsdp=8)
    assert sharding_for("w", (1024, 64), ("ffn", "embed"), mesh).spec == PartitionSpec(("tensor",), ("fsdp", "expert"))
    assert sharding_for("w", (100, 60), ("ffn", "embed"), mesh).spec == PartitionSpec(("tensor",), None)
    with pytest.raises(ConfigError, match=r"layers_3.gate \(2048, 60\): 60 does not divide over fsdp x expert = 8 dev"):
        sharding_for("layers_3.gate", (2048, 60), ("ffn", "embed"), mesh)


@pytest.mark.parametrize("layout", ["unrolled", "scanned"])
def test_every_parameter_of_a_mixture_has_axes(layout):
    """Shardings come from the modules' own declarations; scanning adds a layer axis that is not spread."""
    shape = ModelConfig(1024, 64, 2, 4, 4, 16, 2048)
    model = Llama(shape, MixtureConfig(2, 1024, 512), Runtime(layout=layout))
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        plan = plan_batch(jnp.zeros((1, 1, 1), jnp.int32), 2)
        boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), plan))["params"]
    mesh = abstract(fsdp=4, tensor=2)
    shardings = tree_shardings(boxed, mesh)
    shapes = jax.tree_util.tree_leaves_with_path(nn.unbox(boxed))
    for (path, x), sharding in zip(shapes, jax.tree.leaves(shardings), strict=True):
        axes = [a for names in sharding.spec if names for a in ((names,) if isinstance(names, str) else names)]
        ways = math.prod(mesh.shape[a] for a in axes)
        assert ways == (8 if x.size >= 64 * 64 else 4), jax.tree_util.keystr(path)
        assert len(sharding.spec) == x.ndim


class Held:
    """A batch's sharding as one process sees it: its devices and the rows on each."""

    def __init__(self, *rows):
        self.rows = rows

    def addressable_devices_indices_map(self, shape):
        return {i: (slice(*ends),) for i, ends in enumerate(self.rows)}


@pytest.mark.parametrize(
    "held,share",
    [
        (Held((2, 3), (3, 4)), Share(1, 3)),  # rows spread over all devices: 2 of 6 here
        (Held((3, 6), (3, 6)), Share(1, 2)),  # `tensor` spans processes: others hold the same rows
        (Held((None, None), (None, None)), WHOLE),  # `tensor` spans all
        (Held((0, 1), (3, 4)), WHOLE),  # no one stretch
        (Held((1, 2), (2, 3)), WHOLE),  # a stretch, but no whole number of them before it
    ],
)
def test_the_rows_that_a_process_reads(held, share):
    assert share_of(held, 6) == share


def test_a_batch_must_divide_over_its_devices():
    batch = {"tokens": np.zeros((6, 4), np.int32)}
    with pytest.raises(ConfigError, match="a batch of 6 sequences does not divide over data x fsdp x expert = 4"):
        put_batch(batch, Sizes({"data": 2, "fsdp": 2, "expert": 1}))
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    assert put_batch(batch, mesh)["tokens"].sharding.spec == PartitionSpec(("data", "fsdp", "expert"))
