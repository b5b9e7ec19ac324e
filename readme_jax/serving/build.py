"""An engine from a model and settings: store, programs, cache and scheduler put together."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any, TypeVar

import jax
import numpy as np

from readme_jax import config
from readme_jax.checkpoints.hf import Dense
from readme_jax.checkpoints.mixture import Mixture
from readme_jax.errors import CheckpointError, ConfigError
from readme_jax.models.runtime import runtime_for
from readme_jax.parallel.mesh import make_mesh
from readme_jax.serving.buckets import Limits, limits_for
from readme_jax.serving.calls import Caller
from readme_jax.serving.cost import Costs
from readme_jax.serving.expert_cache import ExpertCache
from readme_jax.serving.footprint import check_room
from readme_jax.serving.programs import Programs
from readme_jax.serving.residency import Residency
from readme_jax.serving.sampling import Samplings
from readme_jax.serving.scheduler import make_scheduler
from readme_jax.serving.store import ExpertStore

E = TypeVar("E")


def build_engine(cls: type[E], model: Dense | Mixture, settings: config.Serving, **options: Any) -> E:
    """See `Engine.build`. `costs` among the options are what lookahead weighs work by; measured where not given."""
    if isinstance(model, Mixture) and model.router_config is not None:  # put together by hand: loading checks it, too
        choices, experts = model.router_config.num_experts, model.mixture.num_experts
        if choices != experts:
            raise CheckpointError(f"the router chooses among {choices} experts, but the mixture has {experts}")
    runtime = runtime_for(config.Model(compute_dtype=settings.compute_dtype))
    mesh = mesh_of(settings.mesh)
    store = ExpertStore(model, slots_of(model, settings, runtime.dtype), settings.staging, runtime.dtype, mesh)
    programs = Programs(model, store, limits_of(model, settings), runtime)
    check_room(programs)
    caller = Caller(programs, residency_of(store, settings))
    experts = max(store.num_experts, 1)
    costs = options.pop("costs", None)
    if settings.scheduler == "lookahead" and costs is None:
        costs = measure(caller)
    scheduler = make_scheduler(settings.scheduler, settings.budget, costs, experts)
    return cls(caller, scheduler, settings, model.config.vocab_size, model.tokenizer, **options)  # type: ignore[call-arg]


def mesh_of(mesh: config.Mesh) -> jax.sharding.Mesh:
    """The mesh to serve on: the first devices, as many as its axes say; `fsdp` takes none of what is left.

    Raises ConfigError where there are fewer.
    """
    mesh = replace(mesh, fsdp=max(mesh.fsdp, 1))
    sizes, devices = (mesh.data, mesh.fsdp, mesh.expert, mesh.tensor), jax.devices()
    return make_mesh(mesh, devices if -1 in sizes else devices[: math.prod(sizes)])


def limits_of(model: Dense | Mixture, settings: config.Serving) -> Limits:
    """Rows as set, of no more tokens than the model takes, in sizes that suit the platform."""
    length = min(settings.length, model.config.max_position)
    return limits_for(settings.rows, length, settings.chunk, jax.default_backend())


def slots_of(model: Dense | Mixture, settings: config.Serving, dtype: Any) -> int | None:
    """Expert slots a layer; None: all resident. Raises ConfigError where not even one token's experts fit."""
    mixture = model.mixture if isinstance(model, Mixture) else None
    if mixture is None:
        return None
    slots = settings.slots
    if settings.slot_bytes:
        values = 3 * mixture.expert * model.config.embed_dim * model.config.num_layers
        slots = settings.slot_bytes // (values * np.dtype(dtype).itemsize)
        if slots < 1:
            raise ConfigError(
                f"Serving.slot_bytes = {settings.slot_bytes}: one expert of all layers takes "
                f"{values * np.dtype(dtype).itemsize}"
            )
    return slots if 0 < slots < mixture.num_experts else None


def residency_of(store: ExpertStore, settings: config.Serving) -> Residency:
    """The policy of the settings over a store; none where all experts are resident."""
    if store.resident:
        return Residency(store, None)
    cache = ExpertCache(store.num_experts, store.slots, store.staging, settings.policy)
    return Residency(store, cache, settings.prefetch, load_seconds(store) if settings.prefetch else None)


def load_seconds(store: ExpertStore) -> float:
    """How long an expert of all layers takes to arrive here, on an empty store."""
    seconds = []
    for _ in range(2):  # the first one allocates
        began = time.perf_counter()
        for span in range(len(store.spans)):
            store.load(span, 0)
        store.wait(store.present((0,)))
        seconds.append(time.perf_counter() - began)
        store.clear()
    return min(seconds)


def measure(caller: Caller, repeats: int = 2) -> Costs:
    """What steps cost here: a decode of one row, a prefill of the longest chunk, an expert's load. It compiles
    the first two."""
    programs, store = caller.programs, caller.residency.store
    experts = () if caller.dense else (0,)
    chunk, width = caller.limits.chunks[-1], programs.shape.top_k
    load = caller.residency.load_seconds or 0.0
    present = store.present(experts)
    prefill, decode = [], []
    tokens, routes = np.zeros(chunk, np.int32), np.zeros((chunk, width), np.int32)
    for _ in range(repeats + 1):  # the first one compiles
        began = time.perf_counter()
        caller.state, *_ = programs.prefill(
            caller.state, 0, tokens, 0, routes, np.ones((chunk, width), np.float32), experts, present, last=True
        )
        jax.block_until_ready(caller.state.token)
        middle = time.perf_counter()
        caller.state, _ = programs.decode(caller.state, np.ones(1, bool), experts, present, Samplings.greedy(1))
        jax.block_until_ready(caller.state.token)
        prefill.append(middle - began)
        decode.append(time.perf_counter() - middle)
    caller.empty()
    step = min(decode[1:])
    return Costs(fixed=step / 2, token=max(min(prefill[1:]) - step / 2, 1e-9) / chunk, expert=step / 2, load=load)
