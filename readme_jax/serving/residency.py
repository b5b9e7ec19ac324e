"""Bringing experts to the device for calls: the policy's residents in slots, what else a call needs beside them.

The cache (`expert_cache.py`) decides which experts stay; here its decisions become copies. A call takes the arrays of
all its experts as arguments, so a step that needs more than slots and staging hold runs as several calls, one group
after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from readme_jax.serving.buckets import bucket, present_buckets
from readme_jax.serving.expert_cache import ExpertCache, Plan

Experts = frozenset[int]


class Store(Protocol):
    """Where experts lie, layer by layer: `store.ExpertStore` with their arrays, `Places` without."""

    num_layers: int
    num_experts: int
    slots: int
    staging: int
    resident: bool

    def load(self, layer: int, expert: int) -> None:
        """Start to bring an expert into a free slot."""

    def stage(self, layer: int, expert: int) -> None:
        """Start to bring an expert into a free staging slot."""

    def drop(self, layer: int, expert: int) -> None:
        """Forget the copy of an expert on the device."""

    def on_device(self, layer: int = 0) -> Experts:
        """Experts on the device or on their way there."""

    def arrived(self, expert: int) -> bool:
        """Whether an expert is whole on the device, in every layer."""

    def padded(self, experts: Sequence[int]) -> tuple[int, ...]:
        """Experts, repeated up to a number that calls are compiled for."""

    def wait(self, experts: Sequence[int] = (), arrays: Any = None) -> None:
        """Wait until experts have arrived, and for arrays."""


class Places:
    """A `Store` of places alone, for simulation. `coming`: an expert that has not arrived, by the simulated link."""

    num_layers = 1

    def __init__(self, experts: int, slots: int, staging: int, top_k: int = 1) -> None:
        self.num_experts, self.top_k = experts, top_k
        self.resident = not 0 < slots < experts
        self.slots, self.staging = (experts, 0) if self.resident else (slots, staging)
        self.coming: int | None = None
        self._slots = set(range(experts)) if self.resident else set[int]()
        self._staged: set[int] = set()

    def load(self, layer: int, expert: int) -> None:
        """See `Store.load`; a staged copy is taken over."""
        self._staged.discard(expert)
        self._slots.add(expert)

    def stage(self, layer: int, expert: int) -> None:
        """See `Store.stage`."""
        self._staged.add(expert)

    def drop(self, layer: int, expert: int) -> None:
        """See `Store.drop`."""
        self._slots.discard(expert)
        self._staged.discard(expert)

    def on_device(self, layer: int = 0) -> Experts:
        """See `Store.on_device`."""
        return frozenset(self._slots | self._staged)

    def arrived(self, expert: int) -> bool:
        """See `Store.arrived`."""
        return expert != self.coming and expert in self.on_device()

    def padded(self, experts: Sequence[int]) -> tuple[int, ...]:
        """See `Store.padded`."""
        size = bucket(len(experts), present_buckets(self.num_experts, self.top_k), "experts")
        return (*experts, *(tuple(experts[:1]) * (size - len(experts))))

    def wait(self, experts: Sequence[int] = (), arrays: Any = None) -> None:
        """Nothing to wait for: seconds are the simulation's to count."""


class Swapped(NamedTuple):
    """What became of background swaps at one look: the one under way has arrived; another one has begun."""

    arrived: bool
    began: bool


S = TypeVar("S", bound=Store)


class Residency(Generic[S]):
    """A store that follows a cache's decisions."""

    def __init__(
        self,
        store: S,
        cache: ExpertCache | None,
        prefetch: bool = True,
        load_seconds: float | None = None,
    ) -> None:
        """`cache` None: everything is resident. Without `prefetch` a load begins only when the step before has ended,
        and the step that needs it waits for it. `load_seconds` that one expert of all layers takes to arrive: what
        background swaps are weighed with, and lateness; None: there are none."""
        self.store, self.cache, self.prefetch, self.load_seconds = store, cache, prefetch, load_seconds
        self.plan: Plan | None = None  # of the last batch
        self.foreseen = self.late = 0  # see `due`
        self._awaited: list[int] | None = []  # experts on their way to the first call of a step
        self._decided = 0.0  # when
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

    def decide(self, needed: Experts, future: Iterable[int] = (), now: float = 0.0) -> None:
        """Let the policy decide on a batch's experts at `now`; `future`: those of later batches as bit masks."""
        self._awaited, self._decided = None, now
        if self.cache is not None and needed:
            self.plan = self.cache.step(needed, future)

    def due(self, now: float) -> None:
        """The step last decided on may begin to compute: count its loads that are late.

        `foreseen`: loads for its first call that were decided on at least one load time ago; `late`: those of them that
        have not arrived. Routes are exact, so that no load is ever wrong.
        """
        experts, self._awaited = self._awaited or [], []
        if self.load_seconds is None or now - self._decided < self.load_seconds:
            return
        self.foreseen += len(experts)
        self.late += sum(not self.store.arrived(e) for e in experts)

    @property
    def swaps(self) -> bool:
        """Whether residents are swapped in the background."""
        return self.cache is not None and self.load_seconds is not None and self.cache.staging > 0

    def swap(self, waiting: Sequence[float], active: Sequence[float]) -> Swapped:
        """Finish the swap under way once its copies are here, or begin one where it pays: see `ExpertCache.swap`.

        Not both at once: the expert that has arrived serves a step before it may leave.
        """
        if not self.swaps:
            return Swapped(False, False)
        assert self.cache is not None and self.load_seconds is not None
        if self.cache.swapping is not None:
            arrived = self._arriving(self.cache.swapping.expert)
            if arrived:
                self.cache.finish_swap()
            return Swapped(arrived, False)
        move = self.cache.swap(waiting, active, self.load_seconds)
        if move is None:
            return Swapped(False, False)
        self._drop(move.victim)
        self._arriving(move.expert)
        return Swapped(False, True)

    def _arriving(self, expert: int) -> bool:
        """Have an expert on its way into a slot; whether it is there."""
        if expert not in self.here:
            self._make_room(1, frozenset((expert,)), frozenset())
            self._fetch(expert)
        elif expert not in self._slotted and len(self._slotted) < self.store.slots:
            self._fetch(expert)  # takes the staged copy over
        return self.store.arrived(expert)

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

    def bring(self, experts: Experts, later: Experts = frozenset(), running: Callable[[], Any] = lambda: None) -> None:
        """Have all of `experts` on the device in every layer. What `later` calls of the step need leaves last.

        `running`: the arrays of the step in flight.
        """
        if self.cache is None:
            return
        here = self.store.on_device()
        missing = [e for e in sorted(experts) if e not in here]
        if self._awaited is None:
            self._awaited = missing
        if not missing:
            return
        if not self.prefetch:
            self.store.wait((), running())
        self._make_room(len(missing), experts, later)
        for expert in sorted(missing, key=lambda e: (e not in self.resident, e)):
            self._fetch(expert)
        if not self.prefetch:
            self.store.wait(missing)

    def forget_streamed(self) -> None:
        """Drop what is on the device but no resident."""
        for expert in self.here - self.resident:
            self._drop(expert)

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
