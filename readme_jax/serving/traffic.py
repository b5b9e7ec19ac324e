"""Requests to replay: arrivals and lengths of a trace, routes cut from real text.

A request's prompt and continuation are neighbouring tokens of one text stream, routed by a tuned router, so that
simulated traffic repeats and changes experts as real text does.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from readme_jax.errors import DataError
from readme_jax.serving.work import Route


class Arrival(NamedTuple):
    """One request of a trace."""

    arrival: float  # seconds after the first
    prompt: int  # tokens
    output: int  # tokens


@dataclass(frozen=True)
class Request:
    """A request to simulate; `routes` holds the experts of all its tokens, the output's too.

    `limit`: most tokens of output as the server knows it (0: exactly `output`). `tokens`: all of them, where prompts
    may share pages.
    """

    id: int
    arrival: float  # seconds
    prompt: int  # tokens
    output: int  # tokens
    routes: tuple[Route, ...]  # prompt + output of them
    limit: int = 0
    tokens: tuple[int, ...] = ()


def load_trace(path: str | Path) -> list[Arrival]:
    """Read a trace: gzipped JSON lines of `arrival_s`, `prompt_tokens`, `output_tokens`.

    Raises DataError when the file is missing or a line does not hold the three fields.
    """
    found = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                    found.append(Arrival(row["arrival_s"], row["prompt_tokens"], row["output_tokens"]))
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"{path}, line {number}: not a request of a trace ({error!r})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot read the trace ({error})") from error
    return found


def load_streams(path: str | Path, run: str) -> dict[str, np.ndarray]:
    """Experts of real text by one run's router, a flat uint8 array a domain, as `benchmarks/routes.py` writes them.

    Raises DataError when the file is missing or holds nothing of the run.
    """
    try:
        with np.load(path) as file:
            streams = {key.split("/", 1)[1]: file[key].ravel() for key in file.files if key.startswith(f"{run}/")}
    except OSError as error:
        raise DataError(f"{path}: cannot read routes ({error}); run benchmarks/routes.py") from error
    if not streams:
        raise DataError(f"{path}: no routes of run {run!r}")
    return streams


def make_traffic(
    trace: list[Arrival], streams: Mapping[str, np.ndarray], count: int, rate: float | None = None, seed: int = 0
) -> list[Request]:
    """`count` consecutive requests of a trace with routes of random places of random domains.

    Args:
        trace: where arrivals and lengths come from.
        streams: [tokens] experts a domain; requests longer than a stream are cut to it, the prompt first.
        count: requests; the window of the trace is drawn from the seed.
        rate: requests a second on average; time is stretched to it, bursts and all. None: all arrive at 0.

    Raises DataError when the trace is shorter than `count`.
    """
    if len(trace) < count or count < 1:
        raise DataError(f"a trace of {len(trace)} requests: cannot take {count} of it")
    rng = np.random.default_rng(seed)
    first = int(rng.integers(len(trace) - count + 1))
    window = trace[first : first + count]
    span = window[-1].arrival - window[0].arrival
    stretch = 0.0 if rate is None else count / rate / max(span, 1e-9)
    names = sorted(streams)
    longest = min(len(stream) for stream in streams.values())
    requests = []
    for index, row in enumerate(window):
        output = min(max(row.output, 1), longest - 1)
        prompt = min(max(row.prompt, 1), longest - output)
        stream = streams[names[int(rng.integers(len(names)))]]
        start = int(rng.integers(len(stream) - prompt - output + 1))
        routes = tuple(_SINGLE[e] for e in stream[start : start + prompt + output].tolist())
        requests.append(Request(index, (row.arrival - window[0].arrival) * stretch, prompt, output, routes))
    return requests


def at_rate(requests: list[Request], rate: float) -> list[Request]:
    """The same requests, stretched in time to another average rate (requests a second)."""
    span = requests[-1].arrival - requests[0].arrival
    stretch = len(requests) / rate / max(span, 1e-9)
    return [replace(r, arrival=r.arrival * stretch) for r in requests]


_SINGLE: tuple[Route, ...] = tuple((e,) for e in range(256))
