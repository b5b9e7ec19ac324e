"""Overload: `python benchmarks/overload.py --checkpoint runs/demo/export`. Throughput at 8x the load that saturates the
server against its unloaded maximum, and how long refusals take. Server and client are processes of their own.

The maximum is measured with as many clients as keep all rows busy and never meet a full queue; 8x is an open loop of
eight times the requests a second that those got.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from _report import write_results
from rich.console import Console

ROOT = Path(__file__).parents[1]
TEXT = "The river rose in the night and the town was told to leave before the bridge would go under . "


class Load:
    """Requests sent and what became of them: (end, tokens) of answers, seconds of refusals."""

    def __init__(self, client: httpx2.AsyncClient, prompt: int, answer: int, seed: int) -> None:
        self.client, self.answer, self.prompt = client, answer, prompt
        self.rng = np.random.default_rng(seed)
        self.done: list[tuple[float, int]] = []
        self.refusals: list[float] = []

    async def ask(self) -> None:
        text = " ".join(self.rng.choice(TEXT.split(), self.prompt))
        body = {"prompt": text, "max_tokens": self.answer, "temperature": 0}
        began = time.perf_counter()
        answer = await self.client.post("/v1/completions", json=body)
        if answer.status_code == 429:
            self.refusals.append(time.perf_counter() - began)
        else:
            answer.raise_for_status()
            self.done.append((time.perf_counter(), answer.json()["usage"]["total_tokens"]))

    def rates(self, first: float, last: float) -> tuple[float, float]:
        """Tokens and requests a second of the answers that ended in that span."""
        tokens = [t for end, t in self.done if first <= end < last]
        return sum(tokens) / (last - first), len(tokens) / (last - first)


async def closed(load: Load, clients: int, warm: float, seconds: float) -> tuple[float, float]:
    """Each client asks again as soon as it has its answer."""
    first = time.perf_counter() + warm
    last = first + seconds

    async def again() -> None:
        while time.perf_counter() < last:
            await load.ask()

    await asyncio.gather(*(again() for _ in range(clients)))
    return load.rates(first, last)


async def opened(load: Load, rate: float, warm: float, seconds: float) -> tuple[float, float]:
    """Poisson arrivals, whatever becomes of those before."""
    first = time.perf_counter() + warm
    last, tasks, due = first + seconds, [], time.perf_counter()
    while due < last:
        due += load.rng.exponential(1 / rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(load.ask()))
    await asyncio.gather(*tasks)
    return load.rates(first, last)


async def measure(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """One round: the unloaded maximum, 8x, the maximum again (the machine drifts)."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=256)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        def load(seed: int) -> Load:
            return Load(client, options.prompt, options.answer, seed)

        before, requests = await closed(load(1), 2 * options.rows, options.warm, options.seconds)
        flood = load(2)
        under, _ = await opened(flood, options.times * requests, options.warm, options.seconds)
        after, _ = await closed(load(3), 2 * options.rows, options.warm, options.seconds)
    refusals = np.asarray(flood.refusals) * 1e3
    return {
        "load": options.times,
        "requests_per_second": requests,
        "tokens_per_second": (before + after) / 2,
        "tokens_per_second_overloaded": under,
        "ratio": 2 * under / (before + after),
        "refused": len(refusals),
        "refusal_ms_p50": float(np.percentile(refusals, 50)),
        "refusal_ms_p99": float(np.percentile(refusals, 99)),
    }


def wait_until_ready(url: str) -> None:
    """Wait for the warm-up."""
    while httpx2.get(f"{url}/ready").status_code != 200:
        time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="smollm2-135m")
    parser.add_argument("--times", type=float, default=8.0, help="the saturating load")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64, help="words")
    parser.add_argument("--answer", type=int, default=32, help="tokens")
    parser.add_argument("--warm", type=float, default=15.0, help="seconds before the measured ones")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    settings = {"rows": options.rows, "queue": options.queue, "length": 512}
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "serve.py"), "--checkpoint", options.checkpoint, "--port", "0"]
        + [f"--gin_param=Serving.{name}={value}" for name, value in settings.items()],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1].removesuffix("/v1")
        wait_until_ready(url)
        row = asyncio.run(measure(url, options))
    finally:
        server.terminate()
        server.wait()
    Console().print(row)
    write_results("overload", rows=[row | settings])


if __name__ == "__main__":
    main()
