"""The application: /v1/models, /v1/completions, /v1/chat/completions, /v1/route, /health, /ready."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from readme_jax.checkpoints.tokenizer import Tokenizer
from readme_jax.errors import CheckpointError
from readme_jax.serving.engine import Engine, PromptRoute
from readme_jax.serving.http import schema
from readme_jax.serving.http.calls import Call, EventStream, Inbox, refused, watched
from readme_jax.serving.http.errors import ApiError, answering, on_http_error, unavailable
from readme_jax.serving.http.shapes import ChatShape, CompletionShape, Shape, usage_of
from readme_jax.serving.http.tokens import TokenTexts
from readme_jax.serving.request import Overloaded, Request, RequestError, SamplingParams

DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI has it; a chat goes on until the model ends


class Service:
    """One engine, one tokenizer, one name. The engine is started and stopped with the application."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, name: str, experts: Sequence[str] = ()) -> None:
        """`experts` are their names, by index (empty: a dense model)."""
        self.engine, self.tokenizer, self.name, self.experts = engine, tokenizer, name, list(experts)
        self.texts = TokenTexts(tokenizer)
        self.created = int(time.time())
        self.inbox: Inbox | None = None  # while the application runs

    # --- endpoints ------------------------------------------------------------------------------------------------

    async def models(self, _: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def model(self, request: HttpRequest) -> Response:
        self._known(request.path_params["name"])
        return JSONResponse(self._about())

    async def completions(self, request: HttpRequest) -> Response:
        self._room()
        body = await schema.read(request, schema.CompletionBody)
        self._checked(body)
        prompts = body.prompts
        if len(prompts) > self.engine.settings.queue:  # no waiting would make room
            most = f"at most {self.engine.settings.queue} in one request"
            raise ApiError(400, f"prompt: {len(prompts)} prompts: {most}", "prompt", "invalid_value")
        wanted = body.max_tokens if body.max_tokens is not None else DEFAULT_MAX_TOKENS
        scored = body.logprobs is not None or wanted == 0  # an echo alone needs no pass of the model for its prompt
        names = {"stop_ids": "stop_token_ids"} | ({"max_tokens": "prompt"} if body.max_tokens is None else {})
        params = _params(body, wanted, body.logprobs, body.echo and scored, names)
        if params.echo and wanted == 1:  # lm-eval drops the last entry as the new token's: end-of-text needs one too
            params = replace(params, ignore_eos=True)
        echoed = None
        if body.echo:
            echoed = [p if isinstance(p, str) else self._decoded(p) for p in prompts]
        shape = CompletionShape(self.texts, self.name, body.logprobs is not None, echoed)
        return await self._answer(request, [Request(p, params) for p in prompts], shape, body, names)

    async def chat(self, request: HttpRequest) -> Response:
        self._room()
        body = await schema.read(request, schema.ChatBody)
        self._checked(body)
        names = {"stop_ids": "stop_token_ids", "logprobs": "top_logprobs", "prompt": "messages"}
        wanted = body.max_tokens
        if body.max_completion_tokens is not None:
            wanted, names["max_tokens"] = body.max_completion_tokens, "max_completion_tokens"
        params = _params(body, wanted, body.alternatives, False, names)
        text = await to_thread.run_sync(self._rendered, body.messages)
        shape = ChatShape(self.texts, self.name, body.logprobs)
        return await self._answer(request, [Request(text, params, special=False)], shape, body, names)

    async def route(self, request: HttpRequest) -> Response:
        """Which experts a prompt will use, and the bytes they would load now: before any generation."""
        body = await schema.read(request, schema.RouteBody)
        self._known(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", "prompt", "missing_required_parameter")
        if body.messages is not None:
            text = await to_thread.run_sync(self._rendered, body.messages)
            prompt: schema.Prompt = self.tokenizer.encode(text, special=False)
        else:
            found = schema.prompts_of(body.prompt)
            if len(found) > 1 or found[0] is not body.prompt:
                raise ApiError(400, "prompt must be one text or one list of token ids", "prompt", "invalid_value")
            prompt = found[0]
        try:
            routed = await to_thread.run_sync(self.engine.route, prompt)
        except RequestError as e:
            raise _bad_request(e, {"prompt": "prompt" if body.messages is None else "messages"}) from None
        return JSONResponse(self._routed(routed))

    async def health(self, _: HttpRequest) -> Response:
        """200 while the engine's thread makes steps or has nothing to do."""
        return _status(self.engine.healthy, "the engine makes no steps")

    async def ready(self, _: HttpRequest) -> Response:
        """200 once the warm-up is done, while the engine is healthy and takes requests."""
        return _status(self.engine.ready, "warming up, draining or stalled")

    # --- parts ----------------------------------------------------------------------------------------------------

    def _room(self) -> None:
        """429 before the body is even read where the queue is full."""
        try:
            self.engine.check_room()
        except Overloaded as e:
            raise refused(e) from None

    def _checked(self, body: schema.Sampled) -> None:
        self._known(body.model)
        body.supported()

    def _known(self, model: str | None) -> None:
        if model not in (None, self.name):
            raise ApiError(404, f"no model {model!r} here: there is {self.name!r}", "model", "model_not_found")

    def _about(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "readme_jax"}

    def _decoded(self, ids: list[int]) -> str:
        """Text of an echoed prompt; ids that the engine will refuse have none."""
        return self.tokenizer.decode((i for i in ids if 0 <= i < self.tokenizer.vocab_size), special=True)

    def _rendered(self, messages: Sequence[schema.Message]) -> str:
        """A conversation as the prompt of its answer, by the checkpoint's template."""
        try:
            text = self.tokenizer.chat([m.plain() for m in messages])
        except CheckpointError as e:
            raise ApiError(400, str(e), "messages", "invalid_value") from None
        if text is None:
            raise ApiError(400, f"{self.name} has no chat template: use /v1/completions", "messages")
        return text

    async def _answer(
        self, http: HttpRequest, requests: list[Request], shape: Shape, body: schema.Sampled, names: Mapping[str, str]
    ) -> Response:
        """Submit one request a choice, and answer with the stream or the whole. `names` are parameters by field."""
        if self.inbox is None:
            raise unavailable("the server is starting")
        try:
            call = await to_thread.run_sync(Call, self.engine, self.inbox, requests)
        except RequestError as e:
            raise _bad_request(e, names) from None
        except Overloaded as e:
            raise refused(e) from None
        if body.stream:
            return EventStream(call, shape, body.usage_chunk)
        async with watched(http, call):
            done = await call.completions()
        choices = [shape.choice(i, c) for i, c in enumerate(done)]
        return JSONResponse(shape.head() | {"choices": choices, "usage": usage_of(c.usage for c in done)})

    def _routed(self, routed: PromptRoute) -> dict[str, Any]:
        used = Counter(e for route in routed.experts for e in route)
        experts = [
            {
                "index": e,
                "name": self.experts[e] if e < len(self.experts) else f"expert {e}",
                "tokens": count,
                "resident": e not in routed.load,
            }
            for e, count in sorted(used.items(), key=lambda item: (-item[1], item[0]))
        ]
        return {
            "object": "route",
            "model": self.name,
            "prompt_tokens": len(routed.tokens),
            "experts": experts,
            "routes": [list(route) for route in routed.experts],
            "load_bytes": routed.load_bytes,
        }


def create_app(
    service: Service,
    progress: Callable[[int, int], None] | None = None,
    started: Callable[[], None] = lambda: None,
) -> Starlette:
    """The ASGI application. Its start-up starts the engine, which warms up meanwhile and reports `progress` (programs
    compiled, of how many), and calls `started`; its shutdown drains and stops the engine.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.inbox = Inbox()
        service.engine.start(progress)
        started()
        try:
            yield
        finally:
            await to_thread.run_sync(service.engine.drain)
            await to_thread.run_sync(service.engine.stop)

    routes = [
        Route("/v1/models", answering(service.models)),
        Route("/v1/models/{name:path}", answering(service.model)),
        Route("/v1/completions", answering(service.completions), methods=["POST"]),
        Route("/v1/chat/completions", answering(service.chat), methods=["POST"]),
        Route("/v1/route", answering(service.route), methods=["POST"]),
        Route("/health", answering(service.health)),
        Route("/ready", answering(service.ready)),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: on_http_error}, lifespan=lifespan)


def _params(
    body: schema.Sampled, max_tokens: int | None, logprobs: int | None, echo: bool, names: Mapping[str, str]
) -> SamplingParams:
    """A body's sampling parameters. Raises ApiError naming the parameter, as it is called in the body."""
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            min_p=body.min_p,
            seed=body.seed,
            stop=body.stops,
            stop_ids=tuple(body.stop_token_ids),
            logprobs=logprobs,
            echo=echo,
        )
    except RequestError as e:
        raise _bad_request(e, names) from None


def _bad_request(error: RequestError, names: Mapping[str, str]) -> ApiError:
    name = names.get(error.field, error.field)
    return ApiError(400, f"{name}: {error.message}", name, "invalid_value")


def _status(ok: bool, otherwise: str) -> Response:
    if not ok:
        raise unavailable(otherwise)
    return JSONResponse({"status": "ok"})
