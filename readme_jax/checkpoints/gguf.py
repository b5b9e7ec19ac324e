"""GGUF files (llama.cpp): config, tensors and tokenizer of a Llama or Mistral, dequantised a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from einops import rearrange

from readme_jax.checkpoints.folder import first_line
from readme_jax.checkpoints.gguf_tokenizer import tokenizer_from_metadata
from readme_jax.checkpoints.tensors import Stored
from readme_jax.checkpoints.tokenizer import Tokenizer
from readme_jax.config import ModelConfig, RopeScaling
from readme_jax.errors import CheckpointError, ConfigError
from readme_jax.models.attention import rotary_frequencies

ROPE_FREQS = "rope_freqs.weight"  # [h / 2], what llama3 scaling divides the inverse frequencies by
ORIGINAL_POSITIONS = (8192, 4096, 2048, 16384, 32768)  # to try: the tensor alone does not name its own


class GGUF:
    """An open GGUF file. Raises CheckpointError when it is cut short, not GGUF, or not a supported model."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except FileNotFoundError as e:
            raise CheckpointError(f"{path}: no such file") from e
        except Exception as e:  # a file cut short fails anywhere in the parser, with any type
            raise CheckpointError(f"{path}: cut short or not a GGUF file ({first_line(e)}); fetch it again") from e
        self._tensors = {t.name: t for t in self._reader.tensors}
        for t in self._reader.tensors:
            if t.data_offset + t.n_bytes > path.stat().st_size:
                raise CheckpointError(f"{path}: cut short: tensor {t.name} is not complete; fetch it again")

    def meta(self, key: str, default: Any = None) -> Any:
        """A metadata value, `default` when it is absent."""
        field = self._reader.fields.get(key)
        return default if field is None else field.contents()

    def _need(self, key: str) -> Any:
        value = self.meta(key)
        if value is None:
            raise CheckpointError(f"{self.path}: metadata {key} is missing")
        return value

    def config(self) -> ModelConfig:
        """The model's shape. Raises CheckpointError when metadata is missing or asks for what is not supported."""
        if (architecture := self.meta("general.architecture")) != "llama":
            raise CheckpointError(f"{self.path}: unsupported architecture {architecture!r}; supported is 'llama'")
        if self.meta("llama.expert_count", 0):
            raise CheckpointError(f"{self.path}: unsupported: a mixture of experts already (llama.expert_count)")
        heads, width = self._need("llama.attention.head_count"), self._need("llama.embedding_length")
        head_dim = self.meta("llama.attention.key_length", width // heads)
        if (rotary := self.meta("llama.rope.dimension_count", head_dim)) != head_dim:
            raise CheckpointError(f"{self.path}: unsupported: RoPE on {rotary} of {head_dim} channels of a head")
        theta = float(self.meta("llama.rope.freq_base", 10000.0))
        try:
            return ModelConfig(
                vocab_size=self._vocab_size(),
                embed_dim=width,
                num_layers=self._need("llama.block_count"),
                num_heads=heads,
                num_kv_heads=self.meta("llama.attention.head_count_kv", heads),
                head_dim=head_dim,
                ffn_dim=self._need("llama.feed_forward_length"),
                rope_theta=theta,
                rope_scaling=self._rope_scaling(head_dim, theta),
                norm_eps=float(self._need("llama.attention.layer_norm_rms_epsilon")),
                tie_embeddings="output.weight" not in self._tensors,
                sliding_window=self.meta("llama.attention.sliding_window"),
                max_position=self._need("llama.context_length"),
            )
        except ConfigError as e:
            raise CheckpointError(f"{self.path}: {e}") from e

    def _vocab_size(self) -> int:
        tokens = self._reader.fields.get("tokenizer.ggml.tokens")
        size = self.meta("llama.vocab_size", None if tokens is None else len(tokens.data))
        return size if size is not None else self._need("llama.vocab_size")

    def _rope_scaling(self, head_dim: int, theta: float) -> RopeScaling | None:
        if ROPE_FREQS in self._tensors:
            return _llama3_scaling(self.path, self._read(ROPE_FREQS), head_dim, theta)
        kind = self.meta("llama.rope.scaling.type", "none")
        factor = self.meta("llama.rope.scaling.factor", self.meta("llama.rope.scale_linear", 1.0))
        if kind == "linear" or (kind == "none" and self.meta("llama.rope.scale_linear")):
            return RopeScaling("linear", float(factor)) if factor != 1.0 else None
        if kind == "none":
            return None
        raise CheckpointError(f"{self.path}: unsupported RoPE scaling {kind!r}; supported are linear and llama3")

    def tensors(self, config: ModelConfig) -> Iterator[Stored]:
        """The weights, unread, rows of q and k in Hugging Face's order."""
        for t in self._reader.tensors:
            if t.name != ROPE_FREQS:
                yield Stored(t.name, tuple(int(n) for n in reversed(t.shape)), self._reading(t.name, config))

    def _reading(self, name: str, config: ModelConfig) -> Callable[[], np.ndarray]:
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(name.split(".")[-2])
        if heads is None:
            return lambda: self._read(name)
        # llama.cpp rotates pairs (2i, 2i + 1), Hugging Face pairs (i, i + h / 2)
        return lambda: rearrange(self._read(name), "(head pair two) d -> (head two pair) d", head=heads, two=2)

    def _read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as e:
            raise CheckpointError(f"{self.path}: tensor {name} cannot be dequantised: {e}") from e
        if np.may_share_memory(values, tensor.data):  # plain float32: let go of the mapped file
            values = np.array(values)
        return np.asarray(values).reshape(tuple(reversed(tensor.shape)))

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the metadata; None where the file holds none."""
        if self.meta("tokenizer.ggml.model") in (None, "none", "no_vocab"):
            return None
        return tokenizer_from_metadata(self.path, self.meta)


def _llama3_scaling(path: Path, factors: np.ndarray, head_dim: int, theta: float) -> RopeScaling | None:
    """The llama3 scaling whose frequencies are the plain ones divided by `factors` [h / 2]."""
    if np.all(factors == 1.0):
        return None
    plain = np.asarray(rotary_frequencies(head_dim, theta, None))
    for positions in ORIGINAL_POSITIONS:
        scaling = RopeScaling("llama3", float(factors.max()), 1.0, 4.0, positions)
        scaled = np.asarray(rotary_frequencies(head_dim, theta, scaling))
        if factors.shape == plain.shape and np.allclose(plain / scaled, factors, rtol=1e-4):
            return scaling
    raise CheckpointError(f"{path}: unsupported RoPE scaling: {ROPE_FREQS} is not a llama3 blend of low 1 and high 4")
