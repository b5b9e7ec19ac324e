"""Device memory of serving: what an engine's arrays should take, and what its calls take at their peak.

# L layers, E experts, k slots a layer, R rows, S tokens a row
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from readme_jax.serving.programs import Programs


class Footprint(NamedTuple):
    """Bytes on the device, or on all together, that an engine needs: weights that are always there (the permanent part
    included), the experts of all slots and of the ring, and the caches of R rows of S tokens."""

    weights: int
    experts: int
    caches: int

    @property
    def total(self) -> int:
        return sum(self)


def footprint(programs: Programs) -> Footprint:
    """What an engine over these programs and their store needs, known before anything runs."""
    store = programs.store
    held = min(store.places, store.num_experts * len(store.spans)) * store.span_layers
    mesh, state = programs.mesh, jax.tree.leaves(programs.abstract_state())
    caches = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize * mesh.size for x in state)
    return Footprint(_bytes_of(programs.weights), held * store.expert_bytes * mesh.shape["data"], caches)


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
