"""What a command opens: any checkpoint, and the names of a mixture's experts."""

from __future__ import annotations

from pathlib import Path

from readme_jax.checkpoints.hf import Dense, load_dense
from readme_jax.checkpoints.mixture import Mixture, is_mixture, load_mixture
from readme_jax.checkpoints.tokenizer import Tokenizer
from readme_jax.errors import CheckpointError

EXPORT = "export"  # where a run keeps its exported mixture


def open_model(source: str) -> Dense | Mixture:
    """A mixture's folder, the folder of a run that exported one, or any source of a dense model.

    Raises CheckpointError when there is no such model or it cannot be read.
    """
    for folder in (Path(source), Path(source) / EXPORT):
        if is_mixture(folder):
            return load_mixture(folder)
    return load_dense(source)


def tokenizer_of(model: Dense | Mixture, source: str) -> Tokenizer:
    """The model's tokenizer. Raises CheckpointError when its folder has none."""
    if model.tokenizer is None:
        raise CheckpointError(f"{source}: no tokenizer; put its tokenizer.json beside the weights")
    return model.tokenizer


def expert_names(mixture: Mixture) -> list[str]:
    """Names of a mixture's experts: the domains they were cut for."""
    names = mixture.meta.get("facts", {}).get("experts")
    return list(names or (f"expert {e}" for e in range(mixture.mixture.num_experts)))
