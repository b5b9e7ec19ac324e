"""An engine from a model and settings: store, programs, cache and scheduler put together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
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
IN_A_ROW = 6  # decode calls that are timed together
LEAST = 1e-9  # seconds of a part of a step, however noisy the clock


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
    return Residency(store, cache, settings.prefetch, load_seconds(store))


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


def measure(caller: Caller, repeats: int = 3) -> Costs:
    """What steps cost here, by programs that a warm-up compiles, too; the cache is empty afterwards.

    Decode calls of all rows, of as few experts as a token needs and of as many as rows can name without a load, differ
    by what their experts take. Where one number only is possible (a dense model, one slot), half of a step is guessed
    to be its experts'. The longest chunk of a prompt, less the fixed part, says what a token takes.
    """
    held, least = sorted(caller.residency.held), caller.programs.shape.top_k
    most = max(min(len(held), caller.limits.rows * least), least)
    timers = [decoding(caller, held[:number]) for number in sorted({least, most})]
    for timer in timers:
        timer(1)  # compiles
    times = [[timer(IN_A_ROW) for timer in timers] for _ in range(repeats)]  # in turn: what slows one slows both
    step, *more = (min(each) for each in zip(*times, strict=True))
    expert = max((more[0] - step) / (most - least), LEAST) if more else step / 2 / max(least, 1)
    fixed = max(step - expert * max(least, 1), LEAST)
    token = max(prefill_seconds(caller, held[:least], repeats) - fixed, LEAST) / caller.limits.chunks[-1]
    caller.empty()
    return Costs(fixed, token, expert, caller.residency.load_seconds or 0.0)


def decoding(caller: Caller, experts: list[int]) -> Callable[[int], float]:
    """How long a decode call of all rows takes, shared out among `experts`, which are on the device: of so many
    dispatched one after another, as an engine that dispatches ahead does, so that the host's part is hidden as there.
    """
    programs, rows, width = caller.programs, caller.limits.rows, caller.programs.shape.top_k
    weights, sampling = caller.residency.store.present(experts), Samplings.greedy(rows)
    routes = np.resize(np.asarray(experts, np.int32), (rows, width))
    starts = (routes, np.zeros(rows, np.int32))
    places = (caller.state.experts.sharding, caller.state.position.sharding)

    def seconds(calls: int) -> float:
        # A call uses its state up and leaves rows to other experts: the next one is given routes of its own.
        fresh = jax.block_until_ready([jax.device_put(starts, places) for _ in range(calls)])
        began = time.perf_counter()
        for named, position in fresh:
            state = replace(caller.state, experts=named, position=position)
            caller.state, _ = programs.decode(state, np.ones(rows, bool), experts, weights, sampling)
        jax.block_until_ready(caller.state.token)
        return (time.perf_counter() - began) / calls

    return seconds


def prefill_seconds(caller: Caller, experts: list[int], repeats: int) -> float:
    """How long the longest chunk of a prompt takes, all of it on `experts`, which are on the device."""
    programs, chunk, width = caller.programs, caller.limits.chunks[-1], caller.programs.shape.top_k
    weights, tokens = caller.residency.store.present(experts), np.zeros(chunk, np.int32)
    routes = np.resize(np.asarray(experts, np.int32), (chunk, width))
    seconds = []
    for _ in range(repeats + 1):  # the first one compiles
        began = time.perf_counter()
        caller.state, *_ = programs.prefill(
            caller.state, 0, tokens, 0, routes, np.ones((chunk, width), np.float32), experts, weights, last=True
        )
        jax.block_until_ready(caller.state.token)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
