"""Models of random bf16 weights on the device: Llama-2-7B's shape, dense or as seven experts that own their rows."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from readme_jax.checkpoints.hf import Dense
from readme_jax.checkpoints.known import shape_of
from readme_jax.checkpoints.mixture import Mixture
from readme_jax.config import MixtureConfig, ModelConfig, RouterConfig
from readme_jax.models.router import start_router
from readme_jax.serving.programs import Programs

SHAPE = shape_of("meta-llama/Llama-2-7b-hf")
TINY = replace(SHAPE, vocab_size=512, embed_dim=64, ffn_dim=128, num_heads=4, num_kv_heads=4, head_dim=16)
EXPERTS = 7
THREADS = 12  # programs compiled at once


def shape(layers: int, tiny: bool = False) -> ModelConfig:
    """Llama-2-7B's shape of so many layers; `tiny`: its outline, to try a script without a GPU."""
    return replace(TINY if tiny else SHAPE, num_layers=layers, max_position=16384)


def random_tree(config: ModelConfig, experts: int) -> dict[str, Any]:
    """Unrolled parameters on the device, bf16; `experts` 0 is the dense model."""
    keys = iter(jax.random.split(jax.random.key(0), 100_000))
    draw = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    d, heads, kv = config.embed_dim, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def matrix(*shape: int) -> jax.Array:
        return draw(next(keys), shape)

    def ffn(width: int) -> dict[str, jax.Array]:
        return {"gate": matrix(width, d), "up": matrix(width, d), "down": matrix(d, width)}

    tree: dict[str, Any] = {"embed": matrix(config.vocab_size, d), "lm_head": matrix(config.vocab_size, d)}
    tree["final_norm"] = jnp.ones(d, jnp.bfloat16)
    for i in range(config.num_layers):
        own = {f"experts_{e}": ffn(config.ffn_dim // 2) for e in range(experts)} or {"ffn": ffn(config.ffn_dim)}
        attention = {"q": matrix(heads, d), "k": matrix(kv, d), "v": matrix(kv, d), "o": matrix(d, heads)}
        norms = {"attn_norm": jnp.ones(d, jnp.bfloat16), "ffn_norm": jnp.ones(d, jnp.bfloat16)}
        tree[f"layers_{i}"] = own | attention | norms
    return tree


def model_of(config: ModelConfig, experts: int) -> Dense | Mixture:
    """A dense model, or a mixture with a router of Table 1."""
    params = random_tree(config, experts)
    if not experts:
        return Dense(config, params, None)
    router = RouterConfig(config.vocab_size, experts)
    started = start_router(jax.random.key(1), router, params["embed"].astype(jnp.float32))
    return Mixture(config, MixtureConfig(experts, config.ffn_dim // 2), params, {}, router, started)


def compile_side_by_side(programs: Programs, keys: Iterable[tuple[Any, ...]]) -> None:
    """Compile programs in threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda key: programs._program(*key), keys))
