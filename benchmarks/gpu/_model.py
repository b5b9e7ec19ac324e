"""Models of random bf16 weights on the device: Llama-2-7B's shape, dense or as seven experts that own their rows.

A model of random weights has no routes worth the name. `scripted` gives it real ones: the token i is followed by i + 1
and routed to the i-th expert of a stream of real routes, so that a request is a place in the stream. For that the
embedding is large against what layers add, the head's row i + 1 is the embedding of i, and the router reads its token
alone. All the arithmetic stays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax.checkpoints.hf import Dense
from readme_jax.checkpoints.known import shape_of
from readme_jax.checkpoints.mixture import Mixture
from readme_jax.config import MixtureConfig, ModelConfig, RouterConfig
from readme_jax.models.router import start_router
from readme_jax.serving.buckets import Limits
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


def script(streams: Mapping[str, np.ndarray], vocabulary: int, seed: int = 0) -> np.ndarray:
    """[vocabulary] experts: a part of each domain's stream in turn, equally long."""
    rng, parts = np.random.default_rng(seed), np.array_split(np.arange(vocabulary), len(streams))
    starts = [
        int(rng.integers(len(streams[name]) - len(part))) for name, part in zip(sorted(streams), parts, strict=True)
    ]
    return np.concatenate(
        [streams[n][s : s + len(p)] for n, s, p in zip(sorted(streams), starts, parts, strict=True)]
    ).astype(np.int32)


def marks(experts: np.ndarray, dim: int) -> jax.Array:
    """[N, dim] router embeddings of tokens that it sends to `experts` [N]."""
    return jnp.eye(EXPERTS, dim)[experts]


def scripted(model: Mixture, experts: np.ndarray) -> Mixture:
    """The mixture with tokens that follow each other, routed to `experts` [V]."""
    assert model.router is not None
    params, router = dict(model.params), jax.tree.map(lambda x: x, dict(model.router))
    params["embed"] = 2500 * params["embed"]  # standard deviation 50
    params["lm_head"] = jnp.roll(params["embed"], 1, axis=0) / 2500
    for name in ("o", "down"):  # the token's own embedding passes both residuals unchanged
        router[name] = jax.tree.map(jnp.zeros_like, router[name])
    dim = model.router_config.dim  # type: ignore[union-attr]
    router["embed"] = marks(experts, dim)
    router["head"] = {"w": marks(np.arange(EXPERTS), dim), "b": jnp.zeros(EXPERTS)}
    router["final_norm"] = jnp.ones_like(router["final_norm"])
    return replace(model, params=params, router=router)


def with_limits(base: Programs, limits: Limits) -> Programs:
    """Programs of other limits over the same weights."""
    own = copy.copy(base)
    own.limits, own._programs, own._small = limits, {}, {}
    own.shape = own.shape._replace(length=limits.length)
    own._own = own._own._replace(length=limits.length)
    return own


def compile_all(calls: Iterable[tuple[Programs, tuple[Any, ...]]]) -> None:
    """Compile programs by their keys (name, sizes), in threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda call: call[0].program(*call[1]), calls))


def compile_side_by_side(programs: Programs, wanted: Callable[[tuple[Any, ...]], bool]) -> None:
    """Compile the programs whose key (name, sizes) is wanted."""
    compile_all((programs, key) for key in programs._all() if wanted(key))
