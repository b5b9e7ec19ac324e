"""What a step costs: bytes over memory and link, FLOPs, for named models on named devices.

    # N tokens of a batch, D model width, F dense FFN width, d = width * F active rows, L layers

A roofline a part: attention's projections and the permanent rows, attention itself, each present expert's segment, the
head. Device figures are what kernels reach, not data sheets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from readme_jax.config import Validated
from readme_jax.serving.work import Batch


@dataclass(frozen=True)
class Shape(Validated):
    """A refactored model as far as costs go: every layer alike, one expert a token on top of the permanent rows."""

    embed_dim: int  # D
    num_layers: int  # L
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int  # F
    vocab_size: int
    num_experts: int = 7
    width: float = 0.5  # active share of F
    permanent: float = 0.23  # share of F that every expert keeps, stored once (what slicing gives at 7B)
    value_bytes: int = 2

    def check(self) -> None:
        self.positive("embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim", "vocab_size")
        self.positive("num_experts", "value_bytes")
        self.require(0 <= self.permanent < self.width <= 1, "width", "above `permanent` and at most 1")

    @property
    def expert_values(self) -> int:
        """Weights of one expert in one layer."""
        return 3 * self.embed_dim * round((self.width - self.permanent) * self.ffn_dim)

    @property
    def shared_values(self) -> int:
        """Weights of one layer that every token uses: attention's projections and the permanent rows."""
        heads = 2 * self.embed_dim * self.head_dim * (self.num_heads + self.num_kv_heads)
        return heads + 3 * self.embed_dim * round(self.permanent * self.ffn_dim)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in one layer: what one miss moves."""
        return self.value_bytes * self.expert_values


@dataclass(frozen=True)
class Device(Validated):
    """An accelerator, in figures that kernels reach."""

    flops: float  # matmul FLOP/s in bf16
    memory: float  # bytes/s read from device memory
    link: float  # bytes/s from host to device
    overhead: float = 3e-5  # seconds a layer that no kernel uses

    def check(self) -> None:
        self.positive("flops", "memory", "link")
        self.require(self.overhead >= 0, "overhead", "zero or more")


SHAPES = {
    "llama2_7b": Shape(4096, 32, 32, 32, 128, 11008, 32000),
    "mistral_7b": Shape(4096, 32, 32, 8, 128, 14336, 32000),
}
# H100: measured (672 TFLOP/s, 2,380 GB/s, 45 GB/s pinned). A100 and v5e: 80% of the peaks they are sold with (312 and
# 197 TFLOP/s, 2,039 and 819 GB/s) and the same share of their links (PCIe 4 x16 and 3 x16).
DEVICES = {
    "a100": Device(2.5e14, 1.63e12, 2.5e10),
    "h100": Device(6.72e14, 2.38e12, 4.5e10),
    "v5e": Device(1.58e14, 6.55e11, 1.25e10),
}


class LayerCost(NamedTuple):
    """Seconds of one layer of a batch: what every token shares, then each present expert's segment."""

    shared: float
    segments: dict[int, float]

    @property
    def total(self) -> float:
        return self.shared + sum(self.segments.values())


@dataclass(frozen=True)
class Costs:
    """The few figures a scheduler weighs work by; the engine measures them, `CostModel.costs` derives them.

    Attributes:
        fixed: seconds of a step whatever is in it.
        token: seconds a token once arithmetic binds.
        expert: seconds to read one present expert's weights in all layers.
        load: seconds to bring one expert to the device in all layers.
    """

    fixed: float
    token: float
    expert: float
    load: float

    def compute(self, tokens: np.ndarray, experts: np.ndarray) -> np.ndarray:
        """Seconds of steps of so many tokens with so many experts present, elementwise."""
        return self.fixed + np.maximum(self.token * tokens, self.expert * experts)

    def balance(self, experts: int) -> float:
        """Tokens of a step whose arithmetic takes as long as all else of it, with so many experts present."""
        return (self.fixed + self.expert * experts) / self.token


class CostModel:
    """Times of steps of a `shape` on a `device`."""

    def __init__(self, shape: Shape, device: Device) -> None:
        self.shape, self.device = shape, device
        self.load = shape.expert_bytes / device.link  # seconds, one expert in one layer
        self._read = shape.value_bytes / device.memory  # seconds to read a weight
        self._kv = 2 * shape.num_kv_heads * shape.head_dim * shape.value_bytes  # bytes a token and layer
        self._attend = 4 * shape.num_heads * shape.head_dim  # FLOPs a query and key

    def matmul(self, tokens: float, values: int) -> float:
        """Seconds of [tokens] x a matrix of `values` weights: the larger of reading it and multiplying."""
        return values * max(self._read, 2 * tokens / self.device.flops)

    def layer(self, batch: Batch) -> LayerCost:
        """One layer's seconds for a batch."""
        counts = [0] * self.shape.num_experts
        reads = pairs = 0  # cached keys read; query-key pairs
        for chunk in batch.chunks:
            if chunk.count == 1:
                for expert in chunk.sequence.routes[chunk.start]:
                    counts[expert] += 1
            else:
                self._count(counts, chunk.sequence.masks[chunk.start : chunk.start + chunk.count])
            reads += chunk.start + chunk.count
            pairs += chunk.count * (2 * chunk.start + chunk.count + 1) // 2
        attention = max(reads * self._kv / self.device.memory, pairs * self._attend / self.device.flops)
        shared = self.matmul(batch.tokens, self.shape.shared_values) + attention + self.device.overhead
        values = self.shape.expert_values
        return LayerCost(shared, {e: self.matmul(n, values) for e, n in enumerate(counts) if n})

    def _count(self, counts: list[int], masks: np.ndarray) -> None:
        for expert in range(self.shape.num_experts):
            counts[expert] += int(np.count_nonzero(masks >> expert & 1))

    def head(self, samples: int) -> float:
        """Seconds of the output layer for so many sampled tokens."""
        values = self.shape.vocab_size * self.shape.embed_dim
        return self.matmul(samples, values) if samples else 0.0

    def costs(self) -> Costs:
        """What a scheduler needs to know of this model on this device."""
        shape, layers = self.shape, self.shape.num_layers
        fixed = layers * (self.matmul(1, shape.shared_values) + self.device.overhead) + self.head(1)
        active = shape.shared_values + shape.expert_values
        token = 2 * layers * active / self.device.flops
        return Costs(fixed, token, layers * self.matmul(1, shape.expert_values), layers * self.load)
