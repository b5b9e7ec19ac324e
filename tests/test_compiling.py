"""What the persistent compilation cache keeps."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from readme_jax.compiling import QUICK, kept_if_loaded_quickly


@pytest.fixture
def kept(tmp_path: Path):
    """The folder of a cache that keeps everything."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
    compilation_cache.reset_cache()


@pytest.mark.parametrize(("layers", "there"), [(QUICK, True), (QUICK + 1, False)])
def test_a_long_training_step_is_not_kept(kept: Path, layers: int, there: bool) -> None:
    with kept_if_loaded_quickly(layers):
        jax.jit(lambda x: x * 2 + layers).lower(jnp.ones(3)).compile()
    assert any(kept.glob("*-cache")) == there


def test_what_follows_is_kept_again_and_after_an_error_too(kept: Path) -> None:
    with pytest.raises(ZeroDivisionError), kept_if_loaded_quickly(QUICK + 1):
        1 / 0  # noqa: B018
    jax.jit(lambda x: x * 3 - 1).lower(jnp.ones(3)).compile()
    assert any(kept.glob("*-cache"))
