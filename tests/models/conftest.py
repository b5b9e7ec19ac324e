"""One device is a mesh of one: every model test runs under it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from readme_jax import config
from readme_jax.config import MixtureConfig, ModelConfig
from readme_jax.models.weights import Weight, block_table, outer_table
from readme_jax.parallel.mesh import make_mesh


@pytest.fixture(autouse=True)
def one_device_mesh() -> Iterator[jax.sharding.Mesh]:
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture
def quick_compile() -> Iterator[None]:
    """Compile in half the time, to slower code: for tests of many small programs."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    """Two layers, grouped-query attention, untied embeddings."""
    return ModelConfig(vocab_size=61, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=24)


@pytest.fixture(scope="session")
def random_params() -> Callable[..., dict[str, Any]]:
    """Unrolled parameters of a config, scaled up so that attention and experts matter to the result."""

    def build(model: ModelConfig, mixture: MixtureConfig | None = None, seed: int = 0) -> dict[str, Any]:
        tables = {f"layers_{i}": block_table(model, mixture, stack=False) for i in range(model.num_layers)}
        rng = np.random.default_rng(seed)

        def fill(table: Any) -> Any:
            if not isinstance(table, Weight):
                return {name: fill(entry) for name, entry in table.items()}
            mean = 1.0 if table.start == "ones" else 0.0
            return jnp.asarray(rng.normal(mean, 0.25, table.shape), jnp.float32)

        return fill(dict(outer_table(model)) | tables)

    return build
