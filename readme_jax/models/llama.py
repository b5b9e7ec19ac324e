"""The backbone: Llama and Mistral, dense or with its feed-forward layers sliced into experts.

Linen modules declare weights and hand them to the plain functions below, which calibration and refit call too.

# B batch, T length, D model width, H heads, K kv heads, h head width, F expert or dense FFN width, V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from readme_jax.config import MixtureConfig, ModelConfig
from readme_jax.models import attention
from readme_jax.models.experts import mixture_feed_forward
from readme_jax.models.feed_forward import feed_forward, linear
from readme_jax.models.layerwise import layer_plan
from readme_jax.models.remat import kept, remat
from readme_jax.models.runtime import Runtime
from readme_jax.models.segments import RoutePlan
from readme_jax.models.weights import Weights, block_table, frozen, outer_table
from readme_jax.parallel.mesh import constrain

Params = Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What every block of one forward pass shares. `positions` is None for whole sequences without padding."""

    freqs: jax.Array
    rotary: jax.Array  # [B, T] positions for rotary embeddings
    positions: jax.Array | None = None  # [B, T], -1 at padding
    plan: RoutePlan | None = None
    cache: attention.Cache | None = None


def embed_tokens(embed: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of an embedding [V, D] for tokens [B, T]: [B, T, D].

    Under a mesh the rows are gathered whole first, so that each device looks its own tokens up: of a table cut along
    D, XLA would spread the result over D and then replicate it to turn it over to the batch.
    """
    return constrain(constrain(embed, "vocab", None)[tokens], "batch", "length", None)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis, computed in float32."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def attend(
    p: Params, config: ModelConfig, runtime: Runtime, x: jax.Array, ctx: Context, layer: int = 0
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """x plus self-attention of its norm, x [B, T, D]; with a cache also the layer's keys and values."""
    y = rms_norm(x, p["attn_norm"], config.norm_eps)
    q, k, v = (rearrange(linear(y, p[n]), "b t (h d) -> b t h d", d=config.head_dim) for n in "qkv")
    q, k = (attention.rotate(z, ctx.rotary, ctx.freqs) for z in (q, k))
    q, k, v = (
        kept(constrain(z, "batch", "length", n, "head_dim"))
        for z, n in zip((q, k, v), ("heads", "kv_heads", "kv_heads"), strict=True)
    )
    written = None
    if ctx.cache is None:
        out = attention.causal_attention(q, k, v, ctx.positions, config.sliding_window, backend=runtime.attention)
    else:
        assert ctx.positions is not None
        written = attention.write_cache(ctx.cache, layer, k, v)
        out = attention.cached_attention(q, *written, ctx.positions, ctx.cache.slots, config.sliding_window)
    return x + kept(linear(rearrange(out, "b t h d -> b t (h d)"), p["o"])), written


def run_block(
    p: Params,
    channels: Params | None,
    config: ModelConfig,
    mixture: MixtureConfig | None,
    runtime: Runtime,
    x: jax.Array,
    ctx: Context,
    layer: int = 0,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """One transformer block, x [B, T, D] -> [B, T, D]."""
    p = jax.tree.map(lambda w: w.astype(runtime.dtype), dict(p))
    with jax.named_scope("attention"):
        x, written = attend(p, config, runtime, x, ctx, layer)
    y = rms_norm(x, p["ffn_norm"], config.norm_eps)
    with jax.named_scope("feed_forward"):
        if mixture is None:
            y = feed_forward(p["ffn"], y)
        else:
            plan = layer_plan(channels, mixture, y) if ctx.plan is None else ctx.plan
            y = mixture_feed_forward(p, channels, mixture, runtime, y, plan)
    return constrain(x + y, "batch", "length", None), written


class Block(nn.Module):
    """Declares one block's weights; `channels` are the layer's slices (tied mixtures gather rows by them)."""

    config: ModelConfig
    mixture: MixtureConfig | None
    runtime: Runtime
    layer: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, channels: Params | None, ctx: Context) -> tuple[jax.Array, Any]:
        table = block_table(self.config, self.mixture, stack=self.runtime.layout == "scanned")
        p = {
            name: self.param(name, nn.with_logical_partitioning(w.init, w.axes), w.shape)
            if not isinstance(w, Mapping)
            else Weights(frozen(w), name=name)()
            for name, w in table.items()
        }
        return run_block(p, channels, self.config, self.mixture, self.runtime, x, ctx, self.layer)


class Llama(nn.Module):
    """Llama or Mistral. Without `mixture` it is dense; with it, every call needs a `plan` of routes."""

    config: ModelConfig
    mixture: MixtureConfig | None = None
    runtime: Runtime = Runtime()

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        plan: RoutePlan | None = None,
        channels: Params | None = None,
        valid: jax.Array | None = None,
        cache: attention.Cache | None = None,
    ) -> tuple[jax.Array, attention.Cache | None]:
        """Final hidden states of tokens [B, T]: [B, T, D] after the last norm, and the extended cache if one is given.

        `valid` [B, T] marks tokens that are not padding. Use `head_weight` and `linear` for logits. The cache works in
        the unrolled layout.
        """
        config, runtime = self.config, self.runtime
        outer: dict[str, Any] = {
            name: self.param(name, nn.with_logical_partitioning(w.init, w.axes), w.shape)
            for name, w in outer_table(config).items()
        }
        ctx = prepare(config, tokens, plan, valid, cache)
        x = embed_tokens(outer["embed"].astype(runtime.dtype), tokens)
        if runtime.layout == "scanned":
            x, cache = self._scanned(x, channels, ctx), None
        else:
            x, cache = self._unrolled(x, channels, ctx)
        return rms_norm(x, outer["final_norm"], config.norm_eps), cache

    def _scanned(self, x: jax.Array, channels: Params | None, ctx: Context) -> jax.Array:
        if ctx.cache is not None:
            raise ValueError("generation uses the unrolled layout: convert with models.layout.unroll")
        block = remat(Block, self.runtime.remat, scanned=True)
        scan = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=self.config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        per_layer = None if channels is None else channels["layers"]
        return scan(self.config, self.mixture, self.runtime, name="layers")(x, per_layer, ctx)[0]

    def _unrolled(self, x: jax.Array, channels: Params | None, ctx: Context) -> tuple[jax.Array, Any]:
        block = remat(Block, self.runtime.remat, scanned=False)
        written = []
        for i in range(self.config.num_layers):
            per_layer = None if channels is None else channels[f"layers_{i}"]
            module = block(self.config, self.mixture, self.runtime, i, name=f"layers_{i}")
            x, kv = module(x, per_layer, ctx)
            written.append(kv)
        if ctx.cache is None or ctx.positions is None:
            return x, None
        keys, values = zip(*written, strict=True)
        return x, attention.advance(ctx.cache, ctx.positions, keys, values)


def prepare(
    config: ModelConfig,
    tokens: jax.Array,
    plan: RoutePlan | None = None,
    valid: jax.Array | None = None,
    cache: attention.Cache | None = None,
) -> Context:
    """What the blocks of one forward pass over tokens [B, T] share."""
    freqs = attention.rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    rotary, positions, cache = attention.place_tokens(tokens, valid, cache)
    return Context(freqs, rotary, positions, plan, cache)


def head_weight(params: Params) -> jax.Array:
    """The output projection [V, D]: the embedding where they are tied."""
    return params["lm_head"] if "lm_head" in params else params["embed"]
