"""A socket and uvicorn around the application. SIGTERM: no new connections, what runs is finished, then it ends."""

from __future__ import annotations

import socket

import uvicorn
from starlette.applications import Starlette

from readme_jax.errors import ConfigError

BACKLOG = 2048  # connections that wait to be accepted
KEEP_ALIVE = 75  # seconds: longer than clients keep theirs, so that none is closed under a request
GRACE = 300  # seconds that requests under way have to end after SIGTERM


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
