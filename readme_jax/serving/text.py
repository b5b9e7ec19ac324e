"""From tokens to text as they come: whole characters only, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

from readme_jax.checkpoints.tokenizer import Tokenizer

UNKNOWN = "\ufffd"  # what bytes that are no whole character decode to
LONGEST = 3  # bytes of a character that may still be waiting for its last one

Item = TypeVar("Item")


class Detokenizer:
    """Text of a growing list of tokens; the bytes of a character that is not complete are held back.

    Only the tokens since the last but one character border are decoded again: a token's text may depend on the one
    before it (a leading space that some tokenizers drop).
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # from the last but one border on
        self._before = 0  # how many of them lie before the last border
        self._shown = 0  # characters of their text that were given out
        self.holding = False  # part of a character waits for the rest

    def push(self, token: int) -> str:
        """The text that one more token completes."""
        if self._tokenizer is None:
            return ""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        kept = len(text)
        while kept and len(text) - kept < LONGEST and text[kept - 1] == UNKNOWN:
            kept -= 1
        new = text[self._shown : kept]
        self._shown = max(self._shown, kept)
        self.holding = kept < len(text)
        if new and not self.holding:
            self._tokens = self._tokens[self._before :]
            self._before = len(self._tokens)
            self._shown = len(self._tokenizer.decode(self._tokens))
        return new

    def flush(self) -> str:
        """What was held back, at the end."""
        if self._tokenizer is None or not self.holding:
            return ""
        self.holding = False
        return self._tokenizer.decode(self._tokens)[self._shown :]


class Shown(NamedTuple, Generic[Item]):
    """Text that may be shown, the items (one a token) whose text it completes, and whether a stop string ended it."""

    text: str
    items: list[Item]
    stopped: bool


class Transcript(Generic[Item]):
    """Text and items of a request's tokens, held back while they may be the start of a stop string.

    Where a stop string is complete the text ends before it, and so do the items: those of tokens that lie wholly in
    it or after it are dropped. Of several stop strings the one that is complete first counts.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = tuple(stop)
        self._tail = ""  # decoded, not shown
        self._shown = 0  # characters
        self._items: list[tuple[Item, int]] = []  # with where their text starts
        self._ends: list[int] = []  # where it ends, of those whose last character is complete

    def push(self, token: int, item: Item) -> Shown[Item]:
        """One more token."""
        self._items.append((item, self._shown + len(self._tail)))
        return self._advance(self._detokenizer.push(token), last=False)

    def finish(self) -> Shown[Item]:
        """All that is left, when there are no more tokens."""
        return self._advance(self._detokenizer.flush(), last=True)

    def _advance(self, new: str, last: bool) -> Shown[Item]:
        self._tail += new
        if not self._detokenizer.holding or last:
            end = self._shown + len(self._tail)
            self._ends += [end] * (len(self._items) - len(self._ends))
        cut = self._first_stop()
        if cut is not None:
            items = [item for item, start in self._items if start < self._shown + cut]
            return Shown(self._tail[:cut], items, True)
        free = len(self._tail) - (0 if last else self._maybe_stop())
        text, self._tail = self._tail[:free], self._tail[free:]
        self._shown += free
        ready = sum(end <= self._shown for end in self._ends)
        items = [item for item, _ in self._items[:ready]]
        self._items, self._ends = self._items[ready:], self._ends[ready:]
        return Shown(text, items, False)

    def _first_stop(self) -> int | None:
        """Where the stop string starts that is complete first."""
        if not self._stop:
            return None
        found = [(at + len(s), at) for s in self._stop if (at := self._tail.find(s)) >= 0]
        return min(found)[1] if found else None

    def _maybe_stop(self) -> int:
        """Length of the longest end of the tail that a stop string may begin with."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for length in range(min(longest, len(self._tail)), 0, -1):
            if any(s.startswith(self._tail[-length:]) for s in self._stop):
                return length
        return 0
