"""Events of the engine as the objects of OpenAI's interface: whole answers, chunks of a stream, logprobs, usage."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from readme_jax.serving.http.tokens import TokenTexts
from readme_jax.serving.request import Completion, Event, TokenLogprob, Usage

LOWEST = -9999.0  # a probability of zero: JSON has no infinity


class Shape(Protocol):
    """How one kind of answer looks: `choice` whole, or piece by piece; `first` pieces come before any event."""

    def head(self) -> dict[str, Any]: ...
    def chunk_head(self) -> dict[str, Any]: ...
    def choice(self, index: int, done: Completion) -> dict[str, Any]: ...
    def first(self, index: int) -> dict[str, Any] | None: ...
    def piece(self, index: int, event: Event) -> dict[str, Any]: ...


class CompletionShape:
    """`text_completion`. With `echo` each choice begins with its prompt's text, `prompts[index]`."""

    def __init__(self, texts: TokenTexts, model: str, logprobs: bool, prompts: Sequence[str] | None) -> None:
        self.texts, self.logprobs, self.prompts = texts, logprobs, prompts
        self.header = _header("cmpl", "text_completion", model)
        self.offsets: dict[int, int] = {}  # choice -> where its next token begins, in a stream

    def head(self) -> dict[str, Any]:
        return self.header

    def chunk_head(self) -> dict[str, Any]:
        return self.header

    def choice(self, index: int, done: Completion) -> dict[str, Any]:
        text = done.text if self.prompts is None else self.prompts[index] + done.text
        found = (*done.prompt_logprobs, *done.logprobs)
        return self._choice(index, text, self._block(found, 0), done.finish_reason)

    def first(self, index: int) -> dict[str, Any] | None:
        """The prompt, unless its logprobs are to come with it."""
        if self.prompts is None or self.logprobs:
            return None
        return self._choice(index, self.prompts[index], None, None)

    def piece(self, index: int, event: Event) -> dict[str, Any]:
        text = event.text
        if self.prompts is not None and event.prompt_logprobs:
            text = self.prompts[index] + text
        found = (*event.prompt_logprobs, *event.logprobs)
        start = self.offsets.get(index, 0)
        self.offsets[index] = self.texts.offsets([*(p.token for p in found), 0], start)[-1]
        return self._choice(index, text, self._block(found, start), event.finish_reason)

    def _choice(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _block(self, found: Sequence[TokenLogprob], start: int) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return {
            "tokens": [self.texts.text(p.token) for p in found],
            "token_logprobs": [None if p.logprob is None else _finite(p.logprob) for p in found],
            "top_logprobs": [self._top(p) for p in found],
            "text_offset": self.texts.offsets((p.token for p in found), start),
        }

    def _top(self, found: TokenLogprob) -> dict[str, float] | None:
        """The alternatives and the token itself; of tokens with one text the likeliest counts."""
        if found.logprob is None:
            return None
        top: dict[str, float] = {}
        for token, logprob in (*found.top, (found.token, found.logprob)):
            top.setdefault(self.texts.text(token), _finite(logprob))
        return top


class ChatShape:
    """`chat.completion` and `chat.completion.chunk`."""

    def __init__(self, texts: TokenTexts, model: str, logprobs: bool) -> None:
        self.texts, self.logprobs = texts, logprobs
        self.header = _header("chatcmpl", "chat.completion", model)

    def head(self) -> dict[str, Any]:
        return self.header

    def chunk_head(self) -> dict[str, Any]:
        return self.header | {"object": "chat.completion.chunk"}

    def choice(self, index: int, done: Completion) -> dict[str, Any]:
        message = {"role": "assistant", "content": done.text, "refusal": None}
        logprobs = self._block(done.logprobs)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": done.finish_reason}

    def first(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, event: Event) -> dict[str, Any]:
        delta = {"content": event.text} if event.text else {}
        logprobs = self._block(event.logprobs)
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": event.finish_reason}

    def _block(self, found: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        entries = []
        for p in found:
            top = [self._entry(token, logprob) for token, logprob in p.top]
            entries.append(self._entry(p.token, p.logprob) | {"top_logprobs": top})
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        value = _finite(LOWEST if logprob is None else logprob)
        return {"token": self.texts.text(token), "logprob": value, "bytes": list(self.texts.bytes(token))}


def usage_of(usages: Iterable[Usage]) -> dict[str, Any]:
    """The sum of the choices' usage."""
    prompt, cached, new = (sum(counts) for counts in zip(*usages, strict=True))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _header(prefix: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def _finite(logprob: float) -> float:
    return max(float(logprob), LOWEST)
