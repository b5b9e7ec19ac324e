"""Which tokens of which sequences run next: the interface and the three known policies.

A scheduler is a pure function of what it is shown, so engine, simulator and roll-outs may share one. `budget` is the
paper's MaxTokenLen. `lookahead.py` holds our own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from readme_jax.errors import ConfigError
from readme_jax.serving.cost import Costs
from readme_jax.serving.filling import Filling, by_age
from readme_jax.serving.lookahead import Lookahead
from readme_jax.serving.work import Batch, Room, Sequence

Policy = Literal["decode_first", "prefill_first", "algorithm1", "lookahead"]


class Scheduler(Protocol):
    """Picks the next batch."""

    def pick(self, sequences: Iterable[Sequence], resident: frozenset[int], now: float, room: Room) -> Batch:
        """Chunks to run in the next step.

        Args:
            sequences: all alive, running or waiting, in any order; the order does not matter to the result.
            resident: experts on the device.
            now: seconds, on the clock of `Sequence.arrival`.
            room: rows and pages for waiting sequences; used up.

        Returns:
            At most one chunk a sequence; empty when nothing is pending, or when what is pending waits for room.
        """
        ...


def _prefill(filling: Filling, prompts: list[Sequence]) -> None:
    for prompt in prompts:
        if not filling.add(prompt, prompt.pending):  # first come, first served: nobody overtakes
            return


@dataclass(frozen=True)
class DecodeFirst:
    """Every decode, then prompts in order of arrival with what is left of the budget (DeepSpeed style)."""

    budget: int

    def pick(self, sequences: Iterable[Sequence], resident: frozenset[int], now: float, room: Room) -> Batch:
        """See `Scheduler.pick`."""
        filling = Filling(self.budget, room)
        decodes, prompts = by_age(sequences, room)
        for sequence in decodes:
            filling.add(sequence, 1)
        _prefill(filling, prompts)
        return filling.batch()


@dataclass(frozen=True)
class PrefillFirst:
    """Prompts in order of arrival, then decodes with what is left of the budget (vLLM and TGI style)."""

    budget: int

    def pick(self, sequences: Iterable[Sequence], resident: frozenset[int], now: float, room: Room) -> Batch:
        """See `Scheduler.pick`."""
        filling = Filling(self.budget, room)
        decodes, prompts = by_age(sequences, room)
        _prefill(filling, prompts)
        for sequence in decodes:
            filling.add(sequence, 1)
        return filling.batch()


@dataclass(frozen=True)
class Algorithm1:
    """The paper's Algorithm 1: whole queues of one expert, the one with most pending tokens first.

    Corrected where the paper is silent or wrong: it ends when all queues are empty; a prompt waits under its most
    common expert and goes in as chunks in order, cut where its route leaves the experts of the batch. It can starve a
    rare expert for as long as common ones fill the budget.
    """

    budget: int

    def pick(self, sequences: Iterable[Sequence], resident: frozenset[int], now: float, room: Room) -> Batch:
        """See `Scheduler.pick`."""
        queues: dict[int, list[Sequence]] = {}
        pending: dict[int, int] = {}
        decodes, prompts = by_age(sequences, room)
        rows = room.rows
        for sequence in decodes + prompts:
            if not sequence.running:  # only those that can take a row, oldest first, stand in the queues
                if rows < 1:
                    continue
                rows -= 1
            expert = sequence.common_expert()
            queues.setdefault(expert, []).append(sequence)
            pending[expert] = pending.get(expert, 0) + sequence.pending
        filling = Filling(self.budget, room)
        for expert in sorted(queues, key=lambda e: (-pending[e], e)):
            fits = pending[expert] <= filling.left
            filling.mask |= 1 << expert
            for sequence in queues[expert]:
                filling.add(sequence, self._within(sequence, filling.mask))
            if not fits:
                break
        return filling.batch()

    @staticmethod
    def _within(sequence: Sequence, mask: int) -> int:
        """Pending tokens up to where the route leaves `mask` and the experts of its next token."""
        if sequence.pending == 1:
            return 1
        mask |= sequence.next_mask
        outside = sequence.masks[sequence.computed :] & ~mask != 0
        return int(outside.argmax()) or sequence.pending  # the first token is inside: 0 means that none is outside


def make_scheduler(policy: str, budget: int, costs: Costs | None = None, experts: int = 0) -> Scheduler:
    """A scheduler by name. `lookahead` needs what work costs and how many experts there are.

    Raises ConfigError for an unknown name, a budget below 1, or a lookahead without costs or experts.
    """
    if budget < 1:
        raise ConfigError(f"budget = {budget}: must be at least one token a batch")
    if policy == "lookahead":
        if costs is None or experts < 1:
            raise ConfigError("scheduler lookahead: needs the costs of a step and the number of experts")
        return Lookahead(budget, costs, experts)
    plain: dict[str, Callable[[int], Scheduler]] = {
        "decode_first": DecodeFirst,
        "prefill_first": PrefillFirst,
        "algorithm1": Algorithm1,
    }
    if policy not in plain:
        raise ConfigError(f"scheduler {policy!r}: must be one of {', '.join(get_args(Policy))}")
    return plain[policy](budget)
