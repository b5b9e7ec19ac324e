"""Weights from files onto a mesh: each process reads the parts that its devices keep, one tensor after another.

No host holds more than a part of a tensor beside what its devices keep, and no device more than its share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from readme_jax.checkpoints.hf import Dense, Opened
from readme_jax.checkpoints.tensors import Stored, flatten, unflatten
from readme_jax.config import Layout
from readme_jax.models.weights import Table
from readme_jax.parallel.placing import read_parts
from readme_jax.tuning.step import backbone_table, shard_table


class Stack:
    """Tensors of one shape as one with a leading axis; indexed, it reads the parts asked for."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts

    @property
    def view(self) -> Stack:
        return self

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        first, *rest = index
        return np.stack([part.view[tuple(rest)] for part in self.parts[first]])


class LayerByLayer(Mapping[str, Any]):
    """A dense model's parameters (unrolled, float32), each read from its files onto a mesh whenever it is asked for.

    On the devices is what the caller holds: of a model that is cut, a layer.
    """

    def __init__(self, opened: Opened, mesh: Any) -> None:
        self.tensors, self.mesh = opened.tensors, mesh
        self.table = backbone_table(opened.config, None, "unrolled")

    def __getitem__(self, name: str) -> Any:
        return load_on_mesh(self.tensors, {name: self.table[name]}, self.mesh)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)


def dense_on_mesh(opened: Opened, layout: Layout, mesh: Any) -> Dense:
    """A dense model in float32 on a mesh, in a layout."""
    table = backbone_table(opened.config, None, layout)
    return Dense(opened.config, load_on_mesh(opened.tensors, table, mesh), opened.tokenizer)


def load_on_mesh(tensors: Mapping[str, Stored], table: Table, mesh: Any) -> dict[str, Any]:
    """The weights of a table in float32, as its shardings lay them, from unrolled tensors by path.

    Raises ConfigError where a large weight does not divide over the mesh.
    """
    weights, shardings = flatten(table), flatten(shard_table(table, mesh))
    loaded: dict[str, jax.Array] = {}
    for path, weight in weights.items():
        source = _source(tensors, path, weight.shape)
        loaded[path] = read_parts(source.view, weight.shape, shardings[path], np.float32)
    return unflatten(loaded)


def _source(tensors: Mapping[str, Stored], path: str, shape: tuple[int, ...]) -> Stored | Stack:
    """The tensor of a path, or those that a path of the scanned layout stacks: layers, and experts in them."""
    for stacked, each in (("layers", "layers_{}"), ("experts", "experts_{}")):
        parts = path.split(".")
        if stacked in parts:
            at = parts.index(stacked)
            names = [".".join([*parts[:at], each.format(i), *parts[at + 1 :]]) for i in range(shape[0])]
            return Stack([_source(tensors, name, shape[1:]) for name in names])
    return tensors[path]
