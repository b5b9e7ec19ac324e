"""Causal attention on a TPU: JAX's own splash kernels, forward and backward, which write no scores to HBM.

Blocks of keys that no query of a block sees are left out. Backward, one kernel computes the scores once more and from
them the gradients of queries, keys and values.

# B batch, T length, H heads, K kv heads, h head width
"""

from __future__ import annotations

import math
from typing import Any

import jax
from einops import rearrange
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from readme_jax.models.remat import DOT

BLOCK = 512  # queries and keys of a block, at most
FORWARD, BACKWARD, AGAIN = 2, 5, 1  # matmuls of a block; backward, of them the scores computed again


def block(length: int) -> int:
    """Queries and keys of a block: the largest that divides a sequence, which is a multiple of 128 long."""
    return math.gcd(BLOCK, length)


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, window: int | None, divisor: float, interpret: bool = False
) -> jax.Array:
    """q [B, T, H, h], k and v [B, T, K, h] -> [B, T, H, h], of one device.

    T is a multiple of 128. `window` is the sliding window, `divisor` divides the logits; `interpret` runs the kernels
    anywhere, slowly.
    """
    q, k, v = (rearrange(x, "b t h d -> b h t d") for x in (q / divisor, k, v))
    kernel: Any = _kernel(q.shape[1], q.shape[2], window, interpret)
    return rearrange(jax.vmap(kernel)(q, k, v), "b h t d -> b t h d")


def _kernel(heads: int, length: int, window: int | None, interpret: bool) -> splash.SplashAttentionKernel:
    shape, size = (length, length), block(length)
    sees = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    sizes = splash.BlockSizes(
        block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, use_fused_bwd_kernel=True
    )
    return splash.make_splash_mha_single_device(
        masks.MultiHeadMask([sees] * heads), block_sizes=sizes, residual_checkpoint_name=DOT, interpret=interpret
    )


def computed(length: int) -> int:
    """Pairs of queries and keys in the blocks that are computed, without a window."""
    size = block(length)
    count = length // size
    return count * (count + 1) // 2 * size * size
