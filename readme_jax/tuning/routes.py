"""Routes behind one interface: the trained router, and untrained baselines to compare it with.

A `Routes` is a pytree that maps tokens [B, T] and the domain of each row [B] to experts [B, T, K] int32, best first,
and their weights [B, T, K], which sum to 1. It can be passed to a jitted step like any other argument.

# B batch, T length, E experts, K experts a token, V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax.config import RouterConfig
from readme_jax.models.layerwise import with_gates
from readme_jax.models.router import Router, choose

Choice = tuple[jax.Array, jax.Array]


class Routes(Protocol):
    """Tokens [B, T] and domains [B] (None where unknown) -> experts [B, T, K] int32 and weights [B, T, K]."""

    def __call__(self, tokens: jax.Array, domain: jax.Array | None = None) -> Choice: ...


def _static(**kwargs: Any) -> Any:
    return field(metadata={"static": True}, **kwargs)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouterRoutes:
    """The trained router's own routes. Needs a mesh."""

    params: Mapping[str, Any]
    config: RouterConfig = _static()
    top_k: int = _static(default=1)

    def __call__(self, tokens: jax.Array, domain: jax.Array | None = None) -> Choice:
        logits, _ = Router(self.config).apply({"params": self.params}, tokens)
        return choose(logits, self.top_k)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerwiseRoutes:
    """Routes that each layer finds for itself, by gates [L, E, D] on its input: none are known before it runs."""

    gates: jax.Array
    config: RouterConfig = _static()
    top_k: int = _static(default=1)

    def __call__(self, tokens: jax.Array, domain: jax.Array | None = None) -> Choice:
        raise ValueError("a layerwise router has no routes before the backbone runs: use `gated`")


def routes_of(router: Mapping[str, Any], config: RouterConfig, top_k: int = 1) -> RouterRoutes | LayerwiseRoutes:
    """The routes of a trained router, of whichever kind it is."""
    if config.kind == "layerwise":
        return LayerwiseRoutes(router["gates"], config, top_k)
    return RouterRoutes(router, config, top_k)


def gated(channels: Any, routes: Any) -> Any:
    """A mixture's channels, with the gates of routes that are found layer by layer beside them."""
    return with_gates(channels, routes.gates) if isinstance(routes, LayerwiseRoutes) else channels


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DomainRoutes:
    """Every token to the expert of its text's own domain, which serving does not know. A second expert weighs 0."""

    num_experts: int = _static()
    top_k: int = _static(default=1)

    def __call__(self, tokens: jax.Array, domain: jax.Array | None = None) -> Choice:
        if domain is None:
            raise ValueError("routing by domain needs the domain of each row")
        logits = jnp.where(jax.nn.one_hot(domain, self.num_experts, dtype=bool), 0.0, -1e9)
        return choose(jnp.broadcast_to(logits[:, None], (*tokens.shape, self.num_experts)), self.top_k)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CommonRoutes:
    """Every token to the experts used most, given how often each was used [E]."""

    counts: jax.Array
    top_k: int = _static(default=1)

    def __call__(self, tokens: jax.Array, domain: jax.Array | None = None) -> Choice:
        logits = jnp.log(jnp.maximum(self.counts.astype(jnp.float32), 1e-9))
        return choose(jnp.broadcast_to(logits, (*tokens.shape, self.counts.shape[0])), self.top_k)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RandomRoutes:
    """Experts drawn evenly, weighted alike: a function of the seed, the position and the token id alone."""

    seed: jax.Array | int
    num_experts: int = _static()
    top_k: int = _static(default=1)

    def __call__(self, tokens: jax.Array, domain: jax.Array | None = None) -> Choice:
        key = jax.random.key(self.seed)

        def draw(position: jax.Array, token: jax.Array) -> jax.Array:
            return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, position), token), (self.num_experts,))

        each = jax.vmap(jax.vmap(draw), in_axes=(None, 0))(jnp.arange(tokens.shape[1]), tokens)
        experts, _ = choose(each, self.top_k)
        return experts, jnp.full(experts.shape, 1 / self.top_k, jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TableRoutes:
    """The expert whose channels a token id and those before it overlapped most on calibration text.

    `table` [V, E] is the mean overlap by token id; its rows are averaged over the context by s_t = decay * s_t-1 +
    (1 - decay) * table[token t].
    """

    table: jax.Array
    decay: float = _static(default=0.9)
    top_k: int = _static(default=1)

    def __call__(self, tokens: jax.Array, domain: jax.Array | None = None) -> Choice:
        rows = (1 - self.decay) * jnp.swapaxes(self.table[tokens], 0, 1)

        def blend(state: jax.Array, row: jax.Array) -> Choice:
            state = self.decay * state + row
            return state, state

        _, smoothed = jax.lax.scan(blend, jnp.zeros_like(rows[0]), rows)
        return choose(jnp.swapaxes(smoothed, 0, 1), self.top_k)


class OverlapTable:
    """Mean overlap scores by token id, accumulated over calibration text."""

    def __init__(self, vocab_size: int, num_experts: int) -> None:
        self.sums = np.zeros((vocab_size, num_experts), np.float64)
        self.counts = np.zeros(vocab_size, np.int64)

    def add(self, tokens: np.ndarray, scores: np.ndarray) -> None:
        """Add tokens [B, T] with their scores [L, B, T, E] (`distill.overlap_scores`), summed over layers."""
        flat = np.asarray(tokens).reshape(-1)
        np.add.at(self.sums, flat, np.asarray(scores, np.float64).sum(0).reshape(len(flat), -1))
        np.add.at(self.counts, flat, 1)

    def mean(self) -> np.ndarray:
        """Table [V, E] float32; token ids never seen have the mean of all tokens. Raises ValueError when empty."""
        if not self.counts.sum():
            raise ValueError("no calibration tokens were added to the overlap table")
        overall = self.sums.sum(0) / self.counts.sum()
        means = self.sums / np.maximum(self.counts, 1)[:, None]
        return np.where(self.counts[:, None] > 0, means, overall).astype(np.float32)
