"""From logits over experts to choices.

# B batch, T length, E experts, K experts a token
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def choose(logits: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """Experts [B, T, K] int32 of each token, best first, and their weights: a softmax over the K (1 where K = 1)."""
    values, experts = jax.lax.top_k(logits, top_k)
    return experts.astype(jnp.int32), jax.nn.softmax(values, axis=-1)
