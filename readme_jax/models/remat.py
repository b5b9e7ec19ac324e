"""Remat policies: what a layer keeps of its forward pass for its backward pass, the rest of which it computes again.

- `none` keeps everything.
- `dots` keeps the results of matmuls: queries, keys and values, what attention returns and writes, gate and up. Scores,
  norms and elementwise work are computed again, and weights gathered again.
- `full` keeps a layer's input alone.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from readme_jax.config import Remat

DOT = "dot"


def kept(x: jax.Array) -> jax.Array:
    """x, marked as the result of a matmul that `dots` keeps."""
    return checkpoint_name(x, DOT)


def remat(block: type[nn.Module], policy: Remat, scanned: bool) -> Any:
    """A module class under a policy. Inside a scan XLA cannot merge the passes: nothing has to keep it from it."""
    if policy == "none":
        return block
    keep = jax.checkpoint_policies.save_only_these_names(DOT) if policy == "dots" else None
    return nn.remat(block, prevent_cse=not scanned, policy=keep)
