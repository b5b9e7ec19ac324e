"""What the feed-forward channels of a dense model do on a domain's text, streamed: no activation is kept.

# B batch, T length, D model width, F dense FFN width, L layers
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax.config import ModelConfig
from readme_jax.models.feed_forward import activations, linear
from readme_jax.models.llama import attend, embed_tokens, prepare, rms_norm
from readme_jax.models.runtime import Runtime

Params = Mapping[str, Any]
Tick = Callable[[int], None]  # told of tokens done


class ChannelStatistics(NamedTuple):
    """Per layer and channel, of a = silu(x W_gate) * (x W_up): mean |a| (Eq. 3) and root mean square, [L, F]."""

    mean_abs: np.ndarray
    rms: np.ndarray


def cast(p: Params, runtime: Runtime) -> Any:
    """A layer's parameters in the compute dtype."""
    return jax.tree.map(lambda w: w.astype(runtime.dtype), dict(p))


@partial(jax.jit, static_argnames=("config", "runtime"), donate_argnums=(0,))
def _accumulate(sums: jax.Array, params: Params, tokens: jax.Array, config: ModelConfig, runtime: Runtime) -> jax.Array:
    """Add sum |a| and sum a^2 of tokens [B, T] to sums [2, L, F], one dense forward without logits."""
    ctx = prepare(config, tokens)
    x = embed_tokens(params["embed"].astype(runtime.dtype), tokens)
    added = []
    for i in range(config.num_layers):
        p = cast(params[f"layers_{i}"], runtime)
        x, _ = attend(p, config, runtime, x, ctx)
        a = activations(p["ffn"], rms_norm(x, p["ffn_norm"], config.norm_eps))
        wide = a.astype(jnp.float32)
        added.append(jnp.stack([jnp.abs(wide).sum((0, 1)), (wide * wide).sum((0, 1))]))
        x = x + linear(a, p["ffn"]["down"])
    return sums + jnp.stack(added, axis=1)


def batches(tokens: np.ndarray, size: int) -> Iterable[np.ndarray]:
    """Rows of tokens [n, T] in batches of `size`; the last may be smaller."""
    return (tokens[i : i + size] for i in range(0, len(tokens), size))


def channel_statistics(
    params: Params, config: ModelConfig, runtime: Runtime, tokens: np.ndarray, batch: int, tick: Tick = lambda n: None
) -> ChannelStatistics:
    """Statistics of one domain over calibration tokens [n, T], `batch` rows at a time. Runs under a mesh."""
    sums = jnp.zeros((2, config.num_layers, config.ffn_dim), jnp.float32)
    for rows in batches(tokens, batch):
        sums = _accumulate(sums, params, rows, config, runtime)
        tick(rows.size)
    absolute, square = np.asarray(sums) / tokens.size
    return ChannelStatistics(absolute, np.sqrt(square))
