"""Cutting a dense feed-forward layer into a permanent part and experts of one width, padded with zero channels.

# D model width, E experts, F dense FFN width, L layers, P permanent rows, d exclusive rows of an expert
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from readme_jax.config import MixtureConfig
from readme_jax.models.experts import gather_rows
from readme_jax.refactor.select import permanent_channels

Params = Mapping[str, Any]


def _indices(mask: np.ndarray, width: int) -> np.ndarray:
    """Channels of a mask [F], ascending, padded to `width` with F."""
    found = np.flatnonzero(mask).astype(np.int32)
    return np.concatenate([found, np.full(width - len(found), len(mask), np.int32)])


def _aligned(width: int, align: int) -> int:
    return -(-width // align) * align


def lay_out(
    masks: np.ndarray, permanent: bool, tied: bool, top_k: int, align: int
) -> tuple[MixtureConfig, dict[str, dict[str, np.ndarray]]]:
    """Widths and channel indices of a mixture that keeps masks [L, E, F].

    With `permanent`, channels that all experts of a layer keep become its shared part. Widths differ by layer: all
    are padded to the widest, a multiple of `align`; padding indexes F, a zero channel (silu(0) * 0 = 0, so exact).
    """
    layers, experts, _ = masks.shape
    shared = np.stack([permanent_channels(m) for m in masks]) if permanent and experts > 1 else masks[:, 0] & False
    own = masks & ~shared[:, None]
    config = MixtureConfig(
        num_experts=experts,
        expert=_aligned(max(1, int(own.sum(-1).max())), align),
        permanent=_aligned(int(shared.sum(-1).max()), align),
        tied=tied,
        top_k=top_k,
    )
    channels = {
        f"layers_{i}": {
            "permanent": _indices(shared[i], config.permanent),
            "experts": np.stack([_indices(own[i, e], config.expert) for e in range(experts)]),
        }
        for i in range(layers)
    }
    return config, channels


def slice_layer(
    p: Params, channels: Mapping[str, np.ndarray], mixture: MixtureConfig, downs: Mapping[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """One layer's parameters with its dense FFN cut into parts; a tied mixture keeps the FFN and is cut on the fly.

    `downs` are refitted W_down by part name, [D, rows] without padding.
    """
    if mixture.tied:
        return dict(p)
    rows = {f"experts_{e}": channels["experts"][e] for e in range(mixture.num_experts)}
    if mixture.permanent:
        rows["permanent"] = channels["permanent"]
    parts = {name: gather_rows(p["ffn"], jnp.asarray(index)) for name, index in rows.items()}
    for name, down in (downs or {}).items():
        padding = len(rows[name]) - down.shape[1]
        parts[name]["down"] = jnp.pad(jnp.asarray(down), ((0, 0), (0, padding)))
    return {k: v for k, v in p.items() if k != "ffn"} | parts
