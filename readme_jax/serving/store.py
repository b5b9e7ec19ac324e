"""Where experts' weights lie: one array a layer, expert and projection, on the device or waiting in host memory.

Every argument of a compiled step lies in device memory; with slots, host copies wait in `pinned_host` and travel by
`device_put`, which returns at once. An expert travels span by span: a span is the layers that one call runs. On the
device there are k places for experts in every span, and a ring of some more that all spans share. A place whose expert
was dropped is taken by another one once the calls that were given the old one have run: so the places are all that
experts ever take. Which experts come and go is not decided here.

On a mesh every device holds a part of each array (`spread.py`). Where devices share the experts, all are resident, and
what a call is given is put together from the arrays of each device's experts: an entry is one expert on every device.

# L layers, E experts, k slots a layer, D model width, d expert width, X devices that share the experts
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax import config
from readme_jax.checkpoints.hf import Dense
from readme_jax.checkpoints.mixture import Mixture
from readme_jax.errors import ConfigError
from readme_jax.models.segments import Expert
from readme_jax.parallel.mesh import make_mesh
from readme_jax.serving.buckets import padded, spans_of
from readme_jax.serving.spread import Axes, Spread, join

Params = Mapping[str, Any]
PARTS = ("gate", "up", "down")
AXES = {"gate": 0, "up": 0, "down": 1}  # where each has its width
JOINED = 256  # choices of experts, or of one on every device, whose arrays are kept put together
IN_FLIGHT = 2  # spans at a time that the ring has room for: one that runs, one whose experts arrive


class Place(NamedTuple):
    """Room for an expert in the layers of a span: what it held (None: nothing yet), and a result of the last call that
    was given that (None: no call)."""

    held: list[Expert] | None = None
    fence: jax.Array | None = None


class ExpertStore:
    """The feed-forward weights of a model: the permanent part always on the device, experts in places.

    `permanent` has an entry a layer: the part every token runs (of a dense model all of it), or None.
    `spans` are the layers that a call runs where experts stream. `places` is how many experts of a span the device has
    room for. `loads` and `bytes_loaded` count copies from host to device since the start; `expert_bytes` is one of
    them, an expert of a layer, and `like` the abstract arrays of an entry of `present` (None: a dense model).
    """

    def __init__(
        self,
        model: Dense | Mixture,
        slots: int | None = None,
        staging: int = 0,
        dtype: Any = jnp.float32,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        """Place a model's feed-forward weights on `mesh` (default: the first device). Tied mixtures get arrays of their
        own.

        `slots` k a layer (None, or E and more: all resident and no host copies) and `staging` more for those that
        stream through a span. Raises ConfigError when a token's experts do not fit, or slots are to hold experts that
        devices share.
        """
        mixture = model.mixture if isinstance(model, Mixture) else None
        self.num_layers = model.config.num_layers
        self.num_experts = mixture.num_experts if mixture else 0
        self.top_k = mixture.top_k if mixture else 0
        self.resident = slots is None or slots >= self.num_experts
        self.slots = self.num_experts if slots is None or self.resident else slots
        self.staging = 0 if self.resident else min(staging, self.num_experts - self.slots)
        if mixture and self.slots + self.staging < mixture.top_k:
            raise ConfigError(f"slots {slots} and staging {staging}: a token needs {mixture.top_k} experts at once")
        mesh = make_mesh(config.Mesh(), jax.devices()[:1]) if mesh is None else mesh
        self.spread = Spread(mesh, model.config)
        self.ways = self.spread.experts if mixture else 1
        if self.ways > 1 and not self.resident:
            raise ConfigError(f"slots {slots} and Mesh.expert = {self.ways}: devices that share experts hold all")
        self.loads, self.bytes_loaded = 0, 0
        self._joined: dict[tuple[int, ...], list[Expert]] = {}
        self._given: dict[tuple[tuple[int, ...], int | None], list[list[Expert]]] = {}  # by what `present` was asked
        self.spans = spans_of(self.num_layers)
        self._on_device: list[dict[int, list[Expert]]] = [{} for _ in self.spans]
        self._waiting: list[dict[int, list[Expert]]] = [{} for _ in self.spans]
        self.places = len(self.spans) * self.slots + IN_FLIGHT * self.staging
        self._free = deque([Place()] * self.places)  # to be taken, longest dropped first
        self._fences: list[jax.Array | None] = [None] * len(self.spans)  # of the last call that ran each span
        self.permanent: list[Expert | None] = []
        home = self._on_device if self.resident else self._waiting
        kind = "device" if self.resident else "pinned_host"
        for i in range(self.num_layers):
            name = f"layers_{i}"
            p = model.params[name]
            channels = model.channels[name] if isinstance(model, Mixture) and mixture and mixture.tied else None
            always = _permanent(p, channels, mixture)
            self.permanent.append(None if always is None else _place(always, dtype, self.spread, self.spread.every))
            for e in range(self.num_experts):
                part = p[f"experts_{e}"] if channels is None else _rows(p["ffn"], channels["experts"][e])
                holders = self.spread.holders(e // self.each)
                placed = _place(part, dtype, holders, holders.width, kind)
                home[i // self.span_layers].setdefault(e, []).append(placed)
        first = home[0][0][0] if self.num_experts else None
        self.expert_bytes = sum(w.nbytes for w in first or ())
        self.like = None if first is None else self._entry(first)
        self._idle = self._without_experts(first, dtype)

    @property
    def each(self) -> int:
        """Experts a device."""
        return -(-self.num_experts // self.ways)

    @property
    def span_layers(self) -> int:
        """Layers of a span."""
        return self.spans[0].stop

    def load(self, span: int, expert: int) -> None:
        """Start the copy of an expert into the layers of a span; nothing where it is there already.

        Waits for `fence`. Raises ConfigError when no place is free.
        """
        if expert in self._on_device[span]:
            return
        self.wait(self.fence)
        self._free.popleft()
        self.loads += self.span_layers
        self.bytes_loaded += self.span_layers * self.expert_bytes
        self._given.clear()
        self._on_device[span][expert] = self._copy(span, expert)

    @property
    def fence(self) -> jax.Array | None:
        """A result of the last call that was given what the place longest free held: the next load waits for it."""
        if not self._free:
            raise ConfigError(f"all {self.places} places for experts are taken; drop one first")
        return self._free[0].fence

    def drop(self, span: int, expert: int) -> None:
        """Free the place of an expert in a span; nothing where it has none."""
        if self.resident:
            raise ConfigError("all experts are resident: none is dropped")
        held = self._on_device[span].pop(expert, None)
        if held is not None:
            self._given.clear()
            self._free.append(Place(held, self._fences[span]))

    def clear(self) -> None:
        """Free all places, whatever became of the calls that were given what they held."""
        for held in self._on_device:
            held.clear()
        self._given.clear()
        self._free = deque([Place()] * self.places)
        self._fences = [None] * len(self.spans)

    def used(self, span: int, done: jax.Array | None) -> None:
        """A call was given experts of a span; `done` is a result of it that nothing uses up."""
        self._fences[span] = done

    def on_device(self, span: int = 0) -> frozenset[int]:
        """Experts with a place in a span."""
        return frozenset(self._on_device[span])

    def arrays(self, span: int, expert: int) -> list[Expert]:
        """An expert in the layers of a span, on the device or on its way there."""
        return self._on_device[span][expert]

    def arrived(self, expert: int) -> bool:
        """Whether an expert is on the device in all layers, no copy still on its way."""
        return all(expert in held and self.ready(held[expert]) for held in self._on_device)

    def ready(self, arrays: Any) -> bool:
        """Whether all arrays of a tree have been computed, or have arrived."""
        return all(a.is_ready() for a in jax.tree.leaves(arrays))

    def wait(self, arrays: Any) -> None:
        """Wait until all arrays of a tree have been computed, or have arrived."""
        jax.block_until_ready(arrays)

    def padded(self, experts: Sequence[int]) -> tuple[int, ...]:
        """The experts, repeated from the first on, up to a number that calls are compiled for; () for a dense model.

        Of X devices each has as many: its own of the experts, and where those are fewer E, which no token names.
        Raises ConfigError when none is given.
        """
        if not self.num_experts:
            return ()
        if not experts:
            raise ConfigError("no experts: give those that the rows need")
        return padded(tuple(experts), self.num_experts, self.top_k, self.ways)

    def present(self, experts: Sequence[int], span: int | None = None) -> list[list[Expert]]:
        """An entry a layer, of a span or of all: the arrays of `experts` on the device, padded by repeating (see
        `padded`); where X devices share experts, each array is one expert on every device. Read only.

        Raises ConfigError when one of them is not on the device.
        """
        key = (tuple(experts), span)
        if key not in self._given:  # steps in a row ask for the same
            if len(self._given) >= JOINED:
                self._given.pop(next(iter(self._given)))
            self._given[key] = self._entries(self.padded(experts), span)
        return self._given[key]

    def device_bytes(self) -> int:
        """Bytes of feed-forward weights on the device, copies on their way and places not yet used again included."""
        held = [p for p in self.permanent if p is not None]
        held += [w for span in self._on_device for layers in span.values() for w in layers]
        held += [w for place in self._free for w in place.held or ()]
        return sum(w.nbytes for expert in held for w in expert)

    def _copy(self, span: int, expert: int) -> list[Expert]:
        waiting = self._waiting[span][expert]
        return jax.device_put(waiting, jax.tree.map(lambda w: w.sharding.with_memory_kind("device"), waiting))

    def _entries(self, order: tuple[int, ...], span: int | None) -> list[list[Expert]]:
        """What `present` gives, of padded experts."""
        if self.ways == 1:
            spans = range(len(self.spans)) if span is None else (span,)
            return [list(layer) for i in spans for layer in self._layers(i, order)]
        each = len(order) // self.ways
        layers = slice(None) if span is None else self.spans[span]
        entries = [self._together(order[at::each])[layers] for at in range(each)]
        return [list(layer) for layer in zip(*entries, strict=True)]

    def _layers(self, span: int, order: Sequence[int]) -> list[tuple[Expert, ...]]:
        held = self._on_device[span]
        absent = [e for e in order if e not in held]
        if absent:
            raise ConfigError(f"span {span}: expert {absent[0]} is not on the device; load it first")
        return list(zip(*(held[e] for e in order), strict=True)) if order else [()] * self.span_layers

    def _together(self, chosen: tuple[int, ...]) -> list[Expert]:
        """Of each layer: an expert of every device, E for any, as one array each."""
        assert self.like is not None
        if chosen not in self._joined:
            if len(self._joined) >= JOINED:
                self._joined.pop(next(iter(self._joined)))
            layers = [[self._held(i, device, e) for device, e in enumerate(chosen)] for i in range(self.num_layers)]
            self._joined[chosen] = [Expert(*map(join, zip(*parts, strict=True), self.like)) for parts in layers]
        return self._joined[chosen]

    def _held(self, layer: int, device: int, expert: int) -> Expert:
        """An expert of a device, or its first one for E."""
        expert = expert if expert < self.num_experts else device * self.each
        if expert >= self.num_experts:
            return self._idle[device]
        span, at = divmod(layer, self.span_layers)
        return self._on_device[span][expert][at]

    def _entry(self, expert: Expert) -> Expert:
        """The abstract arrays of an entry of `present`."""
        axes = ("expert", *self.spread.width) if self.ways > 1 else self.spread.width

        def one(name: str, w: jax.Array) -> Any:
            shape = [n * self.ways if at == AXES[name] else n for at, n in enumerate(w.shape)]
            return jax.ShapeDtypeStruct(tuple(shape), w.dtype, sharding=self.spread.sharding(*_cut(name, axes)))

        return Expert(*(one(n, w) for n, w in zip(PARTS, expert, strict=True)))

    def _without_experts(self, like: Expert | None, dtype: Any) -> dict[int, Expert]:
        """Zeros in place of an expert, for devices that hold none because E does not divide."""
        if like is None:
            return {}
        zeros = {n: np.zeros(w.shape) for n, w in zip(PARTS, like, strict=True)}
        empty = [d for d in range(self.ways) if d * self.each >= self.num_experts]
        return {d: _place(zeros, dtype, self.spread.holders(d), self.spread.width) for d in empty}


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


def _place(part: Params, dtype: Any, spread: Spread, axes: Axes, kind: str = "device") -> Expert:
    """A feed-forward part, its width cut over axes."""
    return Expert(*(spread.put(part[n], dtype, *_cut(n, axes), kind=kind) for n in PARTS))


def _cut(name: str, axes: Axes) -> tuple[Axes, ...]:
    """Axes of each dimension of gate, up or down."""
    return ((),) * AXES[name] + (axes,)
