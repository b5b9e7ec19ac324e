"""`lookahead`, our own scheduler: tokens a batch weighed against loads and compute, with a bound on every wait."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from readme_jax.serving.cost import Costs
from readme_jax.serving.filling import Filling, by_age
from readme_jax.serving.work import Batch, Room, Sequence, mask_from

EXHAUSTIVE = 6  # missing experts up to which every set of them is scored
SIZES = 6  # amounts of prefill that are scored


@dataclass(frozen=True)
class Lookahead:
    """Scores sets of experts by the weight of the tokens they let run against the seconds they take.

    A candidate is a set of experts that holds the resident ones, and an amount of prefill. Its value is the summed
    weight of its tokens, 1 a decode and `prefill_weight` a token of a prompt, times 1 + age / `ageing`; its price
    max(compute, missing experts x load time). The best ratio wins. Chunks of prompts are cut where the route leaves the
    set, shortest remaining prompt first, with ageing.

    Where every expert is resident there is no set to choose, and a step takes all that its budget allows. Prompts go
    before decodes: a chunk that is cut short for the sake of a few tokens costs a call more, and whoever waits for a
    first token waits longest. After `stall` seconds without a token decodes go first, once.

    The bound. A sequence that has not run for `patience` seconds is overdue, and the next tokens of overdue sequences
    go first, those of the one that waits longest deciding experts that must be in the set. While the budget is at
    least the number of sequences alive and there is a row for each, every sequence runs within

        patience + (M + 1) x the longest step

    of its last token, M = the number of different expert sets of a token (E for one expert a token): at each step
    after it is overdue, the longest waiting one runs with all overdue ones on the same experts, so those ahead of it
    are gone after M steps. With fewer rows than sequences the bound starts when one is free; rows go to the overdue in
    order of arrival. Under more load than the budget drains, no policy has a bound: the queue must be bounded outside.
    """

    budget: int
    costs: Costs
    experts: int
    patience: float = 10.0  # seconds
    ageing: float = 0.5  # seconds of waiting that double a token's weight
    prefill_weight: float = 0.05  # of a prompt's token against a decode's
    seniority: float = 0.05  # seconds of prefill that a prompt gains on the others in each second it waits
    stall: float = 0.1  # seconds that decodes stand behind prompts

    def pick(self, sequences: Iterable[Sequence], resident: frozenset[int], now: float, room: Room) -> Batch:
        """See `Scheduler.pick`."""
        decodes, prompts = by_age(sequences, room)
        prompts = self._in_order(prompts, room.rows, now)
        if not decodes and not prompts:
            return Batch()
        overdue = [s for s in decodes + prompts if now - s.last_run >= self.patience]
        overdue.sort(key=lambda s: (s.last_run, s.arrival, s.id))
        forced = overdue[0].next_mask if overdue else 0
        mask, prefill, stand_back = mask_from(resident), 0, False
        if len(resident) >= self.experts:
            prefill = self.budget
            stand_back = all(now - s.last_run < self.stall for s in decodes)
        elif prompts or any(s.next_mask & ~mask for s in decodes):  # else there is nothing to choose
            mask, prefill = _Queue(self, decodes, prompts, now).best(mask, forced)
        overdue = [s for s in overdue if not s.next_mask & ~mask]
        decodes = [s for s in decodes if not s.next_mask & ~mask]
        filling = Filling(min(self.budget, max(len(decodes) + prefill, len(overdue))), room)
        self._fill(filling, overdue, prompts + decodes if stand_back else decodes + prompts, mask)
        return filling.batch()

    def _fill(self, filling: Filling, overdue: list[Sequence], order: list[Sequence], mask: int) -> None:
        """The overdue, a token at least for each, then the others in order, as far as `mask` has their experts."""
        done = set()
        for place, sequence in enumerate(overdue):
            others = len(overdue) - place - 1
            if filling.add(sequence, min(sequence.run_within(mask, self.experts), filling.left - others)):
                done.add(sequence.id)
        for sequence in order:
            if sequence.id not in done:
                filling.add(sequence, 1 if sequence.decoding else sequence.run_within(mask, self.experts))

    def _in_order(self, prompts: list[Sequence], rows: int, now: float) -> list[Sequence]:
        """Prompts that have a row or can get one: the overdue by arrival, then short ones first, with ageing."""

        def place(sequence: Sequence) -> tuple[float, float, int]:
            if now - sequence.last_run >= self.patience:
                return -float("inf"), sequence.arrival, sequence.id
            ahead = sequence.pending * self.costs.token
            return ahead - self.seniority * (now - sequence.arrival), sequence.arrival, sequence.id

        kept = []
        for sequence in sorted(prompts, key=place):
            if sequence.running or rows > 0:
                kept.append(sequence)
                rows -= not sequence.running
        return kept


class _Queue:
    """Pending work as arrays, to score many candidates at once: D decodes, P prompts, C candidate sets."""

    def __init__(self, policy: Lookahead, decodes: list[Sequence], prompts: list[Sequence], now: float) -> None:
        self.policy = policy
        age = 1.0 / policy.ageing
        self.decode_masks = np.array([s.next_mask for s in decodes], np.int64)  # [D]
        self.decode_weights = np.array([1 + (now - s.last_run) * age for s in decodes])  # [D]
        token = policy.prefill_weight
        self.prompt_weights = np.array([token * (1 + (now - s.arrival) * age) for s in prompts])  # [P] a token
        first = np.array([s.first_uses(policy.experts) for s in prompts], np.int64)
        computed = np.array([s.computed for s in prompts], np.int64)
        self.first_use = first.reshape(len(prompts), policy.experts) - computed[:, None]  # [P, E] tokens ahead
        self.pending = np.array([s.pending for s in prompts], np.int64)  # [P]
        ahead = (self.first_use < self.pending[:, None]).any(0)  # [E] whether a prompt needs it, sooner or later
        self.wanted = mask_from(np.flatnonzero(ahead).tolist())
        self.wanted |= int(np.bitwise_or.reduce(self.decode_masks, initial=0))

    def best(self, resident: int, forced: int) -> tuple[int, int]:
        """The best set of experts that holds `resident` and `forced`, and its tokens of prefill."""
        masks = self._candidates(resident | forced)
        loads = np.array([(int(m) & ~resident).bit_count() for m in masks]) * self.policy.costs.load  # [C]
        ran = (self.decode_masks[None] & ~masks[:, None]) == 0  # [C, D]
        value, tokens = ran @ self.decode_weights, ran.sum(1)
        inside = self._inside(masks)  # [C, P]
        before = inside.cumsum(1) - inside
        present = np.array([(int(m) & self.wanted).bit_count() for m in masks])
        best, chosen = -1.0, (int(masks[0]), 0)
        for amount in self._amounts():
            taken = np.clip(amount - tokens[:, None] - before, 0, inside)  # [C, P]
            worth = value + taken @ self.prompt_weights
            prefill = taken.sum(1)
            costs = self.policy.costs
            seconds = np.maximum(costs.compute(tokens + prefill, present), loads)
            rate = worth / seconds
            index = int(rate.argmax())
            if rate[index] > best:
                best, chosen = float(rate[index]), (int(masks[index]), int(prefill[index]))
        return chosen

    def _candidates(self, base: int) -> np.ndarray:
        missing = [e for e in range(self.policy.experts) if self.wanted & ~base & (1 << e)]
        if len(missing) <= EXHAUSTIVE:
            added = [mask_from(c) for n in range(len(missing) + 1) for c in combinations(missing, n)]
        else:  # nested sets, the most wanted first
            demand = {e: float(self.decode_weights[(self.decode_masks >> e & 1) == 1].sum()) for e in missing}
            missing.sort(key=lambda e: (-demand[e], e))
            added = [mask_from(missing[:n]) for n in range(len(missing) + 1)]
        return np.array([base | more for more in added], np.int64)

    def _inside(self, masks: np.ndarray) -> np.ndarray:
        """[C, P] tokens of each prompt up to where its route leaves each set."""
        outside = (masks[:, None] >> np.arange(self.policy.experts) & 1) == 0  # [C, E]
        uses = np.where(outside[:, None], self.first_use[None], self.pending[None, :, None])  # [C, P, E]
        return uses.min(2)

    def _amounts(self) -> list[int]:
        """Sizes of batch to try: no prefill, then the budget, halved down to where arithmetic hides reading weights."""
        least = max(self.policy.costs.balance(self.policy.experts), 1.0)
        sizes = [self.policy.budget]
        while sizes[-1] >= 2 * least and len(sizes) < SIZES:
            sizes.append(sizes[-1] // 2)
        return [0, *sizes]
