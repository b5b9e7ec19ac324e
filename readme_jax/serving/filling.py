"""A batch in the making, shared by every scheduler."""

from __future__ import annotations

from collections.abc import Iterable

from readme_jax.serving.work import Batch, Chunk, Room, Sequence


class Filling:
    """A batch being filled: counts down the token budget and the room."""

    def __init__(self, budget: int, room: Room) -> None:
        self.left, self.room = budget, room
        self.chunks: list[Chunk] = []
        self.mask = 0

    def add(self, sequence: Sequence, count: int) -> bool:
        """Add the next tokens of a sequence, as many of `count` as fit; False when none does."""
        count = min(count, self.left)
        if count < 1 or not self.room.admit(sequence):
            return False
        chunk = Chunk(sequence, sequence.computed, count)
        self.chunks.append(chunk)
        self.mask |= chunk.mask
        self.left -= count
        return True

    def batch(self) -> Batch:
        """What was added."""
        return Batch(tuple(self.chunks))


def by_age(sequences: Iterable[Sequence], room: Room) -> tuple[list[Sequence], list[Sequence]]:
    """Sequences with pending tokens, oldest arrival first: those that decode, and those in prefill.

    Running prompts stand before waiting ones, so that a row is never idle for want of a place in the budget; waiting
    ones are left out while no row is free.
    """
    admits = room.rows > 0
    ready = [s for s in sequences if len(s.routes) > s.computed and (admits or s.running)]
    ready.sort(key=lambda s: (not s.running, s.arrival, s.id))
    decodes = [s for s in ready if s.decoding]
    return decodes, [s for s in ready if not s.decoding]
