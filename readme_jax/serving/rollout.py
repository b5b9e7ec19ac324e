"""What experts later batches will need: the routed queue, or the scheduler itself played some steps ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import copy
from typing import Literal

from readme_jax.serving.scheduler import Scheduler
from readme_jax.serving.work import Batch, Room, Sequence

Future = Literal["none", "queue", "rollout"]  # what the eviction policy is told of later batches


def queue_future(sequences: Iterable[Sequence], batch: Batch) -> list[int]:
    """Expert sets of what is queued once `batch` has run, as bit masks, those with most pending tokens first.

    Sequences that hold a row queue under the experts of their next token, as in Algorithm 1; one whose next token is
    still to be sampled, under those of its last. The order in which sequences arrived says little of when they run.
    """
    ran = {chunk.sequence.id: chunk.count for chunk in batch.chunks}
    pending: dict[int, int] = {}
    for sequence in sequences:
        if sequence.running or sequence.id in ran:
            start = min(sequence.computed + ran.get(sequence.id, 0), sequence.known - 1)
            mask = sequence.mask(start, 1)
            pending[mask] = pending.get(mask, 0) + sequence.known - start
    return sorted(pending, key=lambda mask: (-pending[mask], mask))


def roll_out(
    scheduler: Scheduler,
    sequences: Iterable[Sequence],
    batch: Batch,
    resident: frozenset[int],
    now: float,
    room: Room,
    steps: int,
    seconds: float,
) -> Iterator[int]:
    """Expert sets of the `steps` batches that follow `batch`, as bit masks, then those of what is still queued.

    Plays the scheduler on copies: nobody arrives or finishes, each new token repeats the expert of the last one.

    Args:
        scheduler: a pure function of what it is shown.
        sequences: all alive, before `batch` has run.
        batch: what runs now.
        resident: experts on the device while it runs.
        now: seconds when it begins.
        room: free rows and pages after it was picked; not used up.
        seconds: taken for the duration of each step.
    """
    running = {chunk.sequence.id for chunk in batch.chunks}
    copies = {s.id: s.fork() for s in sequences if room.rows or s.running or s.id in running}
    for _ in range(steps):
        for chunk in batch.chunks:
            advance(copies[chunk.sequence.id], chunk.count, now + seconds)
        now += seconds
        batch = scheduler.pick(copies.values(), resident, now, room := copy(room))
        if not batch.chunks:
            return
        yield batch.mask
    yield from queue_future(copies.values(), batch)


def advance(sequence: Sequence, count: int, now: float) -> None:
    """Count tokens of a copy as run; when none is left the next one repeats the last one's experts."""
    repeats = sequence.decoding  # the last token may stand for the next one: same experts, still one to run
    sequence.running = True
    sequence.last_run = now
    if repeats:
        return
    sequence.computed += count
    if sequence.computed >= sequence.known:
        sequence.routes = [*sequence.routes, sequence.routes[-1]]
