"""What can be wrong with a run's settings and would show only after hours: looked at before anything is loaded."""

from __future__ import annotations

import math
from pathlib import Path

from readme_jax import config
from readme_jax.checkpoints.known import shape_of
from readme_jax.config import ModelConfig
from readme_jax.data.starter_sources import DOMAINS as STARTER
from readme_jax.data.text import open_text
from readme_jax.errors import ConfigError
from readme_jax.parallel.mesh import BATCH_AXES, axis_sizes


def check_run(run: config.Run, devices: int) -> None:
    """Raises ConfigError when the mesh does not match `devices` or a batch does not divide over them, DataError when
    files of the text are missing, each named."""
    sizes = axis_sizes(run.mesh, devices)
    axes = [a for a in BATCH_AXES if sizes[a] > 1]
    ways = math.prod(sizes[a] for a in axes)
    router, experts = run.router_stage, run.expert_stage
    stages = {
        "RouterStage": (router.steps, router.batch, 1),
        "ExpertStage": (experts.steps, experts.batch, experts.accumulate),
    }
    for name, (steps, batch, parts) in stages.items():
        if not steps or not run.tuning.rounds:
            continue
        rows = batch // parts
        each = f" in {parts} micro-batches of {rows}" if parts > 1 else ""
        if rows % ways:
            raise ConfigError(
                f"{name}.batch = {batch}{each} does not divide over {' x '.join(axes)} = {ways} devices: change "
                "the batch, accumulate or the Mesh axes"
            )
    check_text(run.data)


def check_text(data: config.Data) -> tuple[str, ...] | None:
    """The domains of a run's text, or None where neither they nor its folder are named yet.

    Raises DataError when files are missing, each named.
    """
    if data.folder == "starter":
        return data.domains or tuple(STARTER)
    if not data.folder:
        return data.domains or None
    return open_text(data, Path(data.folder)).domains


def check_model(run: config.Run) -> ModelConfig:
    """The shape of a run's dense model, without its weights. Raises ConfigError when sequences pass its context."""
    shape = shape_of(run.model.checkpoint)
    if run.data.sequence_length > shape.max_position:
        raise ConfigError(
            f"Data.sequence_length = {run.data.sequence_length}: {run.model.checkpoint} takes {shape.max_position}"
        )
    return shape
