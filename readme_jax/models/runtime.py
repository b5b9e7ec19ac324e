"""How a model computes: number format, layout and the back ends that suit a platform."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from readme_jax import config


@dataclass(frozen=True)
class Runtime:
    """Settings that change how a result is computed, never what it is (beyond rounding)."""

    dtype: Any = jnp.float32  # of activations and matmuls; parameters stay as stored
    layout: config.Layout = "unrolled"
    remat: config.Remat = "none"
    segments: Literal["blocks", "kernel", "gmm", "masked", "ragged"] = "blocks"
    attention: Literal["blocks", "cudnn", "splash"] = "blocks"
    decode: Literal["stretches", "kernel"] = "stretches"  # how a decode step attends to its cache and writes it


def runtime_for(model: config.Model, platform: str | None = None) -> Runtime:
    """The back ends of a platform: static row blocks on CPU; megablox and splash attention on TPU; on GPU kernels for
    segments and for attention to the cache, and cuDNN's attention in bf16."""
    platform = platform or jax.default_backend()
    segments: dict[str, Literal["blocks", "gmm", "kernel"]] = {"cpu": "blocks", "tpu": "gmm", "gpu": "kernel"}
    attention: dict[str, Literal["blocks", "cudnn", "splash"]] = {"cpu": "blocks", "tpu": "splash", "gpu": "blocks"}
    if platform == "gpu" and model.compute_dtype == "bfloat16":
        attention["gpu"] = "cudnn"
    return Runtime(
        dtype=jnp.dtype(model.compute_dtype),
        layout=model.layout,
        remat=model.remat,
        segments=segments[platform],
        attention=attention[platform],
        decode="kernel" if platform == "gpu" else "stretches",
    )
