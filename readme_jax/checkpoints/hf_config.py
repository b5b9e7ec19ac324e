"""Hugging Face's config.json <-> ModelConfig, for Llama and Mistral."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from readme_jax.config import ModelConfig, RopeScaling
from readme_jax.errors import CheckpointError, ConfigError

# architecture -> what its config.json leaves unsaid, as transformers reads it
DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "sliding_window": None},
    "MistralForCausalLM": {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "sliding_window": 4096},
}
# settings that change the computation, and the only value of them that is computed here
ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def from_hf(where: Path, values: Mapping[str, Any]) -> ModelConfig:
    """The shape that a config.json describes. Raises CheckpointError when it is incomplete or unsupported."""
    architecture = (values.get("architectures") or [None])[0]
    if architecture not in DEFAULTS:
        supported = ", ".join(DEFAULTS)
        raise CheckpointError(f"{where}: unsupported architecture {architecture!r}; supported are {supported}")
    for name, only in ONLY.items():
        if name in values and values[name] != only:
            raise CheckpointError(f"{where}: unsupported {name} = {values[name]!r}; only {only!r} is")
    theta, scaling = _rope(where, values)
    values = DEFAULTS[architecture] | dict(values)
    try:
        heads = values["num_attention_heads"]
        return ModelConfig(
            vocab_size=values["vocab_size"],
            embed_dim=values["hidden_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
            ffn_dim=values["intermediate_size"],
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=values["rms_norm_eps"],
            tie_embeddings=values.get("tie_word_embeddings", False),
            sliding_window=values["sliding_window"] if architecture == "MistralForCausalLM" else None,
            max_position=values["max_position_embeddings"],
        )
    except KeyError as e:
        raise CheckpointError(f"{where}: {e.args[0]} is missing") from e
    except (ConfigError, TypeError) as e:
        raise CheckpointError(f"{where}: {e}") from e


def _rope(where: Path, values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """RoPE base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{where}: unsupported partial_rotary_factor = {rope['partial_rotary_factor']!r}")
    try:
        if kind == "default":
            return theta, None
        if kind == "linear":
            return theta, RopeScaling("linear", rope["factor"])
        if kind == "llama3":
            return theta, RopeScaling(
                "llama3",
                rope["factor"],
                rope["low_freq_factor"],
                rope["high_freq_factor"],
                rope["original_max_position_embeddings"],
            )
    except KeyError as e:
        raise CheckpointError(f"{where}: RoPE scaling {kind!r} needs {e.args[0]}") from e
    except ConfigError as e:
        raise CheckpointError(f"{where}: {e}") from e
    raise CheckpointError(f"{where}: unsupported RoPE scaling {kind!r}; supported are default, linear, llama3")


def to_hf(config: ModelConfig, dtype: str, bos_id: int | None, eos_ids: tuple[int, ...]) -> dict[str, Any]:
    """The config.json of a dense model: Mistral where there is a sliding window, Llama elsewhere."""
    mistral = config.sliding_window is not None
    values: dict[str, Any] = {
        "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
        "model_type": "mistral" if mistral else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_to_hf(config.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position,
        "hidden_act": "silu",
        "torch_dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": list(eos_ids) if len(eos_ids) > 1 else (eos_ids[0] if eos_ids else None),
    }
    if mistral:
        return values | {"sliding_window": config.sliding_window}
    return values | {"attention_bias": False, "mlp_bias": False}


def _rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }
