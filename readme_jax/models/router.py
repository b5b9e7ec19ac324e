"""The router: a model of its own that reads token ids alone, so every route is known before the backbone runs.

Table 1: one pre-norm causal transformer block with residuals and biases, a final norm and a linear layer to E experts.
Of kind `tokenwise` (how the released code decodes) the block attends to the token itself alone: no context.

# B batch, T length, R router width, E experts, K experts a token
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from readme_jax.config import ModelConfig, RouterConfig
from readme_jax.models import attention
from readme_jax.models.choice import choose as choose  # what a router's logits are for
from readme_jax.models.llama import embed_tokens, rms_norm
from readme_jax.models.weights import Weight, Weights, frozen, router_table
from readme_jax.parallel.mesh import constrain


def _affine(x: jax.Array, p: Mapping[str, jax.Array]) -> jax.Array:
    return jnp.einsum("...i,oi->...o", x, p["w"]) + p["b"]


class Router(nn.Module):
    """Logits over experts for every token."""

    config: RouterConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: jax.Array, valid: jax.Array | None = None, cache: attention.Cache | None = None
    ) -> tuple[jax.Array, attention.Cache | None]:
        """Tokens [B, T] -> float32 logits [B, T, E], and the extended cache if one is given.

        `valid` [B, T] marks tokens that are not padding, on either side.
        """
        p: dict[str, Any] = {}
        for name, w in router_table(self.config).items():
            if isinstance(w, Weight):
                p[name] = self.param(name, nn.with_logical_partitioning(w.init, w.axes), w.shape)
            else:
                p[name] = Weights(frozen(w), name=name)()
        p = jax.tree.map(lambda x: x.astype(self.dtype), p)
        return route_logits(p, self.config, tokens, valid, cache)


def route_logits(
    p: Mapping[str, Any],
    config: RouterConfig,
    tokens: jax.Array,
    valid: jax.Array | None,
    cache: attention.Cache | None,
) -> tuple[jax.Array, attention.Cache | None]:
    """The router's forward pass on parameters p: see `Router.__call__`."""
    rotary, positions, cache = attention.place_tokens(tokens, valid, cache)
    freqs = attention.rotary_frequencies(config.head_dim, config.rope_theta, None)
    x = embed_tokens(p["embed"], tokens)
    y = rms_norm(x, p["attn_norm"], config.norm_eps)
    q, k, v = (rearrange(_affine(y, p[n]), "b t (h d) -> b t h d", d=config.head_dim) for n in "qkv")
    q, k = (attention.rotate(z, rotary, freqs) for z in (q, k))
    if cache is None and config.kind == "tokenwise":
        out = v
    elif cache is None:
        out = attention.causal_attention(q, k, v, positions, divisor=config.logit_divisor)
    else:
        assert positions is not None
        keys, values = attention.write_cache(cache, 0, k, v)
        if config.kind == "tokenwise":
            out = v
        else:
            out = attention.cached_attention(q, keys, values, positions, cache.slots, divisor=config.logit_divisor)
        cache = attention.advance(cache, positions, (keys,), (values,))
    x = x + _affine(rearrange(out, "b t h d -> b t (h d)"), p["o"])
    y = rms_norm(x, p["mlp_norm"], config.norm_eps)
    x = x + _affine(jax.nn.silu(_affine(y, p["up"])), p["down"])
    logits = _affine(rms_norm(x, p["final_norm"], config.norm_eps), p["head"])
    return constrain(logits.astype(jnp.float32), "batch", "length", None), cache


def router_cache(config: RouterConfig, batch: int, slots: int, dtype: Any = jnp.float32) -> attention.Cache:
    """An empty cache for `slots` tokens a row."""
    return attention.empty_cache(1, batch, config.num_heads, config.head_dim, slots, dtype)


def start_router(key: jax.Array, config: RouterConfig, backbone_embed: jax.Array) -> dict[str, Any]:
    """A random router whose embedding starts as the first R columns of the backbone's [V, D] (all of them if D < R).

    Gates of layers (`layerwise`) start random alone.
    """
    if config.kind == "layerwise":
        return {name: w.init(key, w.shape) for name, w in router_table(config).items() if isinstance(w, Weight)}
    start = jax.jit(lambda key: nn.unbox(Router(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]))
    params = start(key)  # jitted: one row does not divide over a mesh of many devices, and is never computed
    columns = min(config.dim, backbone_embed.shape[1])
    return params | {"embed": params["embed"].at[:, :columns].set(backbone_embed[:, :columns])}


def config_for(router: Any, backbone: ModelConfig, num_experts: int) -> RouterConfig:
    """The router of a run's settings (`config.Router`) for a backbone: its vocabulary and RoPE base, or its layers."""
    layerwise = router.kind == "layerwise"
    return RouterConfig(
        vocab_size=backbone.vocab_size,
        num_experts=num_experts,
        kind=router.kind,
        num_layers=backbone.num_layers if layerwise else 1,
        dim=backbone.embed_dim if layerwise else router.dim,
        num_heads=router.num_heads,
        head_dim=router.head_dim,
        mlp_dim=router.mlp_dim,
        rope_theta=backbone.rope_theta,
        logit_divisor=router.logit_divisor,
    )
