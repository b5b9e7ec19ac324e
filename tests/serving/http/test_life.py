"""From start to drain: readiness, clients that go, overload, SIGTERM, addresses that cannot be had."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time

import httpx2
import pytest

from readme_jax.errors import ConfigError
from readme_jax.serving.http.server import bind, url_of

ASK = {"prompt": "hello", "max_tokens": 20}


def test_route(http):
    """Which experts, and what they would load; a conversation goes through the template."""
    answer = http.post("/v1/route", json={"prompt": [3, 4, 6, 0]}).json()
    assert answer == {
        "object": "route",
        "model": "tiny",
        "prompt_tokens": 4,
        "experts": [
            {"index": 0, "name": "news", "tokens": 3, "resident": True},
            {"index": 1, "name": "code", "tokens": 1, "resident": False},
        ],
        "routes": [[0], [1], [0], [0]],
        "load_bytes": 1000,
    }
    chat = http.post("/v1/route", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert chat["routes"] == http.post("/v1/route", json={"prompt": "user: hi\nassistant:"}).json()["routes"]


def until(condition, seconds: float = 10.0) -> None:
    """Wait until a condition holds; fail when it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.005)


def test_health_and_readiness(http, engine):
    assert http.get("/health").status_code == http.get("/ready").status_code == 200
    engine.ready = False  # warming up
    assert (http.get("/health").status_code, http.get("/ready").status_code) == (200, 503)
    engine.healthy = False  # stalled
    assert http.get("/health").status_code == http.get("/ready").status_code == 503
    assert http.get("/ready").json()["error"]["type"] == "server_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_cancels_its_requests(http, engine, stream):
    engine.gate.clear()  # nothing is generated: only the client can end this
    with pytest.raises(httpx2.ReadTimeout):
        http.post("/v1/completions", json={**ASK, "prompt": ["a", "b"], "stream": stream}, timeout=0.3)
    until(lambda: engine.finished["cancelled"] == 2)
    assert not engine.requests
    engine.gate.set()
    assert http.post("/v1/completions", json=ASK).status_code == 200


def test_a_client_that_goes_in_the_middle_of_a_stream(http, engine):
    engine.pace = 0.01
    with http.stream("POST", "/v1/completions", json={**ASK, "max_tokens": 400, "stream": True}) as answer:
        assert next(answer.iter_lines()).startswith("data: ")
    until(lambda: engine.finished["cancelled"] == 1)


def test_overload_is_refused_before_any_work_and_at_once(address, engine):
    """8x what rows and queue hold: that many are served, the rest is told when to come back."""
    engine.gate.clear()
    room = engine.rows + engine.queue

    async def flood() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(base_url=address, timeout=30, limits=httpx2.Limits(max_connections=200)) as c:
            asked = [asyncio.create_task(c.post("/v1/completions", json=ASK)) for _ in range(8 * room)]
            while sum(task.done() for task in asked) < 7 * room:  # refusals do not wait for the engine
                await asyncio.sleep(0.01)
            engine.gate.set()
            return await asyncio.gather(*asked)

    answers = asyncio.run(asyncio.wait_for(flood(), 30))
    refused = [a for a in answers if a.status_code == 429]
    assert len(refused) == 7 * room and len(engine.seen) == room
    assert all(a.headers["Retry-After"] == "2" for a in refused)
    assert refused[0].json()["error"]["code"] == "rate_limit_exceeded"
    assert sum(a.status_code == 200 for a in answers) == room


def test_prompts_of_one_request_are_admitted_together_or_not_at_all(http, engine):
    engine.gate.clear()
    room = engine.rows + engine.queue
    with pytest.raises(httpx2.ReadTimeout):
        http.post("/v1/completions", json={**ASK, "prompt": ["x"] * room}, timeout=0.3)  # as many as there may be
    until(lambda: not engine.requests)
    sent = threading.Thread(target=lambda: http.post("/v1/completions", json=ASK))
    sent.start()
    until(lambda: len(engine.requests) == 1)
    assert http.post("/v1/completions", json={**ASK, "prompt": ["x"] * room}).status_code == 429
    until(lambda: len(engine.requests) == 1)  # those taken in were cancelled
    engine.gate.set()
    sent.join()
    never = http.post("/v1/completions", json={**ASK, "prompt": ["x"] * (room + 1)})
    assert never.status_code == 400 and never.json()["error"]["param"] == "prompt"


def test_a_failure_in_a_stream_is_an_event_of_it(http, engine, monkeypatch):
    from readme_jax.serving.request import Event, Usage

    def fails(one):
        engine._end(one, Event(finish_reason="error", error="device lost", usage=Usage(1, 0, 0)))

    monkeypatch.setattr(engine, "_step", fails)
    lines = [x for x in http.post("/v1/completions", json={**ASK, "stream": True}).text.split("\n") if x]
    assert json.loads(lines[0].removeprefix("data: "))["error"]["message"] == "device lost"
    assert lines[-1] == "data: [DONE]"
    assert http.post("/v1/completions", json=ASK).status_code == 500


def test_shutdown_finishes_what_runs(engine, tiny_tokenizer, serve):
    answers = []
    engine.gate.clear()
    with serve(engine, tiny_tokenizer, []) as url:
        threads = [
            threading.Thread(target=lambda: answers.append(httpx2.post(f"{url}/v1/completions", json=ASK, timeout=30)))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        until(lambda: len(engine.seen) == 6)
        threading.Timer(0.2, engine.gate.set).start()  # when the shutdown has begun
    for thread in threads:
        thread.join()
    assert [a.status_code for a in answers] == [200] * 6
    assert engine.draining and engine.stopping and not engine.thread.is_alive()


def test_addresses_that_cannot_be_had():
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert url_of(taken) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match=f"port {port} .*in use"):
            bind("127.0.0.1", port)
    for host, number in (("no.such.host.invalid", 0), ("127.0.0.1", 70000), ("192.0.2.1", 0)):
        with pytest.raises(ConfigError):
            bind(host, number)


COMPUTING = """
import os, sys, threading
from readme_jax.serving.http.server import answer_first
done = threading.Event()
thread = threading.Thread(target=done.wait)
thread.start()
answer_first()
print(*(os.getpriority(os.PRIO_PROCESS, i) for i in (threading.get_native_id(), thread.native_id)))
done.set()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
def test_the_thread_that_answers_comes_before_those_that_compute():
    """In a process of its own: what was lowered cannot be raised again."""
    said = subprocess.run([sys.executable, "-c", COMPUTING], capture_output=True, text=True, check=True).stdout
    own, other = map(int, said.split())
    assert own < other or own == 19  # the lowest there is
