"""A real engine over a scripted model on the device: programs compiled once, a store and an engine for each run."""

from __future__ import annotations

import gc
import time
import weakref
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _model import EXPERTS, marks, model_of, scripted

from readme_jax import config
from readme_jax.checkpoints.mixture import Mixture
from readme_jax.config import ModelConfig
from readme_jax.models.runtime import runtime_for
from readme_jax.serving.buckets import Limits
from readme_jax.serving.build import measure, residency_of, slots_of
from readme_jax.serving.calls import Caller
from readme_jax.serving.cost import Costs
from readme_jax.serving.engine import Engine
from readme_jax.serving.footprint import check_room, device_room, footprint
from readme_jax.serving.loop import Logged
from readme_jax.serving.programs import Programs
from readme_jax.serving.request import Request, SamplingParams
from readme_jax.serving.scheduler import make_scheduler
from readme_jax.serving.store import ExpertStore


class Served:
    """A scripted mixture, its programs, and engines over them, one at a time. All layers' weights wait in pinned host
    memory. Raises ConfigError before anything is compiled where the device has no room."""

    def __init__(self, c: ModelConfig, experts: np.ndarray, limits: Limits) -> None:
        model = model_of(c, EXPERTS)
        assert isinstance(model, Mixture)
        self.experts, self.limits = experts, limits
        self.model = _layers_on_host(scripted(model, experts))
        del model
        gc.collect()
        self.runtime = replace(runtime_for(config.Model(compute_dtype="bfloat16")), decode="kernel", segments="kernel")
        store = ExpertStore(self.model, dtype=self.runtime.dtype)
        self.programs = Programs(self.model, store, limits, self.runtime)
        self._engine: weakref.ref[Engine] | None = None
        self._check_room()
        self.programs.warm_up()
        self.costs = measure(Caller(self.programs, residency_of(store, self.settings("decode_first"))))

    def follow(self, experts: np.ndarray) -> None:
        """Route by another script [V] from the next engine on."""
        router = self.programs.weights.router
        assert router is not None
        embed = marks(experts, router["embed"].shape[1])
        self.programs.weights = self.programs.weights._replace(router={**router, "embed": embed})
        self.experts = experts

    def settings(self, scheduler: Any, slots: int = 0, staging: int = 0, prefetch: bool = True) -> config.Serving:
        """Of one run. Without `prefetch` loads begin when they are needed, and steps are not dispatched ahead."""
        return config.Serving(
            rows=self.limits.rows,
            length=self.limits.length,
            chunk=self.limits.chunks[-1],
            budget=self.limits.chunks[-1],
            queue=100_000,
            scheduler=scheduler,
            slots=slots,
            staging=staging if 0 < slots < EXPERTS else 0,
            prefetch=prefetch,
            ahead=prefetch,
            compute_dtype="bfloat16",
        )

    def engine(self, settings: config.Serving, log: list[Logged]) -> Engine:
        """An engine of a store of its own, which takes the place of the last one's: let go of that engine first."""
        self.programs.store = None  # type: ignore[assignment]  # its experts leave the device first
        gc.collect()
        if self._engine is not None and self._engine() is not None:
            raise RuntimeError("the last engine is alive: its caches and experts beside new ones do not fit")
        store = ExpertStore(
            self.model, slots_of(self.model, settings, self.runtime.dtype), settings.staging, self.runtime.dtype
        )
        self.programs.store = store
        self._check_room()
        self.programs.warm_up()
        residency = residency_of(store, settings)
        costs = Costs(self.costs.fixed, self.costs.token, self.costs.expert, residency.load_seconds or 0.0)
        scheduler = make_scheduler(settings.scheduler, settings.budget, costs, store.num_experts)
        caller = Caller(self.programs, residency)
        engine = Engine(caller, scheduler, settings, self.model.config.vocab_size, None, step_log=log.append)
        self._engine = weakref.ref(engine)
        return engine

    def _check_room(self) -> None:
        needed, room = footprint(self.programs), device_room(self.programs.mesh)
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in needed._asdict().items())
        of = "" if room is None else f" of {room / 1e9:.1f}"
        print(f"predicted: {needed.most / 1e9:.1f}{of} GB: {parts}; temporaries beside", flush=True)
        check_room(self.programs)

    def temporaries(self) -> int:
        """Bytes of the compiled call that takes most beside its arguments and results."""
        return max(p.memory_analysis().temp_size_in_bytes for p in self.programs._programs.values())  # type: ignore[attr-defined]

    def prompt(self, place: int, tokens: int) -> list[int]:
        """A prompt at a place of the script; its answer goes on from there."""
        return list(range(place, place + tokens))

    def held_bytes(self) -> int:
        """Bytes of the arrays in device memory."""
        alive = [x for x in jax.live_arrays() if not x.is_deleted() and x.sharding.memory_kind == "device"]
        return sum({x.unsafe_buffer_pointer(): x.nbytes for x in alive}.values())


def _layers_on_host(model: Mixture) -> Mixture:
    """Programs have weights of their own on the device, some of them fused."""
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    params = dict(model.params)
    for i in range(model.config.num_layers):
        params[f"layers_{i}"] = jax.block_until_ready(jax.device_put(params[f"layers_{i}"], host))
    return replace(model, params=params)


def generate(engine: Engine, prompts: list[list[int]], tokens: int, warm: int) -> list[float]:
    """Serve prompts at once, each answered by `tokens` tokens, which must follow the script. Seconds of the engine's
    steps after the first `warm` of them."""
    handles = [
        engine.submit(Request(p, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True))) for p in prompts
    ]
    times = []
    while engine._loop.busy or engine._inbox:
        began = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - began)
    for prompt, handle in zip(prompts, handles, strict=True):
        wanted = [(prompt[-1] + 1 + i) % engine.vocab_size for i in range(tokens)]
        if list(handle.result().tokens) != wanted:
            raise RuntimeError("an answer does not follow the script: routes are not those of the stream")
    jax.block_until_ready(jnp.zeros(()))
    return times[warm:-2] if warm else times
