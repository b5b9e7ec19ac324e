"""When the link and the staging slots are free: a batch's plan in seconds, layer by layer."""

from __future__ import annotations

from typing import Literal, NamedTuple

from readme_jax.serving.cost import LayerCost
from readme_jax.serving.expert_cache import Plan

Prefetch = Literal["off", "layer", "batch"]  # on demand; a layer ahead; also the next batch's first layers


class StepTime(NamedTuple):
    """Seconds of one step."""

    total: float
    compute: float  # if nothing had to be waited for
    transfer: float  # the link's, for this step's loads
    late: int  # loads known at least one load time ahead that were still waited for


class Timeline:
    """When link and staging slots are free; turns a batch's plan into seconds.

    Args:
        layers: L.
        load: seconds of one expert in one layer over the link.
        staging: slots of the ring; 0: waves.
        prefetch: how far ahead loads may start.
    """

    def __init__(self, layers: int, load: float, staging: int, prefetch: Prefetch) -> None:
        self.layers, self.load, self.prefetch = layers, load, prefetch
        self.link = 0.0  # free from then on
        self.ring = [0.0] * staging
        self.turn = 0

    def run(self, start: float, known: float, cost: LayerCost, plan: Plan, head: float) -> StepTime:
        """Run a step.

        Args:
            start: seconds when it may begin to compute.
            known: seconds since when its loads are known, at most `start`.
            cost: of each layer.
            plan: how the batch gets its experts.
            head: seconds of the output layer.
        """
        compute = self.layers * cost.total + head
        if not plan.misses:
            return StepTime(compute, compute, 0.0, 0)
        known = known if self.prefetch == "batch" else start
        clock = before = start
        late = 0
        for _ in range(self.layers):
            gate = {"off": clock, "layer": before, "batch": known}[self.prefetch]
            before = clock
            clock, missed = self._layer(clock, gate, cost, plan)
            late += missed
        transfer = plan.misses * self.layers * self.load
        return StepTime(clock + head - start, compute, transfer, late)

    def _layer(self, clock: float, gate: float, cost: LayerCost, plan: Plan) -> tuple[float, int]:
        """One layer from `clock` on, its first loads from `gate` on: when it ends, and how many loads were late."""
        direct = [self._travel(gate) for _ in plan.wave_loads[0]]  # into slots the batch does not need
        moved = dict(zip((move.expert for move in plan.wave_loads[0]), direct, strict=True))
        clock += cost.shared + sum(cost.segments[e] for e in plan.hits)
        late = 0
        for expert, ready in moved.items():
            late += clock < ready and gate + self.load <= clock
            clock = max(clock, ready) + cost.segments[expert]
        for loads in plan.wave_loads[1:]:  # a wave's loads begin once the wave before has left its slots
            arrivals = [self._travel(clock) for _ in loads]
            for move, ready in zip(loads, arrivals, strict=True):
                clock = max(clock, ready) + cost.segments[move.expert]
        for expert in plan.streams:
            ready = self._travel(max(gate, self.ring[self.turn]))
            late += clock < ready and gate + self.load <= clock
            clock = max(clock, ready) + cost.segments[expert]
            self.ring[self.turn] = clock
            self.turn = (self.turn + 1) % len(self.ring)
        return clock, late

    def _travel(self, earliest: float) -> float:
        self.link = max(self.link, earliest) + self.load
        return self.link
