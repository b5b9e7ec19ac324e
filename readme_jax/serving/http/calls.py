"""From the engine's thread to the event loop: the events of one HTTP request, its cancellation when the client goes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from readme_jax.serving.engine import Draining, Engine, Handle
from readme_jax.serving.http.errors import ApiError, overloaded, unavailable
from readme_jax.serving.http.shapes import Shape, usage_of
from readme_jax.serving.request import Completion, Event, Overloaded, Request, Usage, complete

Queue = asyncio.Queue[tuple[int, Event]]


class Inbox:
    """Events for tasks of one loop: however many a step brings, the loop is woken once."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.waiting: deque[tuple[Queue, int, Event]] = deque()
        self.woken = False

    def post(self, queue: Queue, index: int, event: Event) -> None:
        """Called on any thread. A loop that has closed has nobody left to tell."""
        self.waiting.append((queue, index, event))
        if not self.woken:
            self.woken = True
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self.woken = False  # before reading: what is posted from here on wakes again
        while self.waiting:
            queue, index, event = self.waiting.popleft()
            queue.put_nowait((index, event))


class Call:
    """The engine's requests of one HTTP request, one a choice: all of them are in its queue, or none is."""

    def __init__(self, engine: Engine, inbox: Inbox, requests: Sequence[Request]) -> None:
        """Raises what `submit` raises: RequestError, Overloaded."""
        self.queue: Queue = asyncio.Queue()
        self.handles: list[Handle] = []
        try:
            for index, request in enumerate(requests):
                self.handles.append(engine.submit(request, partial(inbox.post, self.queue, index)))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Stop what is still running. Harmless when everything is done."""
        for handle in self.handles:
            handle.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Choice and event, until every choice has ended. Raises ApiError where the engine could not go on."""
        left = len(self.handles)
        while left:
            index, event = await self.queue.get()
            if event.finish_reason == "error":
                raise ApiError(500, event.error or "the engine failed", code="engine_error")
            if event.finish_reason == "cancelled":
                raise unavailable("the request was cancelled: the server is stopping")
            left -= event.finish_reason is not None
            yield index, event

    async def completions(self) -> list[Completion]:
        """Every choice, whole."""
        events: list[list[Event]] = [[] for _ in self.handles]
        async for index, event in self.events():
            events[index].append(event)
        return [complete(e) for e in events]


@contextlib.asynccontextmanager
async def watched(request: HttpRequest, call: Call) -> AsyncIterator[None]:
    """Cancels the call as soon as its client has gone, and whenever the block is left early."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        call.cancel()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        call.cancel()


class EventStream(StreamingResponse):
    """A call's chunks as server-sent events, `[DONE]` last. A client that goes cancels the call."""

    def __init__(self, call: Call, shape: Shape, usage: bool) -> None:
        super().__init__(_sent(call, shape, usage), media_type="text/event-stream", headers=_HEADERS)
        self.call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.call.cancel()


_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass each event on at once


async def _sent(call: Call, shape: Shape, usage: bool) -> AsyncIterator[str]:
    try:
        async for chunk in _chunks(call, shape, usage):
            yield _line(chunk)
    except ApiError as e:  # too late for a status
        yield _line(e.body())
    yield "data: [DONE]\n\n"


async def _chunks(call: Call, shape: Shape, usage: bool) -> AsyncIterator[dict[str, Any]]:
    """First pieces, one chunk an event, and the usage where it is wanted (other chunks then say that it is null)."""
    head = shape.chunk_head() | ({"usage": None} if usage else {})
    for choice in _present(shape.first(i) for i in range(len(call.handles))):
        yield head | {"choices": [choice]}
    usages: list[Usage] = []
    async for index, event in call.events():
        if event.usage is not None:
            usages.append(event.usage)
        yield head | {"choices": [shape.piece(index, event)]}
    if usage:
        yield head | {"choices": [], "usage": usage_of(usages)}


def _present(choices: Iterator[dict[str, Any] | None]) -> Iterator[dict[str, Any]]:
    return (c for c in choices if c is not None)


def _line(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


def refused(error: Overloaded) -> ApiError:
    """The engine's refusal as a response: 429 where its queue is full, 503 where it is shutting down."""
    return unavailable(str(error)) if isinstance(error, Draining) else overloaded(error.retry_after)
