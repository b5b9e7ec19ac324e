"""Tiny models for tests of generation, evaluation and the command line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tiny_shape import TINY

from readme_jax.checkpoints.hf import Dense
from readme_jax.checkpoints.mixture import Mixture
from readme_jax.checkpoints.tokenizer import Tokenizer
from readme_jax.config import ModelConfig, RouterConfig
from readme_jax.models.weights import Weight, block_table, outer_table, router_table
from readme_jax.refactor.slice import lay_out, slice_layer

# Files that take longest, which start first: a worker that got one at the end would finish alone (`make test` hands out
# whole files, in this order).
LONGEST = (
    "tuning/test_ablations.py",
    "parallel/test_sharding.py",
    "serving/test_engine_exact.py",
    "serving/test_programs.py",
    "serving/test_agreement.py",
    "parallel/test_two_processes.py",
    "tuning/test_runner.py",
    "serving/test_engine_life.py",
    "tuning/test_resume.py",
    "test_cli.py",
)
CACHE = {"jax_compilation_cache_dir": None, "jax_persistent_cache_min_compile_time_secs": 0.1}
TINY_EXPERTS = 3
# name -> (permanent part, tied, experts a token)
MIXTURES = {
    "top1": (True, False, 1),
    "top2": (True, False, 2),
    "tied": (True, True, 1),
    "own_rows": (False, False, 1),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Programs that several tests build alike are compiled once, by whichever worker needs one first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    before = {name: getattr(jax.config, name) for name in CACHE}
    for name, value in (CACHE | {"jax_compilation_cache_dir": str(folder)}).items():
        jax.config.update(name, value)
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)


def byte_tokenizer() -> Tokenizer:
    """UTF-8 bytes as ids 0 to 255, an end-of-text token, and a chat template."""
    alphabet = {char: i for i, char in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    return Tokenizer(backend, eos_ids=[backend.token_to_id("<|end|>")], chat_template=template)


def random_tree(table: Any, rng: np.random.Generator) -> Any:
    """Weights of a table, large enough that attention, experts and routes matter to the result."""
    if isinstance(table, Weight):
        return jnp.asarray(rng.normal(table.start == "ones", 0.3, table.shape), jnp.float32)
    return {name: random_tree(entry, rng) for name, entry in table.items()}


@pytest.fixture
def quickly_compiled() -> Iterator[None]:
    """Compile in half the time, to slower code: for tests of many small programs."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def build_tiny(
    kind: str, tokenizer: Tokenizer | None = None, experts: int = TINY_EXPERTS, config: ModelConfig = TINY
) -> Dense | Mixture:
    """A random model of a kind: `dense`, or one of MIXTURES, sliced from that dense model by random masks."""
    rng = np.random.default_rng(0)
    layers = {f"layers_{i}": block_table(config, None, stack=False) for i in range(config.num_layers)}
    params = random_tree({**outer_table(config), **layers}, rng)
    if kind == "dense":
        return Dense(config, params, tokenizer)
    permanent, tied, top_k = MIXTURES[kind]
    scores = rng.random((config.num_layers, experts, config.ffn_dim)) + 0.4 * rng.random((config.ffn_dim,))
    masks = np.argsort(np.argsort(-scores, axis=-1), axis=-1) < config.ffn_dim // 2
    mixture, channels = lay_out(masks, permanent, tied, top_k, align=1)
    cut = {k: slice_layer(v, channels[k], mixture) if k in channels else v for k, v in params.items()}
    shape = RouterConfig(config.vocab_size, experts, dim=16, num_heads=2, head_dim=8, mlp_dim=16)
    router = random_tree(router_table(shape), rng)
    about = {"facts": {"experts": [f"domain_{e}" for e in range(experts)]}}
    return Mixture(config, mixture, cut, channels, shape, router, tokenizer, about)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Dense | Mixture]:
    """See `build_tiny`."""
    return build_tiny


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    return byte_tokenizer()
