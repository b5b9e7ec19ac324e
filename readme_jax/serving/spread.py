"""How serving lies on a mesh: every device holds a part of each weight and of the caches, and of no row less than all.

A call runs on all devices at once, inside `jax.shard_map`: a device attends with its own heads, multiplies its part of
the feed-forward width, runs its own experts and knows its part of the vocabulary. What a layer's devices compute is
added up twice, after attention and after the feed-forward part (experts and permanent part in one sum); logits are
gathered once a step. All devices then sample and route alike. Rows and the router are whole on every device.

Weights are cut over `fsdp`, `expert` and `tensor` together; experts are handed out over `expert` and cut over the other
two; devices along `data` hold copies and compute the same. A width or vocabulary that does not divide is padded with
zeros; heads that do not divide are cut over fewer axes.

# X devices of the expert axis, E experts, m = ceil(E / X) experts a device: device r holds r * m .. r * m + m - 1
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from readme_jax.config import ModelConfig
from readme_jax.parallel.mesh import mesh_axes

Axes = tuple[str, ...]
WEIGHTS = ("fsdp", "expert", "tensor")  # axes that weights are cut over
WIDTH = ("fsdp", "tensor")  # those of an expert's width


class Cut(NamedTuple):
    """Axes that arrays of a call are cut over, none on one device: attention heads, and everything else; how many
    devices share the experts."""

    heads: Axes = ()
    rest: Axes = ()
    experts: int = 1


ONE = Cut()  # device


@dataclass(frozen=True)
class Spread:
    """A model's arrays on a mesh."""

    mesh: jax.sharding.Mesh
    config: ModelConfig

    @property
    def every(self) -> Axes:
        """Axes of more than one device that weights are cut over."""
        return mesh_axes(WEIGHTS, self.mesh)

    @property
    def width(self) -> Axes:
        """Those of an expert's width."""
        return mesh_axes(WIDTH, self.mesh)

    @property
    def heads(self) -> Axes:
        """Those of attention: as many devices as divide query and kv heads."""
        choices = (axes for count in range(len(self.every) + 1) for axes in combinations(self.every, count))
        return max((axes for axes in choices if self.config.num_kv_heads % self.ways(axes) == 0), key=self.ways)

    @property
    def experts(self) -> int:
        """X."""
        return int(self.mesh.shape["expert"])

    @property
    def cut(self) -> Cut:
        """What a call's body knows of it."""
        return Cut(self.heads, self.every, self.experts)

    @property
    def own(self) -> ModelConfig:
        """The model as one device computes it: with its own heads."""
        ways = self.ways(self.heads)
        heads, kv_heads = self.config.num_heads // ways, self.config.num_kv_heads // ways
        return replace(self.config, num_heads=heads, num_kv_heads=kv_heads)

    def ways(self, axes: Axes) -> int:
        """Devices along axes."""
        return math.prod(self.mesh.shape[a] for a in axes)

    def sharding(self, *dimensions: Axes, kind: str = "device") -> NamedSharding:
        """Dimensions cut over axes, the others whole."""
        return NamedSharding(self.mesh, PartitionSpec(*(axes or None for axes in dimensions)), memory_kind=kind)

    def put(self, w: Any, dtype: Any, *dimensions: Axes, kind: str = "device") -> jax.Array:
        """An array on the mesh in a number format, padded with zeros where a dimension does not divide.

        From the host every device gets its part alone.
        """
        if not isinstance(w, jax.Array):
            w = np.asarray(w, dtype)
        w = w if w.dtype == dtype else w.astype(dtype)
        missing = [-size % self.ways(axes) for size, axes in zip(w.shape, dimensions, strict=False)]
        if any(missing):
            padding = [(0, n) for n in [*missing, *[0] * (w.ndim - len(missing))]]
            w = (jnp if isinstance(w, jax.Array) else np).pad(w, padding)
        return jax.device_put(w, self.sharding(*dimensions, kind=kind))

    def fuse(self, parts: Sequence[jax.Array], axes: Axes) -> jax.Array:
        """Matrices whose rows are cut over axes as one of which every device has its rows of each."""

        def one(parts: Sequence[jax.Array]) -> jax.Array:
            rows = [w.reshape(self.ways(axes), -1, w.shape[1]) for w in parts]
            return jnp.concatenate(rows, axis=1).reshape(-1, parts[0].shape[1])

        return jax.jit(one, out_shardings=self.sharding(axes))(parts)

    def holders(self, group: int) -> Spread:
        """The devices that hold the `group`th experts, as a spread of their own."""
        return replace(self, mesh=_part(self.mesh, group)) if self.experts > 1 else self


def _part(mesh: jax.sharding.Mesh, group: int) -> jax.sharding.Mesh:
    axis = mesh.axis_names.index("expert")
    devices = np.take(mesh.devices, [group], axis=axis)
    return jax.sharding.Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


def join(parts: Sequence[jax.Array], like: Any) -> jax.Array:
    """Arrays that each lie on the devices of one place of the expert axis as one array, laid out as `like`: no copy."""
    shards = [shard.data for part in parts for shard in part.addressable_shards]
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, shards)


# --- inside `jax.shard_map` ---------------------------------------------------------------------------------------


def total(x: jax.Array, axes: Axes) -> jax.Array:
    """The sum over devices of what each has computed."""
    return jax.lax.psum(x, axes) if axes else x


def embed(table: jax.Array, tokens: jax.Array, axes: Axes) -> jax.Array:
    """Rows of an embedding whose vocabulary is cut: tokens [N] -> [N, D]."""
    if not axes:
        return table[tokens]
    at = tokens - jax.lax.axis_index(axes) * table.shape[0]
    here = (at >= 0) & (at < table.shape[0])
    return total(jnp.where(here[:, None], jnp.take(table, at, axis=0, mode="clip"), 0), axes)


def whole_vocabulary(logits: jax.Array, axes: Axes, size: int) -> jax.Array:
    """Logits [B, V / devices] of each device's part of the vocabulary -> [B, V] on all."""
    return jax.lax.all_gather(logits, axes, axis=1, tiled=True)[:, :size] if axes else logits


def own_experts(index: jax.Array, given: int, cut: Cut) -> tuple[jax.Array, int]:
    """Places among the `given` experts of all devices as places among this device's, and how many those are: others'
    come after the last."""
    each = given // cut.experts
    if cut.experts == 1:
        return index, each
    at = index - jax.lax.axis_index("expert") * each
    return jnp.where((at >= 0) & (at < each), at, each), each
