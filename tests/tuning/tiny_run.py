"""A whole tuning run of a tiny random model on byte tokens, which can be told to die: run as a script by test_resume.

python tiny_run.py FOLDER [--die-at STEP] [--die-saving STEP] [--term-at STEP]
"""

from __future__ import annotations

import argparse
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax import config
from readme_jax.checkpoints.store import Store
from readme_jax.config import MixtureConfig, ModelConfig, RouterConfig
from readme_jax.models.router import start_router
from readme_jax.models.runtime import Runtime
from readme_jax.parallel.mesh import make_mesh, replicated
from readme_jax.refactor.slice import lay_out, slice_layer
from readme_jax.tuning import resume
from readme_jax.tuning.journal import Journal
from readme_jax.tuning.rounds import Parts, Progress, Tuner
from readme_jax.tuning.schedule import check_same
from readme_jax.tuning.step import backbone_table, place, shard_table

EXPERTS = 3
MODEL = ModelConfig(vocab_size=256, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=64)
ROUTER = RouterConfig(vocab_size=256, num_experts=EXPERTS, dim=16, num_heads=2, head_dim=8, mlp_dim=16)
RUNTIME = Runtime(segments="masked")
RUN = config.Run(
    data=config.Data(sequence_length=8),
    router_stage=config.RouterStage(steps=5, batch=4, lr=3e-3, temperature=2.0),
    expert_stage=config.ExpertStage(steps=5, batch=4, lr=3e-3, accumulate=2, distill=0.5),
    tuning=config.Tuning(rounds=2, checkpoint_every=3),
)


class Bytes:
    """Batches of printable bytes; the position alone decides them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self.seed, index])
        return {"tokens": rng.integers(32, 127, (4, 8), np.int32), "domain": rng.integers(0, EXPERTS, 4, np.int32)}


def dense_params() -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def draw(table: Any) -> Any:
        if isinstance(table, dict):
            return {k: draw(v) for k, v in table.items()}
        return jnp.asarray(rng.normal(float(len(table.shape) == 1), 0.2, table.shape), jnp.float32)

    return draw(backbone_table(MODEL, None, "unrolled"))


def cut_at_random(
    dense: dict[str, Any], permanent: bool = True, tied: bool = False, top_k: int = 1, experts: int = EXPERTS
) -> tuple[MixtureConfig, dict[str, Any], Any]:
    """A mixture of half-width experts that share some channels: its shape, unrolled parameters and channels."""
    rng = np.random.default_rng(1)
    scores = rng.random((MODEL.num_layers, experts, MODEL.ffn_dim)) + 0.5 * (np.arange(MODEL.ffn_dim) % 4 == 0)
    masks = scores > np.median(scores, axis=-1, keepdims=True)
    mixture, channels = lay_out(masks, permanent, tied, top_k, align=1)
    params = {k: slice_layer(v, channels[k], mixture) if k in channels else v for k, v in dense.items()}
    return mixture, params, channels


def begin(run: config.Run, mesh: Any, permanent: bool = True) -> tuple[Parts, Progress]:
    dense = dense_params()
    mixture, params, channels = cut_at_random(dense, permanent)
    key, start = jax.random.split(jax.random.key(run.seed))
    backbone = place(params, shard_table(backbone_table(MODEL, mixture, "unrolled"), mesh))
    progress = Progress(0, backbone, start_router(start, ROUTER, dense["embed"]), key)
    channels = jax.device_put(channels, replicated(mesh))
    return Parts(MODEL, mixture, ROUTER, RUNTIME, dense, channels), progress


class Dying(Journal):
    """Kills or interrupts the process right after a step."""

    die_at = term_at = 0
    number = signal.SIGTERM

    def train(self, done: int, *rest: Any) -> None:
        super().train(done, *rest)
        if done == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if done == self.term_at:
            os.kill(os.getpid(), self.number)


def run_in(folder: Path, run: config.Run = RUN, die_at: int = 0, die_saving: int = 0, term_at: int = 0) -> Progress:
    store, mesh = Store(folder / "checkpoints"), make_mesh(config.Mesh(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        parts, progress = begin(run, mesh)
        done = store.latest()
        if done is not None:
            check_same(store.meta(done)["config"], run, str(folder))
            progress, channels = resume.load(store, done, run, MODEL, parts.mixture, ROUTER, RUNTIME, mesh)
            jax.tree.map(np.testing.assert_array_equal, channels, parts.channels)

        def save(progress: Progress) -> None:
            resume.save(store, progress, parts.channels, {"config": asdict(run)})
            if progress.done == die_saving:
                os.kill(os.getpid(), signal.SIGKILL)

        journal = Dying(folder, done)
        journal.die_at, journal.term_at = die_at, term_at
        try:
            Tuner(run, parts, {"router": Bytes(1), "experts": Bytes(2)}, mesh, journal, save).tune(progress)
        finally:
            journal.close()
            store.close()
    return progress


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for name in ("--die-at", "--die-saving", "--term-at"):
        parser.add_argument(name, type=int, default=0)
    run_in(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
