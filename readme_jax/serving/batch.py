"""Prompts of a file through the engine to a file of answers, one JSON object a line each way; resumes where it stopped.

A line of the input is {"prompt": text or token ids, ...} with any field of `SamplingParams`, and an "id" of its own or
its line number. A line of the output is {"id", "text", "tokens", "finish_reason", "usage"} and what was asked for of
"logprobs" and "prompt_logprobs", or {"id", "error", "field"} for a request that cannot be served; in the order in which
they end.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from readme_jax.errors import DataError
from readme_jax.serving.engine import Draining, Engine
from readme_jax.serving.request import Completion, Event, Overloaded, Request, RequestError, SamplingParams, complete

PAUSE = 0.05  # seconds between tries while the queue is full of others' requests
FIELDS = frozenset(f.name for f in dataclasses.fields(SamplingParams))


class Item(NamedTuple):
    """A line of the input: its id, and the request or what is wrong with it."""

    id: str
    request: Request | RequestError


def read_prompts(path: str | Path, chat: Callable[[str], str | None] | None = None) -> list[Item]:
    """The requests of a file; `chat` puts a text into the model's chat template, where it has one.

    Raises DataError for a file that cannot be read, a line that is no JSON object, and two lines of one id.
    """
    items: list[Item] = []
    seen: set[str] = set()
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as e:
            raise DataError(f"{path}:{number}: not JSON ({e})") from None
        if not isinstance(values, dict):
            raise DataError(f"{path}:{number}: expected a JSON object with a prompt")
        id = str(values.pop("id", number))
        if id in seen:
            raise DataError(f"{path}:{number}: id {id!r} occurs twice")
        seen.add(id)
        items.append(Item(id, _request(values, chat)))
    return items


def done_ids(path: str | Path) -> set[str]:
    """Ids that an output file holds already. A last line that was cut short is removed from it."""
    path = Path(path)
    if not path.exists():
        return set()
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    ids = set()
    try:
        for line in text[:whole].decode("utf-8").splitlines():
            answer = json.loads(line)
            if not {"text", "error"} & set(answer):
                raise KeyError("text")
            ids.add(str(answer["id"]))
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: it holds no answers: give another --out") from None
    if whole < len(text):
        if not text[whole:].startswith(b'{"id": '):
            raise DataError(f"{path}: it holds no answers: give another --out")
        with path.open("r+b") as f:
            f.truncate(whole)
    return ids


def run_batch(
    engine: Engine, items: list[Item], out: str | Path, progress: Callable[[int], None] | None = None
) -> tuple[int, int]:
    """Run the items that `out` does not hold yet through a started engine, and append their answers as they come.

    `progress(tokens)` is told of each finished request's prompt and new tokens. Returns how many were answered and how
    many of them with an error. Interrupted, it leaves whole lines, and goes on from there when called again. Raises
    Draining where the engine takes no more requests.
    """
    done = done_ids(out)
    todo = [item for item in items if item.id not in done]
    ended: queue.SimpleQueue[tuple[str, list[Event]]] = queue.SimpleQueue()
    waiting, errors = 0, 0
    handles = []
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with Path(out).open("a", encoding="utf-8") as f:

        def write(answer: dict[str, Any]) -> None:
            f.write(json.dumps(answer, ensure_ascii=False) + "\n")
            f.flush()

        def take() -> bool:
            id, events = ended.get()
            completion = complete(events)
            write(_answer(id, completion))
            if progress is not None:
                progress(completion.usage.prompt_tokens + completion.usage.completion_tokens)
            return completion.error is not None

        try:
            for item in todo:
                while True:
                    try:
                        handles.append(_submit(engine, item, ended))
                        waiting += 1
                        break
                    except RequestError as e:
                        write({"id": item.id, "error": e.message, "field": e.field})
                        errors += 1
                        break
                    except Draining:
                        raise
                    except Overloaded:  # the queue is bounded: wait for one of ours to end, or for others'
                        if waiting:
                            errors += take()
                            waiting -= 1
                        else:
                            time.sleep(PAUSE)
            for _ in range(waiting):
                errors += take()
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
    return len(todo), errors


def _submit(engine: Engine, item: Item, ended: queue.SimpleQueue[tuple[str, list[Event]]]) -> Any:
    if isinstance(item.request, RequestError):
        raise item.request
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        if event.finish_reason is not None:
            ended.put((item.id, events))

    return engine.submit(item.request, listen)


def _answer(id: str, done: Completion) -> dict[str, Any]:
    answer: dict[str, Any] = {"id": id, "text": done.text, "tokens": done.tokens, "finish_reason": done.finish_reason}
    answer["usage"] = done.usage._asdict()
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(done, name):
            answer[name] = [p._asdict() for p in getattr(done, name)]
    if done.error is not None:
        answer["error"] = done.error
    return answer


def _request(values: dict[str, Any], chat: Callable[[str], str | None] | None) -> Request | RequestError:
    unknown = sorted(set(values) - FIELDS - {"prompt"})
    if unknown:
        return RequestError(unknown[0], "no such parameter")
    if "prompt" not in values:
        return RequestError("prompt", "it is missing")
    prompt = values.pop("prompt")
    framed = chat(prompt) if chat is not None and isinstance(prompt, str) and prompt else None
    try:
        return Request(prompt if framed is None else framed, SamplingParams(**values), special=framed is None)
    except RequestError as e:
        return e


def _lines(path: str | Path) -> Iterator[str]:
    try:
        with Path(path).open(encoding="utf-8") as f:
            yield from f
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}; give a file of prompts, one JSON object a line") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None
