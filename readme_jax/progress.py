"""Progress over tokens, and of an engine's warm-up: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from readme_jax.parallel.distributed import lead

PLAIN_EVERY = 30.0  # seconds between plain lines


class Meter:
    """Counts tokens towards a total; says how fast, and how long is left."""

    def __init__(
        self, label: str, total: int, done: int = 0, console: Console | None = None, silent: bool = False
    ) -> None:
        self.label, self.total, self.done, self.first = label, total, done, done
        self.silent, self.console = silent, console or Console(stderr=True)
        self.began = self.spoke = time.monotonic()
        self.note, self.left = "", float("nan")
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[tail]}"))
        self.bar = Progress(*columns, console=self.console) if self.console.is_terminal and not silent else None
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task(label, total=max(total, 1), completed=done, tail="")

    def __call__(self, tokens: int, note: str = "", left: float | None = None, rate: float | None = None) -> None:
        """Tell of tokens done, what to show beside them, and what is known better of seconds left and tokens/s."""
        self.done += tokens
        self.note = note
        now = time.monotonic()
        average = (self.done - self.first) / max(now - self.began, 1e-9)
        self.left = (self.total - self.done) / max(average, 1e-9) if left is None else left
        tail = f"{note + ' · ' if note else ''}{rate or average:,.0f} tokens/s · {clock(self.left)} left"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, tail=tail)
        elif now - self.spoke > PLAIN_EVERY and not self.silent:
            self.spoke = now
            print(f"{self.label}: {self.done / max(self.total, 1):.0%} · {tail}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop the bar; elsewhere say that it is done, if it took long enough to have been noticed."""
        seconds = time.monotonic() - self.began
        if self.bar is not None:
            self.bar.stop()
        elif seconds > 1 and not self.silent:
            note = f" · {self.note}" if self.note else ""
            print(f"{self.label}: {self.done:,} tokens in {clock(seconds)}{note}", file=sys.stderr, flush=True)


class WarmUp:
    """Programs compiled, of how many: a bar in a terminal, one line at the end there and elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        columns = (TextColumn("warm-up"), BarColumn(), MofNCompleteColumn(), TextColumn("programs"))
        self.bar = Progress(*columns, console=self.console, transient=True) if self.console.is_terminal else None
        self.task = None if self.bar is None else self.bar.add_task("", total=None)
        if self.bar is not None:
            self.bar.start()

    def __call__(self, done: int, total: int) -> None:
        """Tell of a program."""
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, total=total)
        if done == total:
            self.close()
            print(f"ready: {total} programs compiled", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop the bar, also of a warm-up that did not come to its end."""
        if self.bar is not None:
            self.bar.stop()


@contextmanager
def meter(label: str, total: int, done: int = 0) -> Iterator[Meter]:
    """A `Meter` for a block of work; of several processes only the first shows it."""
    each = Meter(label, total, done, silent=not lead())
    try:
        yield each
    finally:
        each.close()


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03; `?` where they are not known."""
    if seconds != seconds or seconds == float("inf"):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
