"""Every domain's validation text forced through every expert, and the best expert of each sequence.

# D domains, E experts, T window length, n windows
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from readme_jax.evaluation.perplexity import Evaluator, Params, Tick
from readme_jax.tuning.routes import DomainRoutes


@dataclass(frozen=True)
class ExpertMatrix:
    """`nats[domain]` [E, n]: mean loss of each window when all its tokens run one expert."""

    nats: dict[str, np.ndarray]

    @property
    def perplexity(self) -> np.ndarray:
        """[E, D]: perplexity of each domain's text under each expert."""
        return np.exp(np.stack([each.mean(axis=1, dtype=np.float64) for each in self.nats.values()], axis=1))

    @property
    def oracle(self) -> dict[str, float]:
        """Perplexity of each domain when every window runs its best expert: a bound for routes that never switch."""
        return {name: math.exp(float(each.min(axis=0).mean(dtype=np.float64))) for name, each in self.nats.items()}


def expert_matrix(
    evaluator: Evaluator,
    params: Params,
    validation: Mapping[str, np.ndarray],
    channels: Params | None = None,
    tick: Tick = lambda tokens: None,
) -> ExpertMatrix:
    """Losses of validation windows [n, T] of each domain under each expert. The evaluator's model is a mixture."""
    mixture: Any = evaluator.mixture
    routes = DomainRoutes(mixture.num_experts, mixture.top_k)  # a 'domain' e forces expert e

    def means(windows: np.ndarray, expert: int) -> np.ndarray:
        return evaluator.losses(params, windows, routes, channels, expert, tick).nats.mean(axis=1, dtype=np.float64)

    return ExpertMatrix(
        {
            name: np.stack([means(windows, e) for e in range(mixture.num_experts)])
            for name, windows in validation.items()
        }
    )
