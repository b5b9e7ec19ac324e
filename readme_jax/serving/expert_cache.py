"""Which experts stay on the device, which leave, and how the missing ones arrive.

Every layer routes alike, so one cache decides for all layers. Sets of experts are bit masks inside, frozensets at the
edge. Pure Python: the store moves the arrays, the simulator the clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from readme_jax.errors import ConfigError
from readme_jax.serving.work import MAX_EXPERTS, experts_in, mask_from

Eviction = Literal["belady", "lru", "random"]
NEVER = 1 << 30  # a next use beyond the known future


class Move(NamedTuple):
    """An expert that takes the slot of another."""

    expert: int
    victim: int


@dataclass(frozen=True)
class Plan:
    """How a batch gets its experts, alike in every layer.

    Attributes:
        hits: needed experts that are resident.
        loads: missing experts that go straight into the slot of one the batch does not need, before the layer runs.
        streams: missing experts that pass through the staging slots.
        keeps: streamed experts whose arrays stay once the layer has run, in place of the victim, which has run too.
        waves: groups of needed experts that run one after another; a single one with staging, or where all fit.
        wave_loads: the loads of each wave (those of the first are `loads`); later victims have run in earlier waves.
    """

    hits: frozenset[int]
    loads: tuple[Move, ...]
    streams: tuple[int, ...]
    keeps: tuple[Move, ...]
    waves: tuple[frozenset[int], ...]
    wave_loads: tuple[tuple[Move, ...], ...]

    @property
    def misses(self) -> int:
        """Experts that travel for this batch, in each layer."""
        return len(self.streams) + sum(len(loads) for loads in self.wave_loads)


class ExpertCache:
    """`slots` residents out of `experts`, the same in all layers, and `staging` slots to stream the others through.

    Args:
        experts: E.
        slots: k residents a layer; E or more, or 0: everything is resident.
        staging: slots shared by all layers through which missing experts stream; 0: batches run in waves.
        policy: `belady` evicts the expert whose next use in the given future is farthest away (the least recently used
            of those never used again), `lru` the least recently used, `random` any.
        seed: of the random policy.

    Raises ConfigError when a count is out of range.
    """

    def __init__(self, experts: int, slots: int, staging: int = 0, policy: Eviction = "belady", seed: int = 0) -> None:
        if not 0 < experts <= MAX_EXPERTS:
            raise ConfigError(f"experts = {experts}: must be in 1 .. {MAX_EXPERTS}")
        if slots < 0 or staging < 0:
            raise ConfigError(f"slots = {slots}, staging = {staging}: must be zero or more")
        if policy not in ("belady", "lru", "random"):
            raise ConfigError(f"eviction policy {policy!r}: must be belady, lru or random")
        self.experts, self.policy, self.staging = experts, policy, staging
        self.slots = experts if slots == 0 else min(slots, experts)
        self._mask = (1 << self.slots) - 1
        self._used = list(range(-experts, 0))  # when each expert was last used, on a clock of uses
        self._clock = 0
        self._rng = np.random.default_rng(seed)
        self.swapping: Move | None = None
        self.hits = self.misses = 0

    @property
    def resident(self) -> frozenset[int]:
        """Experts on the device in every layer."""
        return experts_in(self._mask)

    @property
    def all_resident(self) -> bool:
        """Whether nothing ever needs to move."""
        return self.slots >= self.experts

    @property
    def hit_ratio(self) -> float:
        """Share of the experts of all batches so far that were resident when their batch began."""
        return self.hits / max(self.hits + self.misses, 1)

    def step(self, needed: frozenset[int], future: Iterable[int] = ()) -> Plan:
        """Decide for a batch and take the decision as done.

        Args:
            needed: experts of the batch.
            future: expert sets of later batches as bit masks, soonest first; read only as far as needed.
        """
        wanted = mask_from(needed)
        hits, missing = experts_in(self._mask & wanted), experts_in(wanted & ~self._mask)
        self.hits += len(hits)
        self.misses += len(missing)
        for expert in sorted(hits, key=self._used.__getitem__) + sorted(missing):
            self._clock += 1
            self._used[expert] = self._clock
        if not missing:
            waves = (needed,) if needed else ()
            return Plan(hits, (), (), (), waves, tuple(() for _ in waves))
        rank = self._ranks(self._mask | wanted, future)
        if self.staging:
            return self._stream(hits, missing, wanted, rank)
        return self._run_waves(hits, missing, wanted, rank)

    def _ranks(self, candidates: int, future: Iterable[int]) -> dict[int, tuple[int, int]]:
        """Order of eviction: the highest rank leaves first."""
        experts = sorted(experts_in(candidates))
        if self.policy == "lru":
            return {e: (0, -self._used[e]) for e in experts}
        if self.policy == "random":
            return {e: (0, int(r)) for e, r in zip(experts, self._rng.permutation(len(experts)), strict=True)}
        uses = next_uses(candidates, future)
        return {e: (uses.get(e, NEVER), -self._used[e]) for e in experts}

    def _stream(self, hits: frozenset[int], missing: frozenset[int], wanted: int, rank: dict) -> Plan:
        """With staging: each missing expert stays in place of a worse resident, or passes through."""
        loads, keeps, streams = [], [], []
        if self.swapping is not None and self.swapping.expert in missing:  # the batch cannot wait: it finishes the swap
            loads.append(self.swapping)
            missing -= {self.swapping.expert}
        # Residents the batch does not need are replaced first among equals: their slot is free before the layer runs.
        victims = sorted(
            experts_in(self._mask), key=lambda e: (rank[e][0], not wanted >> e & 1, rank[e][1]), reverse=True
        )
        for expert in sorted(missing, key=lambda e: (rank[e], e)):
            victim = next((v for v in victims if self.policy != "belady" or rank[v][0] > rank[expert][0]), None)
            if self.policy != "belady":
                victim = next((v for v in victims if not wanted >> v & 1), victim)
            if victim is None:
                streams.append(expert)
                continue
            victims.remove(victim)
            self._mask = self._mask & ~(1 << victim) | 1 << expert
            if wanted >> victim & 1:
                streams.append(expert)
                keeps.append(Move(expert, victim))
            else:
                loads.append(Move(expert, victim))
        if self.swapping in loads:
            self.finish_swap()
        needed = experts_in(wanted)
        return Plan(hits, tuple(loads), tuple(streams), tuple(keeps), (needed,), (tuple(loads),))

    def _run_waves(self, hits: frozenset[int], missing: frozenset[int], wanted: int, rank: dict) -> Plan:
        """Without staging: residents run with what fits beside them, then the rest in groups of at most k."""
        left = sorted(missing, key=lambda e: (rank[e], e), reverse=True)  # soonest needed last: it stays
        waves: list[frozenset[int]] = []
        wave_loads: list[tuple[Move, ...]] = []
        ran, done = hits, 0
        while left or not waves:
            free = sorted((v for v in experts_in(self._mask) if not wanted >> v & 1 or done >> v & 1), key=rank.get)  # type: ignore[arg-type]
            loads = []
            while left and free:
                loads.append(Move(left.pop(0), free.pop()))
                self._mask = self._mask & ~(1 << loads[-1].victim) | 1 << loads[-1].expert
            group = ran | {move.expert for move in loads}
            waves.append(group)
            wave_loads.append(tuple(loads))
            done |= mask_from(group)
            ran = frozenset()
        return Plan(hits, wave_loads[0], (), (), tuple(waves), tuple(wave_loads))

    # --- background swaps ---

    def swap(self, waiting: Sequence[float], active: Sequence[float], load: float) -> Move | None:
        """Begin to replace a resident while other work runs, when those who wait have waited enough.

        The rule: more sequences need the expert than its victim, so that a swap lets more run, and their summed age
        exceeds what is active on the victim, times `load`. Else two that are wanted alike would take turns, each time
        for a load; what waits meanwhile streams when the scheduler picks it.

        Args:
            waiting: [E] summed seconds that sequences have waited for each expert.
            active: [E] sequences whose next token needs each expert.
            load: seconds to bring one expert in.

        Returns:
            The swap, or None (always without staging, where waves need every slot, and with one resident, whose leaving
            would let nothing run but what streams). Its victim has left already; `finish_swap` makes the expert
            resident. One at a time.
        """
        if self.all_resident or not self.staging or self.swapping is not None or self._mask.bit_count() < 2:
            return None
        outside = [e for e in range(self.experts) if not self._mask >> e & 1]
        expert = max(outside, key=lambda e: (waiting[e], -e))
        victim = min(experts_in(self._mask), key=lambda e: (active[e], self._used[e]))
        if active[expert] <= active[victim] or waiting[expert] <= active[victim] * load or waiting[expert] <= 0:
            return None
        self._mask &= ~(1 << victim)
        self.swapping = Move(expert, victim)
        return self.swapping

    def finish_swap(self) -> None:
        """The swapped expert is whole in every layer: it is resident. Raises RuntimeError when none was begun."""
        if self.swapping is None:
            raise RuntimeError("no swap was begun")
        self._mask |= 1 << self.swapping.expert
        self.swapping = None


def next_uses(candidates: int, future: Iterable[int]) -> dict[int, int]:
    """When each expert of a mask is used next: its index in `future`. Experts never used are absent.

    Stops reading once at most one candidate is left without a use: it is the farthest whatever comes.
    """
    uses: dict[int, int] = {}
    for index, mask in enumerate(future):
        found = candidates & mask
        if found:
            uses.update(dict.fromkeys(experts_in(found), index))
            candidates &= ~found
            if not candidates & (candidates - 1):
                break
    return uses


def replay(cache: ExpertCache, batches: Sequence[int], offline: bool = False) -> float:
    """Hit ratio of a cache over the expert sets (bit masks) of batches; `offline`: with all later batches as future."""
    for index, mask in enumerate(batches):
        cache.step(experts_in(mask), _after(batches, index) if offline else ())
    return cache.hit_ratio


def _after(batches: Sequence[int], index: int) -> Iterator[int]:
    for later in range(index + 1, len(batches)):
        yield batches[later]
