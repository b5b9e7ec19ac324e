"""Device memory of serving: what an engine's arrays should take, and what its calls take at their peak.

# L layers, E experts, k slots a layer, R rows, S tokens a row
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from readme_jax.errors import ConfigError
from readme_jax.serving.programs import Programs


class Footprint(NamedTuple):
    """Bytes on the device, or on all together, that an engine needs: weights that are always there (the permanent part
    included), the experts of all slots and of the ring, the caches of R rows of S tokens, and the router's of R prompts
    that wait for a row: at most, unlike the others."""

    weights: int
    experts: int
    caches: int
    waiting: int

    @property
    def total(self) -> int:
        """What is always there."""
        return self.weights + self.experts + self.caches

    @property
    def most(self) -> int:
        """What all arrays take at their most; the temporaries of a call come on top."""
        return self.total + self.waiting


def footprint(programs: Programs) -> Footprint:
    """What an engine over these programs and their store needs, known before anything runs."""
    store = programs.store
    held = min(store.places, store.num_experts * len(store.spans)) * store.span_layers
    mesh, state = programs.mesh, programs.abstract_state()

    def bytes_of(tree: Any) -> int:
        shards = ((x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in jax.tree.leaves(tree))
        return sum(math.prod(shape) * size * mesh.size for shape, size in shards)

    experts = held * store.expert_bytes * mesh.shape["data"]
    return Footprint(_bytes_of(programs.weights), experts, bytes_of(state), bytes_of(state.router))


def check_room(programs: Programs) -> None:
    """Raise ConfigError where the arrays that these programs serve with do not fit the devices; nothing on a platform
    that does not say how much memory it has, as a CPU."""
    room, needed = device_room(programs.mesh), footprint(programs)
    if room is not None and needed.most > room:
        weights, experts, caches, waiting = (f"{part / 1e9:.1f}" for part in needed)
        raise ConfigError(
            f"serving needs {needed.most / 1e9:.1f} GB of device memory: {weights} weights, {experts} experts, "
            f"{caches} caches of {programs.limits.rows} rows of {programs.limits.length} tokens, {waiting} the "
            f"router's of prompts that wait; there are {room / 1e9:.1f} GB: lower Serving.rows, length or slots"
        )


def device_room(mesh: jax.sharding.Mesh) -> int | None:
    """Bytes that arrays may take on all devices of a mesh together, or None where that is not known."""
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    limits = [s["bytes_limit"] for s in stats if "bytes_limit" in s]
    return min(limits) * mesh.size if limits else None


def device_bytes() -> int:
    """Bytes of all arrays of this process that are alive in device memory, of all devices together; two that share a
    buffer count once."""
    alive = [x for x in jax.live_arrays() if not x.is_deleted() and x.sharding.memory_kind == "device"]
    return _bytes_of(alive)


class Metered(Programs):
    """Programs that know the most device memory that any of their calls took, in bytes, as `peak`: arrays alive in
    this process while it ran, less `before` (those that are not the engine's), its temporaries, and its results as
    far as they do not take the place of arguments. Looking takes time: not while `metering` is off."""

    metering = True
    before = 0
    peak = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._beside: dict[tuple[Any, ...], int] = {}  # bytes of a program's temporaries and new results

    def program(self, name: str, *sizes: int) -> Callable[..., Any]:
        program, key = super().program(name, *sizes), (name, *sizes)
        if key not in self._beside:
            memory = program.memory_analysis()  # type: ignore[attr-defined]
            self._beside[key] = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes

        def call(*arguments: Any) -> Any:
            if self.metering:
                self.peak = max(self.peak, device_bytes() - self.before + self._beside[key])
            return program(*arguments)

        return call


def _bytes_of(tree: Any) -> int:
    shards = [s.data for x in jax.tree.leaves(tree) for s in x.addressable_shards]
    return sum({s.unsafe_buffer_pointer(): s.nbytes for s in shards}.values())
