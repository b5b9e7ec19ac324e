"""SwiGLU feed-forward layers on [out, in] weights."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def linear(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., in] times w [out, in] -> [..., out]."""
    return jnp.einsum("...i,oi->...o", x, w)


def activations(ffn: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """a = silu(x W_gate) * (x W_up), the input of W_down: what calibration measures. [..., D] -> [..., F]."""
    return jax.nn.silu(linear(x, ffn["gate"])) * linear(x, ffn["up"])


def feed_forward(ffn: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """[..., D] -> [..., D]."""
    return linear(activations(ffn, x), ffn["down"])
