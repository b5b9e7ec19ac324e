"""Shapes of models without their weights: a table of known ones, for others config.json, here or on the hub."""

from __future__ import annotations

from pathlib import Path

from readme_jax.checkpoints.folder import first_line
from readme_jax.checkpoints.gguf import GGUF
from readme_jax.checkpoints.hf import EMBEDDED, folder_config
from readme_jax.config import ModelConfig
from readme_jax.errors import CheckpointError

_LLAMA2_7B = ModelConfig(32000, 4096, 32, num_heads=32, num_kv_heads=32, head_dim=128, ffn_dim=11008)
_MISTRAL_7B = ModelConfig(
    32000, 4096, 32, num_heads=32, num_kv_heads=8, head_dim=128, ffn_dim=14336, sliding_window=4096, max_position=32768
)
_TINYLLAMA = ModelConfig(32000, 2048, 22, num_heads=32, num_kv_heads=4, head_dim=64, ffn_dim=5632, max_position=2048)


def _smollm2(embed: int, layers: int, heads: int, kv: int, ffn: int, theta: float) -> ModelConfig:
    return ModelConfig(49152, embed, layers, heads, kv, 64, ffn, theta, tie_embeddings=True, max_position=8192)


_SMOLLM2_135M = _smollm2(576, 30, 9, 3, 1536, 1e5)
_SMOLLM2_360M = _smollm2(960, 32, 15, 5, 2560, 1e5)
_SMOLLM2_1_7B = _smollm2(2048, 24, 32, 32, 8192, 1.3e5)

# The models of configs/models, and their siblings of the same shape.
SHAPES: dict[str, ModelConfig] = {
    "meta-llama/Llama-2-7b-hf": _LLAMA2_7B,
    "meta-llama/Llama-2-7b-chat-hf": _LLAMA2_7B,
    "mistralai/Mistral-7B-v0.1": _MISTRAL_7B,
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": _TINYLLAMA,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _TINYLLAMA,
    EMBEDDED: _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-135M": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-360M": _SMOLLM2_360M,
    "HuggingFaceTB/SmolLM2-360M-Instruct": _SMOLLM2_360M,
    "HuggingFaceTB/SmolLM2-1.7B": _SMOLLM2_1_7B,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _SMOLLM2_1_7B,
}


def shape_of(source: str) -> ModelConfig:
    """The shape of a dense model by whatever `load_dense` takes; no weights are read or fetched.

    Raises CheckpointError where there is no such model.
    """
    if source in SHAPES:
        return SHAPES[source]
    path = Path(source).expanduser()
    if source and path.is_dir():
        return folder_config(path)
    if path.is_file() and path.suffix == ".gguf":
        return GGUF(path).config()
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise CheckpointError(f"no such model: {source!r}; give a folder, a .gguf file or a hub id in Model.checkpoint")
    from huggingface_hub import hf_hub_download  # slow to import, and only needed here

    try:
        return folder_config(Path(hf_hub_download(source, "config.json")).parent)
    except CheckpointError:
        raise
    except Exception as e:  # an unknown name, no rights, or no network: whatever its HTTP client raises
        raise CheckpointError(
            f"no such model: {source!r} is neither a path nor on the hub within reach ({first_line(e)})"
        ) from e
