"""Pages: the unit in which room for keys and values is given out, and by which prompts recognise each other.

A page is `size` consecutive tokens of a sequence. Two sequences share a page when all tokens up to its end are equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from readme_jax.errors import ConfigError


class Pages:
    """How many pages there are, and who holds how many."""

    def __init__(self, total: int, size: int) -> None:
        if total < 1 or size < 1:
            raise ConfigError(f"{total} pages of {size} tokens: both must be above zero")
        self.total, self.size = total, size
        self.free = total
        self._held: dict[int, int] = {}

    def needed(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.size)

    def reserve(self, owner: int, tokens: int) -> bool:
        """Give `owner` room for its first `tokens` tokens, what it holds included; False, giving none, if too few."""
        more = self.needed(tokens) - self._held.get(owner, 0)
        if more > self.free:
            return False
        if more > 0:
            self.free -= more
            self._held[owner] = self._held.get(owner, 0) + more
        return True

    def release(self, owner: int) -> None:
        """Take back all that `owner` holds."""
        self.free += self._held.pop(owner, 0)


def page_names(tokens: Sequence[int], size: int, names: list[bytes] | None = None) -> list[bytes]:
    """A name for each full page of `tokens`: a hash of all tokens up to its end. `names` are those known already."""
    names = [] if names is None else list(names)
    for page in range(len(names), len(tokens) // size):
        text = np.asarray(tokens[page * size : (page + 1) * size], np.int32).tobytes()
        before = names[-1] if names else b""
        names.append(hashlib.blake2b(before + text, digest_size=16).digest())
    return names


class PrefixIndex:
    """Which rows hold which pages, from their start on, whether their sequence still runs or not."""

    def __init__(self, rows: int) -> None:
        self._names: list[list[bytes]] = [[] for _ in range(rows)]
        self._rows: dict[bytes, set[int]] = {}

    def held(self, row: int) -> int:
        """Pages that a row is known to hold."""
        return len(self._names[row])

    def holds(self, name: bytes) -> bool:
        """Whether any row holds a page."""
        return name in self._rows

    def fill(self, row: int, names: Sequence[bytes]) -> None:
        """Row `row` holds exactly these pages."""
        self.cut(row, 0)
        self.extend(row, names)

    def extend(self, row: int, names: Sequence[bytes]) -> None:
        """Row `row`, whose pages are the first of `names`, now holds all of them."""
        for name in names[len(self._names[row]) :]:
            self._names[row].append(name)
            self._rows.setdefault(name, set()).add(row)

    def cut(self, row: int, pages: int) -> None:
        """Row `row` holds no more than its first `pages`."""
        while len(self._names[row]) > pages:
            name = self._names[row].pop()
            self._rows[name].discard(row)
            if not self._rows[name]:
                del self._rows[name]

    def names(self, row: int) -> list[bytes]:
        """The pages of a row."""
        return list(self._names[row])

    def find(self, names: Sequence[bytes]) -> tuple[int, set[int]]:
        """The most pages from the start of `names` that a row holds, and the rows that hold them."""
        low, high = 0, len(names)  # rows that hold a page hold those before it
        if not names or not self.holds(names[0]):
            return 0, set()
        while low < high:
            middle = (low + high + 1) // 2
            if names[middle - 1] in self._rows:
                low = middle
            else:
                high = middle - 1
        return low, set(self._rows[names[low - 1]])
