"""Request bodies as pydantic models: types and names here; ranges are the engine's to check.

What OpenAI's interface has and this server does not is refused by name unless it asks for nothing (`n` = 1).
"""

from __future__ import annotations

import json
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from readme_jax.serving.http.errors import ApiError

MAX_BODY = 16 * 2**20  # bytes
Prompt = str | list[int]  # text or token ids
B = TypeVar("B", bound="Body")


class StreamOptions(BaseModel):
    """`include_usage`: one more chunk at the end, without choices."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against eavesdroppers: accepted, never sent


class Body(BaseModel):
    """What every kind of body may say."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    user: str | None = None


class Sampled(Body):
    """What decides how tokens are chosen and when they end, in both kinds of completions."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all. With min_p and stop_token_ids, names that other servers use too
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    max_tokens: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] = Field(default_factory=dict)
    store: bool = False
    metadata: dict[str, str] = Field(default_factory=dict)

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def usage_chunk(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def supported(self) -> None:
        """Raise ApiError for a feature that is asked for and not there."""
        for name in ("presence_penalty", "frequency_penalty", "logit_bias", "store"):
            if getattr(self, name):
                raise ApiError(400, f"{name} is not supported", name, "unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream = true", "stream_options")


class CompletionBody(Sampled):
    """POST /v1/completions."""

    prompt: Any  # a text, texts, token ids or lists of token ids: see `prompts`
    echo: bool = False
    logprobs: int | None = None
    best_of: Literal[1] = 1
    suffix: Literal[""] = ""

    @property
    def prompts(self) -> list[Prompt]:
        """One entry a choice. Raises ApiError for anything else than texts and token ids."""
        return prompts_of(self.prompt)


class TextPart(BaseModel):
    """A part of a message's content: text is the only kind there is."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: str
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates read it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(p.text for p in parts)
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name is not None else {})


class TextFormat(BaseModel):
    """The only response format there is."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]


class ChatBody(Sampled):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    response_format: TextFormat | None = None

    @property
    def alternatives(self) -> int | None:
        """Top alternatives a token; None: no logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def supported(self) -> None:
        super().supported()
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs = true", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens differ: give one", "max_completion_tokens")


class RouteBody(Body):
    """POST /v1/route: either a prompt or messages."""

    prompt: Any = None  # a text or token ids
    messages: list[Message] | None = None


def prompts_of(value: Any) -> list[Prompt]:
    """A prompt as OpenAI takes it (text, texts, ids, lists of ids) as a list. Raises ApiError for anything else."""
    if isinstance(value, str) or _ids(value):
        return [value]
    if isinstance(value, list) and value and (all(isinstance(p, str) for p in value) or all(_ids(p) for p in value)):
        return value
    empty = isinstance(value, list) and not value
    rule = "is empty" if empty else "must be a text, a list of texts, a list of token ids or a list of such lists"
    raise ApiError(400, f"prompt {rule}", "prompt", "invalid_value")


def _ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


async def read(request: Request, kind: type[B]) -> B:
    """The request's body as a `kind`. Raises ApiError naming the parameter; a null counts as not given."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY:
            raise ApiError(413, f"the body passes {MAX_BODY} bytes")
    try:
        values: Any = json.loads(body)
        if b"\\u" in body:  # escapes may name half a surrogate pair, which no text can hold
            json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"the body is not JSON: {e}") from None
    if not isinstance(values, dict):
        raise ApiError(400, f"the body is a JSON {type(values).__name__}: give an object")
    try:
        return kind.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as e:
        raise _explained(e) from None


def _explained(error: ValidationError) -> ApiError:
    """The deepest of pydantic's findings: of a union, the alternative that came closest."""
    found = max(error.errors(include_url=False, include_input=False), key=lambda f: len(f["loc"]))
    param = str(found["loc"][0])
    if found["type"] == "extra_forbidden" and len(found["loc"]) == 1:
        return ApiError(400, f"unrecognized parameter: {param}", param, "unknown_parameter")
    if found["type"] == "missing" and len(found["loc"]) == 1:
        return ApiError(400, f"you must give {param}", param, "missing_required_parameter")
    place = ".".join(str(p) for p in found["loc"] if not str(p).startswith(("list[", "function-")))
    message = found["msg"][:1].lower() + found["msg"][1:]
    return ApiError(400, f"{place}: {message}", param, "invalid_value")
