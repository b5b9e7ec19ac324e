"""Mesh shapes that suit a topology, a run and its weights: what a sweep compiles."""

from __future__ import annotations

from collections.abc import Iterator

from readme_jax import config
from readme_jax.config import MixtureConfig, ModelConfig
from readme_jax.plan.compiled import LANES

TENSOR, EXPERT = (1, 2, 4, 8), (1, 2, 4)


def _divisors(n: int) -> Iterator[int]:
    return (d for d in range(1, n + 1) if n % d == 0)


def shapes(run: config.Run, model: ModelConfig, mixture: MixtureConfig, chips: int) -> list[config.Mesh]:
    """Meshes of so many chips that divide batches and weights, those that spread weights furthest first."""
    found = []
    for tensor in TENSOR:
        fits = model.num_kv_heads % tensor == 0 and model.vocab_size % tensor == 0
        fits &= mixture.expert % (tensor * LANES) == 0 and mixture.permanent % (tensor * LANES) == 0
        for expert in EXPERT if fits and chips % tensor == 0 else ():
            rest = chips // tensor
            for fsdp in _divisors(rest // expert) if rest % expert == 0 else ():
                ways = rest
                batches = (run.router_stage.batch, run.expert_stage.batch // run.expert_stage.accumulate)
                width = model.embed_dim % (fsdp * expert * LANES) == 0
                if width and fsdp * expert * tensor >= min(chips, 16) and all(b % ways == 0 for b in batches):
                    found.append(config.Mesh(rest // (fsdp * expert), fsdp, expert, tensor))
    return sorted(found, key=lambda m: (m.tensor, m.expert, -m.fsdp))
