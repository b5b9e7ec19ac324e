"""Bringing experts to the device for calls: the policy's residents in slots, what else a call needs beside them.

The cache (`expert_cache.py`) decides which experts stay; here its decisions become copies. A call takes the arrays of
all its experts as arguments, so a step that needs more than slots and staging hold runs as several calls, one group
after another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax

from readme_jax.serving.expert_cache import ExpertCache
from readme_jax.serving.store import ExpertStore

Experts = frozenset[int]


class Residency:
    """A store that follows a cache's decisions."""

    def __init__(
        self,
        store: ExpertStore,
        cache: ExpertCache | None,
        prefetch: bool = True,
        load_seconds: float | None = None,
    ) -> None:
        """`cache` None: everything is resident. Without `prefetch` a load begins only when the step before has ended,
        and the step that needs it waits for it. `load_seconds` that one expert of all layers takes to arrive: what
        background swaps are weighed with; None: there are none."""
        self.store, self.cache, self.prefetch, self.load_seconds = store, cache, prefetch, load_seconds
        self._everything = frozenset(range(store.num_experts))
        self._slotted: set[int] = set()  # experts in slots; others on the device are in staging

    @property
    def capacity(self) -> int:
        """Most experts of one call."""
        return max(self.store.num_experts, 1) if self.cache is None else self.store.slots + self.store.staging

    @property
    def resident(self) -> Experts:
        """Experts on the device that the policy means to keep."""
        return self._everything if self.cache is None else self.cache.resident

    @property
    def here(self) -> Experts:
        """Experts on the device now."""
        return self._everything if self.cache is None else self.store.on_device()

    def decide(self, needed: Experts, future: Iterable[int] = ()) -> None:
        """Let the policy decide on a batch's experts; `future`: those of later batches as bit masks."""
        if self.cache is not None and needed:
            self.cache.step(needed, future)

    @property
    def swaps(self) -> bool:
        """Whether residents are swapped in the background."""
        return self.cache is not None and self.load_seconds is not None and self.cache.staging > 0

    def swap(self, waiting: Sequence[float], active: Sequence[float]) -> None:
        """Finish the swap under way once its copies are here, or begin one where it pays: see `ExpertCache.swap`."""
        if not self.swaps:
            return
        assert self.cache is not None and self.load_seconds is not None
        if self.cache.swapping is None:
            move = self.cache.swap(waiting, active, self.load_seconds)
            if move is None:
                return
            self._drop(move.victim)
        assert self.cache.swapping is not None
        expert = self.cache.swapping.expert
        if expert not in self.here:
            self._make_room(1, frozenset((expert,)), frozenset())
            self._fetch(expert)
        elif expert not in self._slotted and len(self._slotted) < self.store.slots:
            self._fetch(expert)  # takes the staged copy over
        if self.store.arrived(expert):
            self.cache.finish_swap()

    def groups(self, needs: Sequence[Experts]) -> list[list[int]]:
        """Indices of `needs` in groups whose experts fit on the device at once, those that need no load first."""
        here = self.here
        left = sorted(range(len(needs)), key=lambda i: (len(needs[i] - here), sorted(needs[i]), i))
        groups = []
        while left:
            group, union, after = [], frozenset[int](), []
            for i in left:
                if len(union | needs[i]) <= self.capacity:
                    group.append(i)
                    union |= needs[i]
                else:
                    after.append(i)
            groups.append(group)
            left = after
        return groups

    def bring(self, experts: Experts, later: Experts = frozenset(), running: object = None) -> None:
        """Have all of `experts` on the device in every layer. What `later` calls of the step need leaves last.

        `running`: arrays of the step in flight.
        """
        if self.cache is None:
            return
        missing = [e for e in sorted(experts) if e not in self.store.on_device()]
        if not missing:
            return
        if not self.prefetch:
            jax.block_until_ready(running)
        self._make_room(len(missing), experts, later)
        for expert in sorted(missing, key=lambda e: (e not in self.resident, e)):
            self._fetch(expert)
        if not self.prefetch:
            jax.block_until_ready(self.store.present(missing))

    def _fetch(self, expert: int) -> None:
        """Start the copies of an expert, into slots while there are any."""
        slotted = len(self._slotted) < self.store.slots
        if slotted:
            self._slotted.add(expert)
        for layer in range(self.store.num_layers):
            (self.store.load if slotted else self.store.stage)(layer, expert)

    def _drop(self, expert: int) -> None:
        self._slotted.discard(expert)
        for layer in range(self.store.num_layers):
            self.store.drop(layer, expert)

    def _make_room(self, places: int, experts: Experts, later: Experts) -> None:
        """Drop what the call does not need until so many more fit: what streamed first, residents last."""
        assert self.cache is not None
        coming = self.cache.swapping
        resident = self.resident if coming is None else self.resident | {coming.expert}
        spare = [e for e in self.store.on_device() if e not in experts]
        spare.sort(key=lambda e: (e in later, e in resident, e))
        while spare and len(self.store.on_device()) + places > self.capacity:
            self._drop(spare.pop(0))
