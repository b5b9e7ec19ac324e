"""Where experts' weights lie: one array a layer, expert and projection, on the device or waiting in host memory.

Every argument of a compiled step lies in device memory; with slots, host copies wait in `pinned_host` and travel by
`device_put`, which returns at once. Dropping an expert that a step still in flight was given is safe: the runtime
holds the arrays until the step ends. Which experts come and go is not decided here.

# L layers, E experts, k slots a layer, D model width, d expert width
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from readme_jax.checkpoints.hf import Dense
from readme_jax.checkpoints.mixture import Mixture
from readme_jax.errors import ConfigError
from readme_jax.models.segments import Expert
from readme_jax.serving.buckets import bucket, present_buckets

Params = Mapping[str, Any]
PARTS = ("gate", "up", "down")


class ExpertStore:
    """The feed-forward weights of a model: the permanent part always on the device, experts in slots.

    `permanent` has an entry a layer: the part every token runs (of a dense model all of it), or None.
    `loads` and `bytes_loaded` count copies from host to device since the start; `expert_bytes` is one of them, an
    expert of a layer, and `like` its abstract arrays (None: a dense model).
    """

    def __init__(
        self,
        model: Dense | Mixture,
        slots: int | None = None,
        staging: int = 0,
        dtype: Any = jnp.float32,
        device: jax.Device | None = None,
    ) -> None:
        """Place a model's feed-forward weights. Tied mixtures get arrays of their own.

        `slots` k a layer (None, or E and more: all resident and no host copies) and `staging` more a layer, which hold
        experts that stream through. Raises ConfigError when a token's experts do not fit.
        """
        mixture = model.mixture if isinstance(model, Mixture) else None
        self.num_layers = model.config.num_layers
        self.num_experts = mixture.num_experts if mixture else 0
        self.top_k = mixture.top_k if mixture else 0
        self.resident = slots is None or slots >= self.num_experts
        self.slots = self.num_experts if slots is None or self.resident else slots
        self.staging = 0 if self.resident else staging
        if mixture and self.slots + self.staging < mixture.top_k:
            raise ConfigError(f"slots {slots} and staging {staging}: a token needs {mixture.top_k} experts at once")
        self.loads, self.bytes_loaded = 0, 0
        device = device or jax.devices()[0]
        self._device = SingleDeviceSharding(device, memory_kind="device")
        self._host = SingleDeviceSharding(device, memory_kind="pinned_host")
        self._on_device: list[dict[int, Expert]] = [{} for _ in range(self.num_layers)]
        self._waiting: list[dict[int, Expert]] = [{} for _ in range(self.num_layers)]
        self._staged: list[dict[int, Expert]] = [{} for _ in range(self.num_layers)]  # oldest first
        self.permanent: list[Expert | None] = []
        home = self._on_device if self.resident else self._waiting
        sharding = self._device if self.resident else self._host
        for i in range(self.num_layers):
            name = f"layers_{i}"
            p = model.params[name]
            channels = model.channels[name] if isinstance(model, Mixture) and mixture and mixture.tied else None
            self.permanent.append(_place(_permanent(p, channels, mixture), dtype, self._device))
            for e in range(self.num_experts):
                part = p[f"experts_{e}"] if channels is None else _rows(p["ffn"], channels["experts"][e])
                placed = _place(part, dtype, sharding)
                assert placed is not None
                home[i][e] = placed
        first = home[0].get(0)
        self.like = None if first is None else jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), first)
        self.expert_bytes = sum(w.nbytes for w in first or ())

    def load(self, layer: int, expert: int) -> None:
        """Start the copy of an expert of a layer into a slot; nothing where it already has one.

        A staged copy is taken over. Raises ConfigError when all k slots of the layer are taken.
        """
        if expert in self._on_device[layer]:
            return
        if len(self._on_device[layer]) >= self.slots:
            raise ConfigError(f"layer {layer}: all {self.slots} slots are taken; drop an expert first")
        staged = self._staged[layer].pop(expert, None)
        self._on_device[layer][expert] = staged or self._copy(layer, expert)

    def stage(self, layer: int, expert: int) -> None:
        """Start the copy of an expert of a layer into the ring of staging slots, in place of its oldest; nothing where
        it is on the device. Raises ConfigError when there is no staging."""
        if not self.staging:
            raise ConfigError("staging 0: nothing can stream")
        if expert in self._on_device[layer] or expert in self._staged[layer]:
            return
        if len(self._staged[layer]) >= self.staging:
            del self._staged[layer][next(iter(self._staged[layer]))]
        self._staged[layer][expert] = self._copy(layer, expert)

    def drop(self, layer: int, expert: int) -> None:
        """Free an expert's slot or staging slot in a layer."""
        if self.resident:
            raise ConfigError("all experts are resident: none is dropped")
        self._on_device[layer].pop(expert, None)
        self._staged[layer].pop(expert, None)

    def on_device(self, layer: int = 0) -> frozenset[int]:
        """Experts of a layer in slots or staging slots."""
        return frozenset(self._on_device[layer]) | frozenset(self._staged[layer])

    def arrived(self, expert: int) -> bool:
        """Whether an expert's copies are on the device in every layer, none still on its way."""
        held = [self._on_device[i].get(expert) or self._staged[i].get(expert) for i in range(self.num_layers)]
        return all(w is not None and all(a.is_ready() for a in w) for w in held)  # type: ignore[attr-defined]

    def wait(self, experts: Sequence[int] = (), arrays: Any = None) -> None:
        """Wait until experts have arrived, and for arrays."""
        jax.block_until_ready((arrays, [self._get(i, e) for e in experts for i in range(self.num_layers)]))

    def padded(self, experts: Sequence[int]) -> tuple[int, ...]:
        """The experts, repeated from the first on, up to a number that calls are compiled for; () for a dense model.

        Raises ConfigError when none is given.
        """
        if not self.num_experts:
            return ()
        if not experts:
            raise ConfigError("no experts: give those that the rows need")
        size = bucket(len(experts), present_buckets(self.num_experts, self.top_k), "experts")
        return (*experts, *(tuple(experts[:1]) * (size - len(experts))))

    def present(self, experts: Sequence[int]) -> list[list[Expert]]:
        """An entry a layer: the arrays of `experts` on the device, padded by repeating (see `padded`).

        Raises ConfigError when one of them is on the device in no slot.
        """
        order = self.padded(experts)
        return [[self._get(i, e) for e in order] for i in range(self.num_layers)]

    def device_bytes(self) -> int:
        """Bytes of feed-forward weights on the device, copies on their way included."""
        held = [p for p in self.permanent if p is not None]
        held += [w for layer in (*self._on_device, *self._staged) for w in layer.values()]
        return sum(w.nbytes for expert in held for w in expert)

    def _copy(self, layer: int, expert: int) -> Expert:
        self.loads += 1
        self.bytes_loaded += self.expert_bytes
        return jax.device_put(self._waiting[layer][expert], self._device)

    def _get(self, layer: int, expert: int) -> Expert:
        found = self._on_device[layer].get(expert) or self._staged[layer].get(expert)
        if found is None:
            raise ConfigError(f"layer {layer}: expert {expert} is not on the device; load it first")
        return found


def _permanent(p: Params, channels: Params | None, mixture: Any) -> Params | None:
    if mixture is None:
        return p["ffn"]
    if not mixture.permanent:
        return None
    return p["permanent"] if channels is None else _rows(p["ffn"], channels["permanent"])


def _rows(ffn: Params, rows: Any) -> dict[str, np.ndarray]:
    """Channels `rows` [d] of a dense FFN on the host; rows out of range (padding) are zero channels."""
    rows = np.asarray(rows)
    gate, up, down = (np.asarray(ffn[n]) for n in PARTS)
    real = rows < gate.shape[0]
    at = np.where(real, rows, 0)
    take: Callable[[np.ndarray], np.ndarray] = lambda w: np.where(real[:, None], w[at], 0)  # noqa: E731
    return {"gate": take(gate), "up": take(up), "down": np.where(real[None], down[:, at], 0)}


def _place(part: Params | None, dtype: Any, sharding: SingleDeviceSharding) -> Expert | None:
    if part is None:
        return None
    return Expert(*(jax.device_put(jnp.asarray(part[n], dtype), sharding) for n in PARTS))
