"""What a user asks for and what comes back: requests, their validation, events and completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from readme_jax.errors import ReadMeError

MAX_STOPS = 4  # stop strings a request
MAX_STOP_LENGTH = 256  # characters of one
MAX_LOGPROBS = 20  # alternatives a token

FinishReason = Literal["stop", "length", "cancelled", "error"]


class RequestError(ReadMeError):
    """A request that cannot be served. `field` names the parameter that is wrong."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class Overloaded(ReadMeError):
    """The queue is full: nothing was done for this request. Try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to end. Greedy at temperature 0.

    Raises RequestError, naming the field, for a value of the wrong type or out of range.
    """

    max_tokens: int | None = None  # None: until the model ends or the row is full
    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0  # of the likeliest token's probability
    seed: int | None = None  # None: another sample each time
    stop: tuple[str, ...] = ()  # text that ends the answer; it is not part of it
    stop_ids: tuple[int, ...] = ()  # tokens that do, beside the model's own
    ignore_eos: bool = False  # go on past the model's end-of-text
    logprobs: int | None = None  # alternatives a token, 0 to 20; None: no log-probabilities at all
    echo: bool = False  # log-probabilities of the prompt's tokens too

    def __post_init__(self) -> None:
        for name in ("stop", "stop_ids"):
            value = getattr(self, name)
            if isinstance(value, str):
                value = (value,)
            if not isinstance(value, list | tuple):
                raise RequestError(name, f"{value!r} is no list")
            object.__setattr__(self, name, tuple(value))
        _number(self, "temperature", 0.0, math.inf)
        _number(self, "top_p", 0.0, 1.0, above=True)
        _number(self, "min_p", 0.0, 1.0)
        _integer(self, "top_k", 0, None)
        _integer(self, "max_tokens", 0, None, optional=True)
        _integer(self, "seed", None, None, optional=True)
        _integer(self, "logprobs", 0, MAX_LOGPROBS, optional=True)
        for name in ("ignore_eos", "echo"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(name, f"{getattr(self, name)!r}: must be true or false")
        self._check_stops()
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens", "0: must be above zero, unless the prompt is echoed")

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOPS:
            raise RequestError("stop", f"{len(self.stop)} stop strings: at most {MAX_STOPS}")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                raise RequestError("stop", f"{text!r:.40}: must be a text of 1 to {MAX_STOP_LENGTH} characters")


@dataclass(frozen=True)
class Request:
    """A prompt, as text or token ids, and how to go on from it. `id` is for logs; the engine gives one if it is empty.

    Text is encoded as it is, `special` tokens added around it or not.
    """

    prompt: str | Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    id: str = ""
    special: bool = True


class TokenLogprob(NamedTuple):
    """A token's log-probability, and the likeliest alternatives (token, log-probability), best first."""

    token: int
    logprob: float | None  # None: the prompt's first token, which nothing predicts
    top: tuple[tuple[int, float], ...]


class Usage(NamedTuple):
    """Tokens of a request: the prompt's, how many of them came from another request's pages, and the new ones."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int  # all that were sampled, the one that ended the answer and a stop string's too


@dataclass(frozen=True)
class Event:
    """News of a request. `text` may be shown at once: it holds no part of a stop string and whole characters only.

    `tokens`, with their `experts` and `logprobs` (empty unless asked for), are those whose text is complete with this
    event. The last event has a `finish_reason` and the `usage`; `error` says what went wrong where that is "error".
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    experts: tuple[tuple[int, ...], ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # once, before the first token, with `echo`
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: str | None = None


@dataclass(frozen=True)
class Completion:
    """All events of a request, put together."""

    text: str
    tokens: tuple[int, ...]
    experts: tuple[tuple[int, ...], ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    usage: Usage
    error: str | None = None


def complete(events: Sequence[Event]) -> Completion:
    """The completion that a request's events, the last one included, add up to."""
    last = events[-1]
    assert last.finish_reason is not None and last.usage is not None
    return Completion(
        text="".join(e.text for e in events),
        tokens=tuple(t for e in events for t in e.tokens),
        experts=tuple(x for e in events for x in e.experts),
        logprobs=tuple(p for e in events for p in e.logprobs),
        prompt_logprobs=tuple(p for e in events for p in e.prompt_logprobs),
        finish_reason=last.finish_reason,
        usage=last.usage,
        error=last.error,
    )


def check_tokens(name: str, tokens: Sequence[Any], vocab_size: int) -> list[int]:
    """Token ids as a list of ints. Raises RequestError for one that is no integer or not in [0, vocab_size)."""
    for token in tokens:
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise RequestError(name, f"{token!r:.40} is no token id")
        if not 0 <= int(token) < vocab_size:
            raise RequestError(name, f"token id {int(token)}: the vocabulary has {vocab_size}")
    return [int(token) for token in tokens]


def _number(params: SamplingParams, name: str, low: float, high: float, above: bool = False) -> None:
    value = getattr(params, name)
    real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not real or not low <= value <= high or (above and value == low):
        limits = f"in {'(' if above else '['}{low:g}, {high:g}]" if high < math.inf else f"{low:g} or more"
        raise RequestError(name, f"{value!r:.40}: must be a number {limits}")
    object.__setattr__(params, name, float(value))


def _integer(params: SamplingParams, name: str, low: int | None, high: int | None, optional: bool = False) -> None:
    value = getattr(params, name)
    if value is None and optional:
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or (low is not None and value < low) or (high is not None and value > high):
        limits = "" if low is None else f" from {low} to {high}" if high is not None else f", {low} or more"
        raise RequestError(name, f"{value!r:.40}: must be an integer{limits}")
