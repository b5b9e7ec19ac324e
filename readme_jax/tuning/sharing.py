"""Experts learn from each other's text: gradients on channels that several of them were cut from.

An expert that owns its rows sees only its own tokens, a share of all; a dense slice of its width sees them all. Experts
are cut from one dense layer and overlap, so what others' tokens say of a channel is evidence for every copy of it:

    g'_e[c] = g_e[c] + weight * sum over other experts j that hold channel c of g_j[c]

With weight 0 experts learn alone, with 1 they get the gradients of experts tied to one layer. Not in the paper.

# E experts, F dense FFN width, D model width, d expert width, L layers
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Params = Mapping[str, Any]


def share_gradients(gradients: Params, channels: Params, width: int, weight: float) -> dict[str, Any]:
    """Gradients of a backbone whose experts own their rows, in either layout, mixed as above; all others as they are.

    `channels[layer]["experts"]` [E, d], or [L, E, d] where layers are scanned, index a dense layer of `width` F
    channels; F is padding.
    """
    mixed = dict(gradients)
    for name in channels:
        layer, index = gradients[name], channels[name]["experts"]
        if "experts" in layer:
            parts = {"experts": _of_layers(layer["experts"], index, width, weight)}
        else:
            each = [layer[f"experts_{e}"] for e in range(index.shape[0])]
            own = _of_layer(jax.tree.map(lambda *g: jnp.stack(g), *each), index, width, weight)
            parts = {f"experts_{e}": jax.tree.map(lambda g, e=e: g[e], own) for e in range(len(each))}
        mixed[name] = {**layer, **parts}
    return mixed


def _of_layers(gradients: Params, index: jax.Array, width: int, weight: float) -> dict[str, jax.Array]:
    """Of scanned layers, one at a time: all at once would hold every dense layer beside the gradients."""
    return jax.lax.map(lambda layer: _of_layer(layer[0], layer[1], width, weight), (dict(gradients), index))


def _of_layer(gradients: Params, index: jax.Array, width: int, weight: float) -> dict[str, jax.Array]:
    """One layer's, stacked: gate and up [E, d, D], down [E, D, d]."""
    return {
        name: _mix(g.swapaxes(1, 2), index, width, weight).swapaxes(1, 2)
        if name == "down"
        else _mix(g, index, width, weight)
        for name, g in gradients.items()
    }


def _mix(g: jax.Array, index: jax.Array, width: int, weight: float) -> jax.Array:
    """[E, d, D]: each expert's rows are of other dense channels, ascending, so that adding them needs no atomics."""
    total = jnp.zeros((width + 1, g.shape[2]), g.dtype)
    for rows, own in zip(index, g, strict=True):
        total = total.at[rows].add(own, indices_are_sorted=True)
    return (1 - weight) * g + weight * total[index]
