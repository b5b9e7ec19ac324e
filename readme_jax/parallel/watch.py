"""While a job of several processes runs: the first sign that one has died ends all of them, with the reason.

Without it a process that waits in a collective for a dead one hangs until a time-out, and dies without a word of why.
"""

from __future__ import annotations

import os
import selectors
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from readme_jax.parallel.distributed import Seat
from readme_jax.parallel.preflight import Line

CRASHED = 1  # exit code of a process that stops because another did
GRACE = 2.0  # seconds that a process has to say itself what it died of, when all fail alike
BEATS = 4  # signs of life in a heartbeat time-out

Lines = dict[int, tuple[str, Line]]


class Watch:
    """Holds the roll call's lines, sends signs of life over them, and listens.

    Process 0 is the hub: it hears of a death and tells the others. `record(reason)` is called in the process that is to
    write down why the job died: process 0, or when that is the dead one every other. Then the process exits, whatever
    its main thread waits for.
    """

    def __init__(self, seat: Seat, lines: Lines, timeout: float, record: Callable[[str], None]) -> None:
        self.seat, self.lines, self.timeout, self.record = seat, lines, timeout, record
        self.ending = threading.Event()
        self.dying = threading.Event()
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()

    def finished(self) -> None:
        """This process ends as it should: the others need not mind."""
        self._end({"finished": True})

    def failed(self, reason: str) -> None:
        """This process is about to end for a reason that the others should know."""
        self._end({"failed": reason})

    def defer(self) -> None:
        """After an error that may be another process's death seen from here, such as a collective that broke.

        Returns where all others live; else this process ends here, with the reason that the watch knows.
        """
        if self.dying.wait(GRACE):
            self.thread.join()

    def _end(self, message: dict[str, Any]) -> None:
        if not self.ending.is_set():
            self.ending.set()
            self._tell(message)

    def _tell(self, message: dict[str, Any], but: int = -1) -> None:
        with self.lock:
            for process, (_, line) in list(self.lines.items()):
                if process != but:
                    try:
                        line.send(message)
                    except OSError:
                        continue  # gone: the listening side says so

    def _run(self) -> None:
        heard = dict.fromkeys(self.lines, time.monotonic())
        beat = self.timeout / BEATS
        told = 0.0
        with selectors.DefaultSelector() as ready:
            for process, (_, line) in self.lines.items():
                ready.register(line.socket, selectors.EVENT_READ, process)
            while self.lines and not self.ending.is_set():
                if time.monotonic() - told > beat:
                    told = time.monotonic()
                    self._tell({"alive": True})
                for key, _ in ready.select(min(beat, 1.0)):
                    heard[key.data] = time.monotonic()
                    if self._listen(key.data):
                        ready.unregister(key.fileobj)
                        self.lines.pop(key.data)
                for process in self.lines:
                    if time.monotonic() - heard[process] > self.timeout:
                        silent = f"gave no sign of life for {self.timeout:g} s (Cluster.heartbeat_timeout)"
                        self._lost(process, silent)

    def _listen(self, process: int) -> bool:
        """Hear a line out; true when its process has finished. Does not return when it has died."""
        try:
            messages = self.lines[process][1].receive()
        except (OSError, ValueError):
            self._lost(process, "was killed, or its host is gone")
            return True
        for message in messages:
            if "finished" in message:
                return True
            if "failed" in message:
                self._lost(process, f"failed: {message['failed']}", said=True)
            if "lost" in message:
                self._die(message["lost"], message["why"], message["host"], message["said"])
        return False

    def _lost(self, process: int, why: str, said: bool = False) -> None:
        host = self.lines[process][0]
        if not self.ending.is_set():
            self._tell({"lost": process, "why": why, "host": host, "said": said}, but=process)
        self._die(process, why, host, said)

    def _die(self, process: int, why: str, host: str, said: bool) -> None:
        """End this process. One that `said` why it failed may not be alone: then the main thread has a while to say the
        same of itself. Of a silent death there is nothing to add, and jax aborts where process 0 is the dead one."""
        self.dying.set()
        if self.ending.wait(GRACE if said else 0):
            return  # the main thread says what happened
        reason = f"{self.seat.name(process, host)} {why}"
        print(f"{self.seat.name(self.seat.process)} stops: {reason}", file=sys.stderr, flush=True)
        if self.seat.process == 0 or process == 0:
            self.record(reason)
        os._exit(CRASHED)
