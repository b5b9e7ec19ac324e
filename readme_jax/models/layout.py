"""Conversion between the two runtime layouts of a backbone's tree: unrolled and scanned (see docs/architecture.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from readme_jax.config import Layout

Params = Mapping[str, Any]


def _numbered(tree: Params, prefix: str) -> list[str]:
    return sorted((k for k in tree if k.startswith(prefix)), key=lambda k: int(k.removeprefix(prefix)))


def _stack(tree: Params, prefix: str, name: str) -> dict[str, Any]:
    keys = _numbered(tree, prefix)
    if not keys:
        return dict(tree)
    rest = {k: v for k, v in tree.items() if k not in keys}
    return rest | {name: jax.tree.map(lambda *xs: jnp.stack(xs), *(tree[k] for k in keys))}


def _split(tree: Params, name: str, prefix: str) -> dict[str, Any]:
    if name not in tree:
        return dict(tree)
    size = jax.tree.leaves(tree[name])[0].shape[0]
    rest = {k: v for k, v in tree.items() if k != name}
    return rest | {f"{prefix}{i}": jax.tree.map(lambda x, i=i: x[i], tree[name]) for i in range(size)}


def scan(tree: Params) -> dict[str, Any]:
    """Layers, and experts inside them, stacked along leading axes. Works on parameters and on channels."""
    layers = {k: _stack(tree[k], "experts_", "experts") for k in _numbered(tree, "layers_")}
    return _stack(dict(tree) | layers, "layers_", "layers")


def unroll(tree: Params) -> dict[str, Any]:
    """An entry a layer and, for parameters, an entry an expert: the inverse of `scan`."""
    tree = _split(tree, "layers", "layers_")
    return {
        k: _split(v, "experts", "experts_") if k.startswith("layers_") and isinstance(v.get("experts"), Mapping) else v
        for k, v in tree.items()
    }


def to_layout(tree: Params, layout: Layout) -> dict[str, Any]:
    """The tree in a layout, whichever it is in."""
    return scan(tree) if layout == "scanned" else unroll(tree)
