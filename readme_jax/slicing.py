"""The start of a run: the mixture cut from the dense model, and its router. Of several processes one cuts for all.

Cutting looks at little text, so one host's devices are enough, and every process starts from the very same slices.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from readme_jax import config
from readme_jax.checkpoints.hf import Dense, open_dense
from readme_jax.checkpoints.mixture import Mixture, open_mixture, save_mixture
from readme_jax.config import MixtureConfig, ModelConfig, RouterConfig
from readme_jax.loading import LayerByLayer, load_on_mesh
from readme_jax.memory import trim
from readme_jax.models.layout import to_layout
from readme_jax.models.router import config_for, start_router
from readme_jax.models.runtime import Runtime
from readme_jax.parallel.distributed import lead
from readme_jax.parallel.mesh import make_mesh
from readme_jax.parallel.placing import wait_for_all
from readme_jax.progress import meter
from readme_jax.refactor.convert import convert
from readme_jax.tuning.step import backbone_table, place, shard_table

SLICES = "slices"  # folder of an uncommitted start, inside the run's own
LOOK = 0.5  # seconds between looks at whether it is there


class Start(NamedTuple):
    """An untuned mixture, its parameters on the run's mesh in the runtime's layout; its router; facts of its slices."""

    mixture: MixtureConfig
    params: Mapping[str, Any]
    channels: Mapping[str, Any]
    router_config: RouterConfig
    router: Mapping[str, Any]
    facts: dict[str, Any]


def start(run: config.Run, dense: Dense, calibration: Mapping[str, np.ndarray], runtime: Runtime, mesh: Any) -> Start:
    """Cut the mixture and start the router. `dense` is on the run's mesh, under which this runs; calibration tokens
    [n, T] are of each domain.

    Of several processes the first cuts on its own devices, onto which it reads a layer of the dense model at a time;
    cut layers go to its memory, and from there through files to the others, which read their parts.
    """
    if jax.process_count() == 1:
        cut = _cut(run, to_layout(dense.params, "unrolled"), dense.config, calibration, runtime)
        shardings = shard_table(backbone_table(dense.config, cut.mixture, runtime.layout), mesh)
        return cut._replace(params=place(to_layout(cut.params, runtime.layout), shardings))
    folder = Path(run.output) / SLICES
    if lead():
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that died before its first checkpoint
    wait_for_all("slices removed")
    if lead():
        alone = make_mesh(config.Mesh(), jax.local_devices())
        with jax.set_mesh(alone):
            layers = LayerByLayer(open_dense(run.model.checkpoint), alone)
            cut = _cut(run, layers, dense.config, calibration, runtime, keep=_on_host)
        params, channels, router = (_on_host(t) for t in (cut.params, cut.channels, cut.router))
        about = {"facts": cut.facts}
        saved = (dense.config, cut.mixture, params, channels, cut.router_config, router, dense.tokenizer, about)
        save_mixture(folder, Mixture(*saved))
    while not folder.is_dir():  # a barrier would time out: cutting takes minutes; the watch sees the first one die
        time.sleep(LOOK)
    back, backbone = open_mixture(folder)
    assert back.router is not None and back.router_config is not None
    params = load_on_mesh(backbone, backbone_table(dense.config, back.mixture, runtime.layout), mesh)
    return Start(back.mixture, params, back.channels, back.router_config, back.router, back.meta["facts"])


def forget(run: config.Run) -> None:
    """Remove what `start` shared between processes, once a checkpoint holds it."""
    wait_for_all("slices saved")
    if lead():
        shutil.rmtree(Path(run.output) / SLICES, ignore_errors=True)


def _on_host(tree: Mapping[str, Any]) -> dict[str, Any]:
    return jax.tree.map(np.asarray, dict(tree))


def _cut(
    run: config.Run,
    params: Mapping[str, Any],
    model: ModelConfig,
    calibration: Mapping[str, np.ndarray],
    runtime: Runtime,
    keep: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Start:
    with meter("slice", sum(t.size for t in calibration.values())) as tick:
        sliced = convert(params, model, calibration, run.slice, runtime, tick, keep)
    trim()
    router_config = config_for(run.router, model, sliced.mixture.num_experts)
    _, key = jax.random.split(jax.random.key(run.seed))  # the first half is the run's own: resume.random_key
    router = start_router(key, router_config, params["embed"])
    return Start(sliced.mixture, sliced.params, sliced.channels, router_config, router, sliced.facts)
