"""What the feed-forward channels of a dense model do on a domain's text, streamed: no activation of theirs is kept.

# B batch, T length, D model width, F dense FFN width, L layers
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


@partial(jax.jit, static_argnames=("config", "runtime"), donate_argnums=(0, 2))
def _accumulate(
    sums: jax.Array, p: Params, x: jax.Array, config: ModelConfig, runtime: Runtime
) -> tuple[jax.Array, jax.Array]:
    """Add a layer's sum |a| and sum a^2 over residual streams x [B, T, D] to sums [2, F]; the streams after it."""
    p = cast(p, runtime)
    x, _ = attend(p, config, runtime, x, prepare(config, jnp.zeros(x.shape[:2], jnp.int32)))
    a = activations(p["ffn"], rms_norm(x, p["ffn_norm"], config.norm_eps))
    wide = a.astype(jnp.float32)
    return sums + jnp.stack([jnp.abs(wide).sum((0, 1)), (wide * wide).sum((0, 1))]), x + linear(a, p["ffn"]["down"])


@partial(jax.jit, static_argnames=("runtime",))
def _embedded(embed: jax.Array, tokens: jax.Array, runtime: Runtime) -> jax.Array:
    return embed_tokens(embed.astype(runtime.dtype), tokens)


def residual_streams(params: Params, runtime: Runtime, tokens: np.ndarray, batch: int) -> list[jax.Array]:
    """Tokens [n, T] before the first layer: [B, T, D] of each batch of `batch` rows; the last may have fewer."""
    embed = params["embed"]
    return [_embedded(embed, tokens[i : i + batch], runtime) for i in range(0, len(tokens), batch)]


def channel_statistics(
    params: Params, config: ModelConfig, runtime: Runtime, tokens: np.ndarray, batch: int, tick: Tick = lambda n: None
) -> ChannelStatistics:
    """Statistics of one domain over calibration tokens [n, T], `batch` rows at a time. Runs under a mesh.

    Layer by layer, each asked for once; residual streams wait at its door (n * T * D values).
    """
    streams, sums = residual_streams(params, runtime, tokens, batch), []
    for layer in range(config.num_layers):
        p, found = params[f"layers_{layer}"], jnp.zeros((2, config.ffn_dim), jnp.float32)
        for i, x in enumerate(streams):
            found, streams[i] = _accumulate(found, p, x, config, runtime)
            tick(x.shape[0] * x.shape[1] // config.num_layers)
        sums.append(np.asarray(found))
    absolute, square = np.stack(sums, axis=1) / tokens.size
    return ChannelStatistics(absolute, np.sqrt(square))
