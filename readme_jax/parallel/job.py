"""A run's life as a job: joined by its processes, watched, and recorded in `<output>/status.json` however it ends."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax

from readme_jax import config
from readme_jax.errors import ConfigError, ReadMeError
from readme_jax.files import write_text
from readme_jax.parallel.distributed import connect, find_seat, lead
from readme_jax.parallel.preflight import roll_call
from readme_jax.parallel.watch import CRASHED, Watch

STATUS = "status.json"
SAME = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")  # packages whose versions must agree
Status = Literal["running", "finished", "preempted", "crashed"]


class Preempted(SystemExit):
    """The run was told to stop and has saved itself. Uncaught, the process exits with the code it carries."""


def agreed(run: config.Run) -> dict[str, Any]:
    """What all processes of a job must have alike: versions, and every setting but those of `Cluster`."""
    versions = {name: importlib.metadata.version(name) for name in SAME}
    settings = {k: v for k, v in config.flat(config.to_dict(run)).items() if not k.startswith("cluster.")}
    return {"python": platform.python_version(), **versions, **settings}


def config_hash(run: config.Run) -> str:
    """Of every setting that must agree: equal runs have equal hashes."""
    return hashlib.sha256(json.dumps(agreed(run), sort_keys=True).encode()).hexdigest()[:12]


class Record:
    """`<output>/status.json`: {status, why, attempts: [{status, why, began, ended, processes, devices, config}]}.

    One attempt a start of the run, in seconds since the epoch; `status` and `why` are the newest one's. An attempt that
    still says `running` when the next begins was killed without a word, and is put down as crashed.
    """

    def __init__(self, output: str | Path) -> None:
        self.path = Path(output) / STATUS
        self.attempts: list[dict[str, Any]] = []
        self.before: str | None = None  # the file as it was

    def began(self, about: Mapping[str, Any]) -> None:
        """A new attempt, running."""
        self.before = self.path.read_text() if self.path.is_file() else None
        self.attempts = self._before()
        self.attempts.append({"status": "running", "why": None, "began": time.time(), "ended": None, **about})
        self._write()

    def ended(self, status: Status, why: str | None = None) -> None:
        """How the attempt ended. Also from another process than the one that began it."""
        if not self.attempts:
            self.attempts = json.loads(self.path.read_text())["attempts"] if self.path.is_file() else [{"began": None}]
        self.attempts[-1] |= {"status": status, "why": why, "ended": time.time()}
        self._write()

    def crashed(self, why: str) -> None:
        """The attempt ended by a failure; says nothing where the disk refuses."""
        try:
            self.ended("crashed", why)
        except OSError as e:
            print(f"{self.path} not written: {e.strerror}", file=sys.stderr)

    def refused(self, error: ReadMeError) -> None:
        """The attempt ended on bad input. Settings that do not fit a run, or input of one that has saved nothing yet,
        leave what was there; anything else is a crash."""
        folder = self.path.parent
        if not isinstance(error, ConfigError) and any(p != self.path for p in folder.iterdir()):
            self.crashed(_line(error))
        elif self.before is not None:
            write_text(self.path, self.before)
        else:
            self.path.unlink()
            if not any(folder.iterdir()):
                folder.rmdir()

    def _before(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        attempts = json.loads(self.path.read_text())["attempts"]
        for attempt in attempts:
            if attempt["status"] == "running":
                attempt |= {"status": "crashed", "why": "killed without a word"}
        return attempts

    def _write(self) -> None:
        last = self.attempts[-1]
        content = {"status": last["status"], "why": last["why"], "attempts": self.attempts}
        write_text(self.path, json.dumps(content, indent=2) + "\n")


def first_began(output: str | Path) -> float | None:
    """When a run was first started, in seconds since the epoch; None where no record says."""
    path = Path(output) / STATUS
    return json.loads(path.read_text())["attempts"][0]["began"] if path.is_file() else None


@contextmanager
def take_part(run: config.Run) -> Iterator[None]:
    """A block of work as one process of a job, or as its only one. Joins before anything touches a device.

    Raises ConfigError, one line, when the processes do not all come or do not agree. Inside, the death of any process
    ends all of them (`watch`).
    """
    seat, record, watch = find_seat(run.cluster), Record(run.output), None
    if seat is not None:
        lines = roll_call(seat, agreed(run), run.cluster.start_timeout)
        watch = Watch(seat, lines, run.cluster.heartbeat_timeout, record.crashed)
        connect(seat, run.cluster)
    try:
        if lead():
            about = {"processes": jax.process_count(), "devices": jax.device_count(), "config": config_hash(run)}
            record.began(about)
            if seat is not None:
                local = jax.local_device_count()
                print(f"{seat.processes} processes, {local} devices here, config {about['config']}", file=sys.stderr)
        yield
    except BaseException as e:
        stopped = isinstance(e, Preempted | KeyboardInterrupt)
        if watch is not None and not stopped:
            if isinstance(e, RuntimeError):  # jax's are
                watch.defer()
            watch.failed(_line(e))
        if lead():
            if stopped:
                record.ended("preempted", _line(e))
            elif isinstance(e, ReadMeError):
                record.refused(e)
            else:
                record.crashed(_line(e))
        if watch is not None and isinstance(e, Preempted):
            _part(watch)
        raise
    if lead():
        record.ended("finished")
    if watch is not None:
        _part(watch)


def leave(code: int) -> None:
    """End a process of a job of several that has failed, with a traceback where an exception is under way.

    jax's own farewell would wait for every process, and the dead never come. Returns where this process is alone.
    """
    if jax.distributed.is_initialized():
        if sys.exception() is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or CRASHED)


def _part(watch: Watch) -> None:
    """Leave together, all alive."""
    jax.distributed.shutdown()
    watch.finished()


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    name = "" if isinstance(error, SystemExit | ReadMeError) else type(error).__name__
    return ": ".join(filter(None, (name, text)))
