"""How experts are used: shares by domain, and how often a token repeats its predecessor's expert.

# T window length, E experts, K experts a token, n windows
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from readme_jax.evaluation.perplexity import Losses


def expert_shares(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """Share [E] of (token, choice) pairs that each expert gets: experts [n, T, K]."""
    return np.bincount(experts.reshape(-1), minlength=num_experts) / experts.size


def repeat_rate(experts: np.ndarray) -> float:
    """Share of tokens whose first expert is that of the token before them: experts [n, T, K], T > 1."""
    first = experts[..., 0]
    return float((first[:, 1:] == first[:, :-1]).mean())


def usage(losses: Mapping[str, Losses], num_experts: int) -> dict[str, list[float]]:
    """Expert shares [E] of each domain's text, as the report shows them."""
    return {
        name: expert_shares(each.experts, num_experts).tolist()
        for name, each in losses.items()
        if each.experts is not None
    }
