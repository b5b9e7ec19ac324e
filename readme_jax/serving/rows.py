"""Rows of the cache: who runs in which, what finished sequences left in the others, and how rows are kept dense.

A decode call computes rows 0 .. B, so sequences keep to the first rows: a new one takes a free row below the bucket
that covers all that run, and where a bucket can shrink the highest row moves down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from readme_jax.serving.pages import PrefixIndex


class Placement(NamedTuple):
    """A row for a sequence. Its first `pages` are those of row `source`; nothing is copied where that is the row."""

    row: int
    source: int
    pages: int


class Rows:
    """Owners and contents of the rows."""

    def __init__(self, count: int, buckets: Sequence[int]) -> None:
        """`buckets`: the row counts that a decode call may have, ascending, the last one `count`."""
        self.count, self.buckets = count, tuple(buckets)
        self.index = PrefixIndex(count)
        self._owners: list[int | None] = [None] * count
        self._freed = [0] * count  # when: an ever growing number
        self._clock = 0

    @property
    def free(self) -> int:
        """Rows without an owner."""
        return self._owners.count(None)

    def bucket(self, rows: int) -> int:
        """The smallest decode call that covers so many rows."""
        return next(b for b in self.buckets if b >= rows)

    def take(self, owner: int, names: Sequence[bytes]) -> Placement:
        """A free row for a sequence whose full pages are `names`, and where its first ones can be copied from."""
        pages, sources = self.index.find(names)
        below = self.bucket(self.count - self.free + 1)
        candidates = [r for r in range(below) if self._owners[r] is None]
        row = min(candidates, key=lambda r: (r not in sources, self.index.held(r) > 0, self._freed[r]))
        source = row if row in sources or not sources else min(sources)
        self._owners[row] = owner
        self.index.fill(row, names[:pages])
        return Placement(row, source, pages)

    def release(self, row: int) -> None:
        """The sequence of `row` has left; its pages stay known until another one takes the row."""
        self._owners[row] = None
        self._clock += 1
        self._freed[row] = self._clock

    def move(self) -> tuple[int, int] | None:
        """Move the highest row into a free one, if that shrinks the bucket: (from, to). Call until it is None."""
        used = [r for r, owner in enumerate(self._owners) if owner is not None]
        if not used or used[-1] < self.bucket(len(used)):
            return None
        source = used[-1]
        candidates = [r for r in range(self.bucket(len(used))) if self._owners[r] is None]
        target = min(candidates, key=lambda r: (self.index.held(r) > 0, self._freed[r]))
        self._owners[target] = self._owners[source]
        self.index.fill(target, self.index.names(source))
        self.release(source)
        return source, target
