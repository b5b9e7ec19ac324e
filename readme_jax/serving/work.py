"""What the policies of serving see: sequences, chunks of them, batches of chunks, and the room for new ones.

Engine and simulator build these same objects, so a scheduler cannot tell which of the two it works for. Sets of experts
travel as bit masks (bit e is expert e) inside the policies, and as frozensets at their edges.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

Route = tuple[int, ...]  # the experts of one token
MAX_EXPERTS = 63  # bits of a mask that fit a signed integer


@lru_cache(maxsize=65536)
def mask_of(route: Route) -> int:
    """Experts as a bit mask. Raises ValueError when one lies outside 0 .. 62."""
    mask = 0
    for expert in route:
        if not 0 <= expert < MAX_EXPERTS:
            raise ValueError(f"expert {expert}: must be in 0 .. {MAX_EXPERTS - 1}")
        mask |= 1 << expert
    return mask


@lru_cache(maxsize=65536)
def experts_in(mask: int) -> frozenset[int]:
    """The experts of a bit mask."""
    return frozenset(e for e in range(mask.bit_length()) if mask >> e & 1)


def mask_from(experts: Iterable[int]) -> int:
    """A set of experts, in any order, as a bit mask."""
    return mask_of(tuple(sorted(experts)))


class Sequence:
    """One request on its way: what policies may know of it.

    Attributes:
        id: unique among the sequences alive.
        arrival: seconds, on the clock that `now` is read from.
        prompt: tokens of the prompt, at least one.
        routes: experts of every token known so far; grows by append or extend only.
        computed: tokens whose keys and values are written.
        last_run: when a token of it last ran; its arrival before that.
        running: whether it holds a row of the cache.

    A preempted sequence has computed = 0 and keeps its routes: its own output is then prefilled like a prompt. One that
    starts from a shared prefix has computed > 0 from its start.
    """

    __slots__ = (
        "_base", "_common", "_first", "_masks", "_seen", "_uses",
        "arrival", "computed", "id", "last_run", "prompt", "routes", "running",
    )  # fmt: skip

    def __init__(self, id: int, arrival: float, prompt: int, routes: Iterable[Route]) -> None:
        self.id, self.arrival, self.prompt = id, arrival, prompt
        self.routes: list[Route] = list(routes)
        self.computed = 0
        self.last_run = arrival
        self.running = False
        self._masks = np.zeros(max(len(self.routes), 1), np.int64)
        self._seen = 0
        self._first: dict[int, int] = {}
        self._base = 0
        self._common = (-1, -1, -1)
        self._uses: tuple[int, int, list[int]] = (-1, -1, [])

    def fork(self) -> Sequence:
        """A copy to play ahead with; it shares the list of routes, which neither may change while the other is used."""
        copy = Sequence.__new__(Sequence)
        copy.id, copy.arrival, copy.prompt, copy.routes = self.id, self.arrival, self.prompt, self.routes
        copy.computed, copy.last_run, copy.running = self.computed, self.last_run, self.running
        copy._masks = self._masks if self.decoding else self.masks  # the view has no room to grow: it is copied then
        copy._seen, copy._common, copy._uses = self._seen, self._common, self._uses
        copy._base, copy._first = self._base, {} if self.decoding else self._first.copy()
        return copy

    @property
    def known(self) -> int:
        """Tokens whose experts are known."""
        return len(self.routes)

    @property
    def pending(self) -> int:
        """Known tokens that have not run; 0 while the next one is still being sampled."""
        return len(self.routes) - self.computed

    @property
    def decoding(self) -> bool:
        """Whether it advances a token a step: its prompt, and after preemption its own output, is written."""
        return self.computed >= self.prompt and len(self.routes) - self.computed <= 1

    @property
    def masks(self) -> np.ndarray:
        """[known] int64: the experts of each known token as bit masks. A view: read only."""
        known = len(self.routes)
        if self._seen < known:
            if known > len(self._masks):
                grown = np.zeros(max(known, 2 * len(self._masks)), np.int64)
                grown[: self._seen] = self._masks[: self._seen]
                self._masks = grown
            self._masks[self._seen : known] = [mask_of(route) for route in self.routes[self._seen :]]
            self._seen = known
        return self._masks[:known]

    @property
    def next_mask(self) -> int:
        """Experts of the next token to run, as a bit mask; 0 when none is pending."""
        return mask_of(self.routes[self.computed]) if self.computed < len(self.routes) else 0

    def mask(self, start: int, count: int) -> int:
        """Experts of tokens start .. start+count, as a bit mask."""
        if count == 1:
            return mask_of(self.routes[start])
        return int(np.bitwise_or.reduce(self.masks[start : start + count], initial=0))

    def run_within(self, mask: int, experts: int) -> int:
        """How many of the next tokens stay inside the experts of `mask`, out of `experts` in all."""
        outside = [at for e, at in enumerate(self.first_uses(experts)) if not mask >> e & 1]
        return min(outside, default=len(self.routes)) - self.computed

    def first_uses(self, experts: int) -> list[int]:
        """`first_use` of each of so many experts. Read only."""
        computed, known, uses = self._uses
        if computed != self.computed or known != len(self.routes) or len(uses) != experts:
            uses = [self.first_use(e) for e in range(experts)]
            self._uses = (self.computed, len(self.routes), uses)
        return uses

    def first_use(self, expert: int) -> int:
        """Index of the first pending token that needs an expert; `known` when none does. Cheap when asked again."""
        if self.computed < self._base:  # preempted: what was found holds for later tokens only
            self._first.clear()
        self._base = self.computed
        known, at = len(self.routes), max(self._first.get(expert, 0), self.computed)
        if at < known and not mask_of(self.routes[at]) >> expert & 1:
            uses = self.masks[at:] >> expert & 1
            ahead = int(uses.argmax())
            at = at + ahead if uses[ahead] else known
        self._first[expert] = at
        return at

    def common_expert(self) -> int:
        """The expert that most pending tokens need, the lowest of equals. Raises ValueError when none is pending."""
        if self.pending == 1 and len(self.routes[-1]) == 1:
            return self.routes[-1][0]
        at = (self.computed, len(self.routes))
        if self._common[:2] != at:
            if at[0] >= at[1]:
                raise ValueError(f"sequence {self.id}: no token is pending")
            pending = self.masks[at[0] :]
            bits = range(int(np.bitwise_or.reduce(pending)).bit_length())
            counts = [int((pending >> e & 1).sum()) for e in bits]
            self._common = (*at, counts.index(max(counts)))
        return self._common[2]


@dataclass(frozen=True)
class Chunk:
    """Tokens start .. start+count of a sequence; count is 1 while it decodes."""

    sequence: Sequence
    start: int
    count: int

    @cached_property
    def mask(self) -> int:
        """The experts of its tokens, as a bit mask."""
        return self.sequence.mask(self.start, self.count)

    @property
    def decoding(self) -> bool:
        """Whether it is the decode step of its sequence."""
        return self.count == 1 and self.sequence.decoding


@dataclass(frozen=True)
class Batch:
    """Chunks that run in one step, at most one a sequence."""

    chunks: tuple[Chunk, ...] = field(default=())

    @cached_property
    def mask(self) -> int:
        """The experts of its tokens, as a bit mask."""
        mask = 0
        for chunk in self.chunks:
            mask |= chunk.mask
        return mask

    @property
    def experts(self) -> frozenset[int]:
        """The experts of its tokens."""
        return experts_in(self.mask)

    @cached_property
    def tokens(self) -> int:
        """Tokens that run in it."""
        return sum(chunk.count for chunk in self.chunks)


@dataclass
class Room:
    """What is free for sequences that hold no row yet; used up as one batch is picked.

    A sequence takes a row and the pages of all its known tokens when it is first scheduled, so a running prompt never
    waits for pages; only tokens sampled later need more, for which the engine preempts.
    """

    rows: int
    pages: int = 1 << 60
    page_size: int = 1

    def admit(self, sequence: Sequence) -> bool:
        """Take a row and pages for a sequence, unless it holds them; False, taking nothing, when there are too few."""
        if sequence.running:
            return True
        pages = -(-sequence.known // self.page_size)
        if self.rows < 1 or self.pages < pages:
            return False
        self.rows -= 1
        self.pages -= pages
        return True
