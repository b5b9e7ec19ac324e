"""How large a model is and how much arithmetic it takes, from its shape alone: no weights, nothing compiled.

A matmul of n parameters takes 2n FLOPs a token forward and 4n backward. Attention's two products take 4 H h FLOPs a
token and key attended to; causal attention attends to (T + 1) / 2 keys on average, fewer with a sliding window. Norms,
rotary embeddings, softmax and the look-up of embeddings are not counted, nor is recomputation by remat.

# T length, D model width, H heads, K kv heads, h head width, E experts, F dense FFN width, V vocabulary, L layers
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from readme_jax.config import ModelConfig, RouterConfig
from readme_jax.models.weights import Table, Weight, block_table, outer_table, router_table

TRAINING = 3  # forward and backward over forward


def table_size(table: Table) -> int:
    """Parameters of a table of weights."""
    return sum(math.prod(w.shape) if isinstance(w, Weight) else table_size(w) for w in table.values())


def dense_parameters(model: ModelConfig) -> int:
    """All parameters of a dense model."""
    return table_size(outer_table(model)) + model.num_layers * table_size(block_table(model, None, stack=False))


@dataclass(frozen=True)
class Channels:
    """Feed-forward channels a layer of a mixture, padding left out: `permanent` shared ones, `own` of each expert."""

    experts: int  # E
    own: float
    permanent: float = 0.0
    top_k: int = 1
    tied: bool = False

    @property
    def active(self) -> float:
        """Channels that one token runs in a layer."""
        return self.permanent + self.top_k * self.own


def mixture_parameters(model: ModelConfig, channels: Channels) -> tuple[int, int]:
    """Parameters of a mixture in all, and those that one token runs, norms, embeddings and head among both.

    A tied mixture holds the dense model's.
    """
    whole = dense_parameters(model)
    channel = 3 * model.embed_dim * model.num_layers
    outside = whole - channel * model.ffn_dim
    total = whole if channels.tied else outside + channel * (channels.permanent + channels.experts * channels.own)
    return round(total), round(outside + channel * channels.active)


def mean_keys(length: int, window: int | None = None) -> float:
    """Keys that a token of a sequence of `length` attends to, on average, itself included."""
    if window is None or window >= length:
        return (length + 1) / 2
    return (window * (window + 1) / 2 + (length - window) * window) / length


def forward_flops(model: ModelConfig, channels: float, length: int, head: bool = True) -> float:
    """FLOPs a token of one forward pass that runs `channels` feed-forward channels a layer (F in a dense model)."""
    attention = model.embed_dim * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    parameters = model.num_layers * (attention + 3 * model.embed_dim * channels)
    keys = mean_keys(length, model.sliding_window)
    pairs = 4 * model.num_layers * model.num_heads * model.head_dim * keys
    return 2 * (parameters + head * model.vocab_size * model.embed_dim) + pairs


def router_forward_flops(router: RouterConfig, length: int) -> float:
    """FLOPs a token of the router's forward pass."""
    if router.kind == "layerwise":
        return 2 * table_size(router_table(router))
    heads = router.num_heads * router.head_dim
    matmuls = 4 * router.dim * heads + 2 * router.dim * router.mlp_dim + router.dim * router.num_experts
    keys = mean_keys(length) if router.kind == "pregating" else 0
    return 2 * matmuls + 4 * heads * keys
