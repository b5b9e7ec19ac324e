"""One mesh (data, fsdp, expert, tensor), one rules table, one `constrain`.

Every parameter and activation names its axes logically; only this module knows where they lie on the devices. One
device is a mesh of one: the same code runs everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from readme_jax import config
from readme_jax.errors import ConfigError
from readme_jax.parallel.placing import WHOLE, Share, put_rows

MESH_AXES = ("data", "fsdp", "expert", "tensor")

# Logical axis -> mesh axes. Rows of a batch are spread over `data`, `fsdp` and `expert`; weights over `fsdp` and
# `expert` on their model-width side and over `tensor` on the other. Experts are stored like all other weights, so any
# number of them lies on any mesh; a layer hands them out over `expert` when it runs (models/experts.py).
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "length": (),
    "embed": ("fsdp", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "ffn": ("tensor",),
    "expert": (),
    "vocab": ("tensor",),
    "layers": (),
}
BATCH_AXES = RULES["batch"]

# Tensors smaller than this may stay whole when a dimension does not divide; larger ones are an error.
SMALL = 1 << 16


def axis_sizes(mesh: config.Mesh, devices: int) -> dict[str, int]:
    """Devices along each mesh axis, of so many in all. Raises ConfigError when sizes and devices do not match."""
    sizes = [mesh.data, mesh.fsdp, mesh.expert, mesh.tensor]
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        shape = ", ".join(f"{a} {s}" for a, s in zip(MESH_AXES, sizes, strict=True))
        raise ConfigError(f"mesh ({shape}) does not match {devices} devices: change the Mesh axes")
    return dict(zip(MESH_AXES, sizes, strict=True))


def make_mesh(mesh: config.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of a config over `devices` (default: all). Raises ConfigError when sizes and devices do not match."""
    devices = list(jax.devices() if devices is None else devices)
    shape, kinds = tuple(axis_sizes(mesh, len(devices)).values()), (AxisType.Auto,) * len(MESH_AXES)
    if devices[0].platform == "tpu":  # a mesh axis may take a part of a torus axis, which make_mesh refuses
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(grid, MESH_AXES, axis_types=kinds)
    return jax.make_mesh(shape, MESH_AXES, axis_types=kinds, devices=devices)


def partition_spec(*names: str | None) -> PartitionSpec:
    """Mesh axes of logical axes, one name (or None) a dimension. Raises ConfigError on an unknown name."""
    for name in names:
        if name is not None and name not in RULES:
            raise ConfigError(f"unknown logical axis '{name}': one of {', '.join(RULES)}")
    return PartitionSpec(*(RULES[n] or None if n is not None else None for n in names))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Lay an activation out by its logical axes; inside `jax.shard_map` it is a device's own already.

    Raises ConfigError on an unknown axis or outside a mesh.
    """
    spec = partition_spec(*names)
    if len(names) != x.ndim:
        raise ConfigError(f"{len(names)} axis names for an array of {x.ndim} dimensions")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ConfigError("no mesh: run under jax.set_mesh(make_mesh(...))")
    return x if mesh.are_all_axes_manual else _lay_out(x, spec)


def spread_weight(w: jax.Array, *names: str | None) -> jax.Array:
    """Lay a weight out by its logical axes inside a step: like `constrain`, but whole along what does not divide, and
    as it is outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return w if mesh.empty else _lay_out(w, partition("a weight", w.shape, names, mesh))


@partial(jax.jit, static_argnums=1, inline=True)  # also takes an array made outside the mesh
def _lay_out(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, spec)


def partition(path: str, shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Any) -> PartitionSpec:
    """How one tensor is spread; a small one whose dimension does not divide stays whole along it.

    Raises ConfigError, naming the tensor, when a large one does not divide.
    """
    spec: list[tuple[str, ...] | None] = []
    for size, axes in zip(shape, (RULES[n] if n else () for n in names), strict=True):
        ways = math.prod(mesh.shape[a] for a in axes)
        if size % ways and math.prod(shape) >= SMALL:
            raise ConfigError(f"{path} {shape}: {size} does not divide over {' x '.join(axes)} = {ways} devices")
        spec.append(None if size % ways or not axes else axes)
    return PartitionSpec(*spec)


def sharding_for(path: str, shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Any) -> NamedSharding:
    """Sharding of one tensor: see `partition`."""
    return NamedSharding(mesh, partition(path, shape, names, mesh))


def mesh_axes(axes: Any, mesh: Any) -> tuple[str, ...]:
    """Those of a dimension's mesh axes (an entry of a partition) that hold more than one device."""
    named = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(a for a in named if mesh.shape[a] > 1)


def gather(x: jax.Array, axes: tuple[str, ...], axis: int) -> jax.Array:
    """Inside `jax.shard_map`: the whole of a dimension that is spread over mesh axes; its gradient is summed."""
    return jax.lax.all_gather(x, axes, axis=axis, tiled=True) if axes else x


def tree_shardings(boxed: Any, mesh: Any) -> Any:
    """Shardings of a tree of abstract parameters boxed with their logical axes (`nn.with_logical_partitioning`)."""

    def leaf(path: Any, x: Any) -> NamedSharding:
        if not isinstance(x, nn.LogicallyPartitioned):
            return NamedSharding(mesh, PartitionSpec())
        return sharding_for(jax.tree_util.keystr(path), x.value.shape, x.names, mesh)

    boxed_leaf: Callable[[Any], bool] = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree_util.tree_map_with_path(leaf, boxed, is_leaf=boxed_leaf)


def replicated(mesh: Any) -> NamedSharding:
    """The sharding of scalars and other small state."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Any) -> NamedSharding:
    """The sharding of a batch: rows over data, fsdp and expert."""
    return NamedSharding(mesh, partition_spec("batch"))


def batch_ways(mesh: Any) -> int:
    """Devices that a batch's rows are spread over."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)


def put_batch(batch: dict[str, np.ndarray], mesh: Any, share: Share = WHOLE) -> dict[str, jax.Array]:
    """A host batch on the mesh, rows over data, fsdp and expert. Raises ConfigError when the rows do not divide.

    Of several processes each brings its `share` of the rows (`placing.share_of`).
    """
    ways = batch_ways(mesh)
    rows = len(next(iter(batch.values()))) * share.parts
    if rows % ways:
        raise ConfigError(f"a batch of {rows} sequences does not divide over {' x '.join(BATCH_AXES)} = {ways} devices")
    return {k: put_rows(v, batch_sharding(mesh), share) for k, v in batch.items()}
