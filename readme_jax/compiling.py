"""Which compiled programs JAX keeps on disk for the next start (its persistent compilation cache)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax

LEAST = "jax_persistent_cache_min_compile_time_secs"
QUICK = 8  # layers


@contextmanager
def kept_if_loaded_quickly(layers: int) -> Iterator[None]:
    """Around compiling a training step of so many layers one after another (of a scan: 1).

    XLA on CPU (jax 0.10.2) loads a kept program in a time that grows with the cube of its length: SmolLM2's 30 layers
    compile in 65 s and load in 246 s, into 0.6 GB more; 16 layers in 22 and 41 s, 8 in 10 and 6 s.
    """
    before = getattr(jax.config, LEAST)
    if jax.default_backend() == "cpu" and layers > QUICK:
        jax.config.update(LEAST, float("inf"))
    try:
        yield
    finally:
        jax.config.update(LEAST, before)
