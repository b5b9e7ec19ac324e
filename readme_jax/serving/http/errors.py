"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

log = logging.getLogger(__name__)
Endpoint = Callable[[Request], Awaitable[Response]]


class ApiError(Exception):
    """A request that gets no answer: HTTP status, one clear line, and the parameter that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        """The JSON object that the client reads."""
        return {"error": {"message": str(self), "type": _kind(self.status), "param": self.param, "code": self.code}}


def overloaded(retry_after: float) -> ApiError:
    """429 with Retry-After in whole seconds, at least one."""
    seconds = max(1, math.ceil(retry_after))
    message = f"the queue is full: try again in {seconds} s"
    return ApiError(429, message, None, "rate_limit_exceeded", {"Retry-After": str(seconds)})


def unavailable(message: str) -> ApiError:
    """503: warming up, draining or stalled."""
    return ApiError(503, message, None, "unavailable", {"Retry-After": "1"})


def _kind(status: int) -> str:
    return "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"


def respond(error: ApiError) -> Response:
    """The error as a response."""
    return JSONResponse(error.body(), error.status, error.headers)


def answering(endpoint: Endpoint) -> Endpoint:
    """An endpoint whose exceptions become responses, on a connection that stays open.

    What is ours to mend is 500: its traceback goes to the log, nothing of it to the client.
    """

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ApiError as e:
            return respond(e)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except Exception:
            log.exception("%s %s failed", request.method, request.url.path)
            return respond(ApiError(500, "an internal error: see the server's log"))

    return answer


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail.lower()}"
    return respond(ApiError(error.status_code, message, headers=error.headers))
