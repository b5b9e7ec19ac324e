"""Before a job of several processes computes anything: a roll call. While it runs: a watch over who is still there.

Every process tells process 0, over a plain TCP connection, who it is and what it is about to run. Process 0 waits until
all are there or the start time-out ends, and answers all of them with one verdict: a line that names who is missing or
what differs, or leave to go on. It comes before jax joins anything: processes of different jax versions may not be able
to talk through it. The connections then stay open (watch.py), so that a process that dies is noticed at once.

Messages are JSON, one a line.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Mapping
from typing import Any

from readme_jax.errors import ConfigError
from readme_jax.parallel.distributed import Seat

RETRY = 0.5  # seconds between attempts to reach process 0
SHOWN = 4  # differences in one message
LONGEST = 1 << 20  # bytes of a message

About = Mapping[str, Any]  # what must be equal everywhere: versions and the resolved config, flat


class Line:
    """One end of a connection that carries messages."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self.rest = connection, b""
        connection.setblocking(False)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message. Raises OSError when the other end is gone or has not read for 10 s."""
        self.socket.settimeout(10)
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        finally:
            self.socket.setblocking(False)

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have arrived. Raises OSError when the other end is gone, ValueError on what is no message.

        Call it when the socket is readable.
        """
        try:
            arrived = self.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        if not arrived:
            raise ConnectionResetError("the connection was closed")
        *lines, self.rest = (self.rest + arrived).split(b"\n")
        if len(self.rest) > LONGEST:
            raise ValueError("a message without end")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("not a message of this program")
        return messages

    def close(self) -> None:
        """Hang up."""
        self.socket.close()


def roll_call(seat: Seat, about: About, timeout: float) -> dict[int, tuple[str, Line]]:
    """Meet every other process; returns their host names and open lines, of process 0 alone elsewhere.

    Raises ConfigError, the same line in every process, when processes are missing after `timeout` seconds, when two
    have one number, or when what they are about to run differs.
    """
    deadline = time.monotonic() + timeout
    return _gather(seat, about, timeout, deadline) if seat.process == 0 else _report(seat, about, timeout, deadline)


# --- process 0 ----------------------------------------------------------------------------------------------------


def _gather(seat: Seat, about: About, timeout: float, deadline: float) -> dict[int, tuple[str, Line]]:
    server = _listen(seat.port + 1)
    waiting: list[Line] = []
    there: dict[int, tuple[str, Line]] = {}
    problems: list[str] = []
    with selectors.DefaultSelector() as ready, server:
        ready.register(server, selectors.EVENT_READ)
        while len(there) < seat.processes - 1 and (left := deadline - time.monotonic()) > 0:
            for key, _ in ready.select(left):
                if key.fileobj is server:
                    line = Line(server.accept()[0])
                    ready.register(line.socket, selectors.EVENT_READ, line)
                    waiting.append(line)
                else:
                    _hear(key.data, seat, about, there, problems, ready)
    for line in (line for line in waiting if line not in [known for _, known in there.values()]):
        _try(line, {"refused": problems[-1] if problems else "not a process of this job"})
        line.close()
    missing = [p for p in range(1, seat.processes) if p not in there]
    if missing:
        names = ", ".join(seat.name(p) for p in missing)
        problems.insert(
            0,
            f"{len(missing)} of {seat.processes} processes did not report to {seat.host}:{seat.port + 1} within "
            f"{timeout:g} s (Cluster.start_timeout): {names}",
        )
    verdict = {"refused": "; ".join(problems[:SHOWN])} if problems else {"go": True}
    for _, line in there.values():
        _try(line, verdict)
    if problems:
        for _, line in there.values():
            line.close()
        raise ConfigError(str(verdict["refused"]))
    return there


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server(("", port), backlog=1024)
    except OSError as e:
        raise ConfigError(
            f"process 0 cannot listen on port {port} ({e.strerror}): is another job running here? "
            "Choose another port in Cluster.coordinator"
        ) from e


def _hear(
    line: Line,
    seat: Seat,
    about: About,
    there: dict[int, tuple[str, Line]],
    problems: list[str],
    ready: selectors.BaseSelector,
) -> None:
    """Take down what a process reports; one that goes away may call again."""
    try:
        messages = line.receive()
    except (OSError, ValueError):
        ready.unregister(line.socket)
        for gone in [p for p, (_, known) in there.items() if known is line]:
            del there[gone]
        return
    for message in messages:
        process: Any = message.get("process")
        host = str(message.get("host"))
        if not isinstance(process, int) or not 0 < process < seat.processes:
            problems.append(f"process {process} ({host}) reported to a job of {seat.processes} processes")
        elif process in there:
            problems.append(f"two processes call themselves {process}: on {there[process][0]} and on {host}")
        else:
            there[process] = host, line
            problems += _differences(seat.name(process, host), message.get("about", {}), about)


def _differences(name: str, theirs: About, ours: About) -> list[str]:
    ours = json.loads(json.dumps(dict(ours)))  # as it would arrive
    differing = [
        f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} on process 0"
        for key in sorted({*theirs, *ours})
        if theirs.get(key) != ours.get(key)
    ]
    more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    return [f"{name} differs: {', '.join(differing[:SHOWN])}{more}"] if differing else []


def _try(line: Line, message: Mapping[str, Any]) -> None:
    """Send to one that may be gone already."""
    try:
        line.send(message)
    except OSError:
        line.close()


# --- the others ---------------------------------------------------------------------------------------------------


def _report(seat: Seat, about: About, timeout: float, deadline: float) -> dict[int, tuple[str, Line]]:
    where = f"{seat.host}:{seat.port + 1}"
    absent = ConfigError(
        f"{seat.name(0)} did not answer at {where} within {timeout:g} s (Cluster.start_timeout): is it running, and "
        "does every host reach that port?"
    )
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = Line(socket.create_connection((seat.host, seat.port + 1), timeout=min(left, 10)))
        except OSError:  # not up yet, or its name not known yet
            time.sleep(min(RETRY, left))
            continue
        try:
            line.send({"process": seat.process, "host": socket.gethostname(), "about": dict(about)})
            verdict = _answer(line, deadline + RETRY)  # process 0 may have begun to wait later than this one
        except (OSError, ValueError):  # gone again: it may be restarting
            line.close()
            time.sleep(RETRY)
            continue
        if verdict is None:
            break
        if "refused" in verdict:
            raise ConfigError(str(verdict["refused"]))
        return {0: (seat.host, line)}
    raise absent


def _answer(line: Line, deadline: float) -> dict[str, Any] | None:
    """Process 0's verdict, None when the time is up."""
    with selectors.DefaultSelector() as ready:
        ready.register(line.socket, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if ready.select(left):
                messages = line.receive()
                if messages:
                    return messages[0]
    return None
