"""The shape of the tests' tiny model."""

from __future__ import annotations

from readme_jax.config import ModelConfig

TINY = ModelConfig(
    vocab_size=260, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, max_position=512
)
