"""A socket and uvicorn around the application. SIGTERM: no new connections, what runs is finished, then it ends."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from readme_jax.errors import ConfigError

BACKLOG = 2048  # connections that wait to be accepted
KEEP_ALIVE = 75  # seconds: longer than clients keep theirs, so that none is closed under a request
GRACE = 300  # seconds that requests under way have to end after SIGTERM
NICE = 5  # how far the threads that compute step back on CPU behind the one that answers
SWITCH = 5e-4  # seconds that another thread keeps the interpreter while the one that answers waits for it


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ConfigError when the address cannot be had."""
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port {port}: must be from 0 to {2**16 - 1}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as e:
        reason = (e.strerror or str(e)).split(" (while")[0].lower()
        raise ConfigError(f"cannot listen on {host} port {port} ({reason}): choose another --host or --port") from None


def url_of(listening: socket.socket) -> str:
    """Where clients reach it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def server(app: Starlette) -> uvicorn.Server:
    """A server to `run(sockets=[...])`, in the main thread where signals are to be heeded."""
    settings = uvicorn.Config(
        app,
        lifespan="on",
        log_level="warning",
        access_log=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=GRACE,
    )
    return uvicorn.Server(settings)


def answer_first() -> None:
    """Let the calling thread, which answers, come before the threads that compute: those that live now.

    They keep all cores busy, and a refusal would wait for its turn among them. Does nothing where threads have no
    priorities of their own (outside Linux).
    """
    sys.setswitchinterval(SWITCH)
    tasks = Path("/proc/self/task")
    for task in tasks.iterdir() if tasks.exists() else ():
        if int(task.name) != threading.get_native_id():
            with contextlib.suppress(OSError):  # it has just ended
                os.setpriority(os.PRIO_PROCESS, int(task.name), NICE)
