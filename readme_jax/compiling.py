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

    XLA on CPU (jax 0.10.2) loads a kept program in a time that grows faster than its length, compiling does not: at
    4, 8 and 16 of SmolLM2's layers loading takes 0.26, 0.68 and 1.85 of compiling (`benchmarks/compile_cache.py`).
    """
    before = getattr(jax.config, LEAST)
    if jax.default_backend() == "cpu" and layers > QUICK:
        jax.config.update(LEAST, float("inf"))
    try:
        yield
    finally:
        jax.config.update(LEAST, before)
