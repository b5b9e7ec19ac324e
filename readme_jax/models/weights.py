"""One declaration a weight: its shape, logical axes and initialiser; init, abstract shapes and shardings derive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from readme_jax.config import MixtureConfig, ModelConfig, RouterConfig


@dataclass(frozen=True)
class Weight:
    """A parameter [out, in] (or a vector), its logical axes, and how it starts."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    start: Literal["normal", "ones", "zeros"] = "normal"

    def init(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if self.start == "ones":
            return jnp.ones(shape, jnp.float32)
        if self.start == "zeros":
            return jnp.zeros(shape, jnp.float32)
        return 0.02 * jax.random.normal(key, shape, jnp.float32)


Table = Mapping[str, Union[Weight, "Table"]]


class Weights(nn.Module):
    """Declares a (nested) table of weights and returns them as a dict of arrays."""

    table: Table

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, entry in self.table.items():
            if isinstance(entry, Weight):
                init = nn.with_logical_partitioning(entry.init, entry.axes)
                values[name] = self.param(name, init, entry.shape)
            else:
                values[name] = Weights(entry, name=name)()
        return values


def feed_forward_table(embed: int, width: int) -> Table:
    """gate and up [F, D], down [D, F] of a SwiGLU feed-forward layer."""
    return {
        "gate": Weight((width, embed), ("ffn", "embed")),
        "up": Weight((width, embed), ("ffn", "embed")),
        "down": Weight((embed, width), ("embed", "ffn")),
    }


def stacked(table: Table, size: int, axis: str) -> Table:
    """The table with a leading axis on every weight."""
    return {
        name: Weight((size, *w.shape), (axis, *w.axes), w.start) if isinstance(w, Weight) else stacked(w, size, axis)
        for name, w in table.items()
    }


def block_table(config: ModelConfig, mixture: MixtureConfig | None, stack: bool) -> Table:
    """Weights of one transformer block; `stack` gives experts a leading expert axis instead of an entry each."""
    d, heads, kv = config.embed_dim, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    table: dict[str, Any] = {
        "attn_norm": Weight((d,), ("embed",), "ones"),
        "q": Weight((heads, d), ("heads", "embed")),
        "k": Weight((kv, d), ("kv_heads", "embed")),
        "v": Weight((kv, d), ("kv_heads", "embed")),
        "o": Weight((d, heads), ("embed", "heads")),
        "ffn_norm": Weight((d,), ("embed",), "ones"),
    }
    if mixture is None or mixture.tied:
        return table | {"ffn": feed_forward_table(d, config.ffn_dim)}
    if mixture.permanent:
        table["permanent"] = feed_forward_table(d, mixture.permanent)
    expert = feed_forward_table(d, mixture.expert)
    if stack:
        return table | {"experts": stacked(expert, mixture.num_experts, "expert")}
    return table | {f"experts_{e}": expert for e in range(mixture.num_experts)}


def outer_table(config: ModelConfig) -> dict[str, Weight]:
    """Weights outside the blocks."""
    vocab = Weight((config.vocab_size, config.embed_dim), ("vocab", "embed"))
    table: dict[str, Weight] = {"embed": vocab, "final_norm": Weight((config.embed_dim,), ("embed",), "ones")}
    return table if config.tie_embeddings else table | {"lm_head": vocab}


def router_table(config: RouterConfig) -> Table:
    """Weights of the router (Table 1): biases on q, k, v, o, both MLP layers and the head.

    Of kind `layerwise`: one gate [E, D] a layer, without bias.
    """
    if config.kind == "layerwise":
        return {"gates": Weight((config.num_layers, config.num_experts, config.dim), ("layers", None, "embed"))}
    r, heads = config.dim, config.num_heads * config.head_dim

    def linear(rows: int, columns: int, out: str | None, inner: str | None) -> Table:
        return {"w": Weight((rows, columns), (out, inner)), "b": Weight((rows,), (out,), "zeros")}

    return {
        "embed": Weight((config.vocab_size, r), ("vocab", "embed")),
        "attn_norm": Weight((r,), ("embed",), "ones"),
        "q": linear(heads, r, "heads", "embed"),
        "k": linear(heads, r, "heads", "embed"),
        "v": linear(heads, r, "heads", "embed"),
        "o": linear(r, heads, "embed", "heads"),
        "mlp_norm": Weight((r,), ("embed",), "ones"),
        "up": linear(config.mlp_dim, r, "ffn", "embed"),
        "down": linear(r, config.mlp_dim, "embed", "ffn"),
        "final_norm": Weight((r,), ("embed",), "ones"),
        "head": linear(config.num_experts, r, None, "embed"),
    }


def frozen(table: Table) -> Table:
    """The table as a hashable mapping, which Linen wants for a module's attribute."""
    return FrozenDict(table)
