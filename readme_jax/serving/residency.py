"""Which experts a step's calls find on the device: the policy's residents in slots, what else they need in passing.

The cache (`expert_cache.py`) decides which experts stay; here its decisions become moves, alike in every span of
layers. Calls of a step go through one span before the next, so an expert that streams is needed in one span at a time.
Pure Python: `streams.py` makes the moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from readme_jax.serving.buckets import padded
from readme_jax.serving.expert_cache import ExpertCache, Plan

Experts = frozenset[int]


class Store(Protocol):
    """Where experts lie: `store.ExpertStore` with their arrays, `Places` without."""

    num_experts: int
    slots: int
    staging: int
    resident: bool

    def arrived(self, expert: int) -> bool:
        """Whether an expert is whole on the device, in every layer."""

    def padded(self, experts: Sequence[int]) -> tuple[int, ...]:
        """Experts, repeated up to a number that calls are compiled for."""


class Places:
    """A `Store` without arrays, for simulation. `coming`: an expert that has not arrived, by the simulated link."""

    def __init__(self, experts: int, slots: int, staging: int, top_k: int = 1) -> None:
        self.num_experts, self.top_k = experts, top_k
        self.resident = not 0 < slots < experts
        self.slots, self.staging = (experts, 0) if self.resident else (slots, staging)
        self.coming: int | None = None

    def arrived(self, expert: int) -> bool:
        """See `Store.arrived`."""
        return expert != self.coming

    def padded(self, experts: Sequence[int]) -> tuple[int, ...]:
        """See `Store.padded`."""
        return padded(tuple(experts), self.num_experts, self.top_k)


class Moves(NamedTuple):
    """What happens in each span at one point of a step: experts that leave, then experts that are brought."""

    drop: tuple[int, ...] = ()
    load: tuple[int, ...] = ()


class Swapped(NamedTuple):
    """What became of background swaps at one look: the one under way has arrived; another one has begun."""

    arrived: bool
    began: bool


S = TypeVar("S", bound=Store)


class Residency(Generic[S]):
    """The experts that each span holds between calls, as a cache decides. `held`: those, on the device or on their
    way; at most k between steps, and at most k + `staging` while a step is in a span."""

    def __init__(
        self,
        store: S,
        cache: ExpertCache | None,
        prefetch: bool = True,
        load_seconds: float | None = None,
    ) -> None:
        """`cache` None: everything is resident. Without `prefetch` a load begins only when the call before has ended,
        and the call that needs it waits for it, and nothing is swapped in the background. `load_seconds` that one
        expert of all layers takes to arrive: what swaps are weighed with, and lateness; None: there are none."""
        self.store, self.cache, self.prefetch, self.load_seconds = store, cache, prefetch, load_seconds
        self.plan: Plan | None = None  # of the last batch
        self._everything = frozenset(range(store.num_experts))
        self.held = self.resident

    @property
    def resident(self) -> Experts:
        """Experts that the policy means to keep on the device."""
        return self._everything if self.cache is None else self.cache.resident

    @property
    def here(self) -> Experts:
        """Experts that calls may be given without a load."""
        return self.held if self.cache is None or self.cache.swapping is None else self.held - {self.cache.swapping[0]}

    def decide(self, needed: Experts, future: Iterable[int] = ()) -> None:
        """Let the policy decide on a batch's experts; `future`: those of later batches as bit masks."""
        if self.cache is not None and needed:
            self.plan = self.cache.step(needed, future)

    # --- a step's calls --------------------------------------------------------------------------------------------

    def fit(self, experts: Experts, stay: bool = True) -> bool:
        """Whether one call can have all of `experts`, while the residents in slots stay or, without `stay`, at all."""
        held = self._staying if stay else frozenset()
        return self.cache is None or len(experts | held) <= self.store.slots + self.store.staging

    def group(self, needs: Sequence[Experts]) -> list[int]:
        """Indices of those of `needs` that one call takes together: as many as fit, those that load least first."""
        order = sorted(range(len(needs)), key=lambda i: (len(needs[i] - self.held), sorted(needs[i]), i))
        group, union = order[:1], needs[order[0]]
        for i in order[1:]:
            if self.fit(union | needs[i]):
                group.append(i)
                union |= needs[i]
        return sorted(group)

    def bring(self, experts: Experts, later: Iterable[int] = ()) -> Moves:
        """Moves after which a call can have all of `experts`. What `later` calls of the step need, soonest first and
        possibly again, leaves last, what is used soonest last of all; before them residents."""
        if self.cache is None:
            return Moves()
        missing = sorted(experts - self.held, key=lambda e: (e not in self.resident, e))
        over = len(self.held) + len(missing) - self.store.slots - self.store.staging
        keep, use = self._staying, {e: at for at, e in enumerate(dict.fromkeys(later))}
        spare = sorted(self.held - experts, key=lambda e: (-use.get(e, len(use)), e in keep, e))
        return self._move(spare[: max(over, 0)], missing)

    def settle(self) -> Moves:
        """Moves after a step's last call in a span: only what slots hold stays. A background swap's expert begins to
        arrive."""
        if self.cache is None:
            return Moves()
        swapping = self.cache.swapping
        coming = [] if swapping is None or swapping.expert in self.held else [swapping.expert]
        keep = self._staying
        over = len(self.held) + len(coming) - self.store.slots
        return self._move(sorted(self.held, key=lambda e: (e in keep, e))[: max(over, 0)], coming)

    @property
    def _staying(self) -> Experts:
        """What is held and meant to stay."""
        if self.cache is None or self.cache.swapping is None:
            return self.held & self.resident
        return self.held & (self.resident | {self.cache.swapping.expert})

    def _move(self, drop: Sequence[int], load: Sequence[int]) -> Moves:
        self.held = self.held - frozenset(drop) | frozenset(load)
        return Moves(tuple(drop), tuple(load))

    # --- background swaps --------------------------------------------------------------------------------------------

    @property
    def swaps(self) -> bool:
        """Whether residents are swapped in the background."""
        known = self.load_seconds is not None and self.prefetch
        return known and self.cache is not None and self.cache.staging > 0

    def swap(self, waiting: Sequence[float], active: Sequence[float]) -> Swapped:
        """Finish the swap under way once its copies are here, or begin one where it pays: see `ExpertCache.swap`.

        Not both at once: the expert that has arrived serves a step before it may leave.
        """
        if not self.swaps:
            return Swapped(False, False)
        assert self.cache is not None and self.load_seconds is not None
        swapping = self.cache.swapping
        if swapping is None:
            return Swapped(False, self.cache.swap(waiting, active, self.load_seconds) is not None)
        arrived = swapping.expert in self.held and self.store.arrived(swapping.expert)
        if arrived:
            self.cache.finish_swap()
        return Swapped(arrived, False)
