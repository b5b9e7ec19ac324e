"""Models to safetensors: the newest checkpoint of a run, a mixture, or a dense model from any source."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from readme_jax import config
from readme_jax.checkpoints.hf import Dense, load_dense, save_dense
from readme_jax.checkpoints.mixture import Mixture, save_mixture
from readme_jax.checkpoints.store import Store
from readme_jax.cli.settings import from_dict
from readme_jax.cli.sources import open_model
from readme_jax.config import MixtureConfig, RouterConfig
from readme_jax.errors import CheckpointError
from readme_jax.models.layout import unroll
from readme_jax.models.runtime import runtime_for
from readme_jax.parallel.mesh import make_mesh
from readme_jax.runner import CHECKPOINTS
from readme_jax.tuning import resume


def read_run(folder: str | Path) -> Mixture:
    """The mixture of a run's newest checkpoint, finished or not, on one device. Raises CheckpointError without one."""
    folder = Path(folder)
    if not (folder / CHECKPOINTS).is_dir():
        raise CheckpointError(f"{folder}: not the folder of a run (no {CHECKPOINTS} in it)")
    store = Store(folder / CHECKPOINTS)
    done = store.latest()
    if done is None:
        raise CheckpointError(f"{folder}: the run has not saved a complete checkpoint yet")
    meta = store.meta(done)
    run = from_dict(meta["config"])
    dense = load_dense(run.model.checkpoint)
    mixture, router = MixtureConfig(**meta["mixture"]), RouterConfig(**meta["router"])
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        progress, channels = resume.load(store, done, run, dense.config, mixture, router, runtime_for(run.model), mesh)
    store.close()
    params, rows, routing = (
        jax.tree.map(np.asarray, tree) for tree in (unroll(progress.backbone), unroll(channels), dict(progress.router))
    )
    about = {"config": meta["config"], "facts": meta["facts"], "steps": done}
    return Mixture(dense.config, mixture, params, rows, router, routing, dense.tokenizer, about)


def export(run: str | None, checkpoint: str | None, out: str) -> Dense | Mixture:
    """Write the model of a run or of a checkpoint to the folder `out`, from which it loads back bit for bit."""
    if run is not None:
        model: Dense | Mixture = read_run(run)
    else:
        assert checkpoint is not None
        model = open_model(checkpoint)
    if isinstance(model, Mixture):
        save_mixture(out, model)
    else:
        save_dense(out, model)
    return model
