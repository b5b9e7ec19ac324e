"""A tiny dense model and mixtures cut from it, under a mesh of one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from readme_jax import config
from readme_jax.config import MixtureConfig
from readme_jax.models.router import start_router
from readme_jax.parallel.mesh import make_mesh

sys.path.insert(0, str(Path(__file__).parent))

from tiny_run import ROUTER, cut_at_random, dense_params  # noqa: E402


class Cut(NamedTuple):
    mixture: MixtureConfig
    params: dict[str, Any]
    channels: dict[str, Any]


@pytest.fixture(autouse=True)
def mesh() -> Iterator[jax.sharding.Mesh]:
    one = make_mesh(config.Mesh(), jax.devices()[:1])
    with jax.set_mesh(one):
        yield one


@pytest.fixture(scope="session")
def dense() -> dict[str, Any]:
    """Unrolled parameters, scaled up so that attention and experts matter to the result."""
    return dense_params()


@pytest.fixture(scope="session")
def cut(dense: dict[str, Any]) -> Callable[..., Cut]:
    """A mixture of half-width experts with random channels: see `cut_at_random`."""
    return lambda *args, **kwargs: Cut(*cut_at_random(dense, *args, **kwargs))


@pytest.fixture(scope="session")
def router() -> dict[str, Any]:
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        return start_router(jax.random.key(2), ROUTER, jnp.zeros((256, 16)))


@pytest.fixture(scope="session")
def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {"tokens": rng.integers(0, 256, (4, 12), np.int32), "domain": np.array([0, 1, 2, 1], np.int32)}
