"""Servers on free ports, in threads of this process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest
from fake_engine import FakeEngine

from readme_jax.checkpoints.tokenizer import Tokenizer
from readme_jax.serving.http.app import Service, create_app
from readme_jax.serving.http.server import bind, server, url_of

NAME = "tiny"


@contextlib.contextmanager
def served(engine: Any, tokenizer: Tokenizer, experts: list[str]) -> Iterator[str]:
    """The address of a server that runs while the block does."""
    listening = bind("127.0.0.1", 0)
    running = server(create_app(Service(engine, tokenizer, NAME, experts)))
    thread = threading.Thread(target=running.run, args=([listening],))
    thread.start()
    try:
        yield url_of(listening)
    finally:
        running.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def serve() -> Callable[..., Any]:
    return served


@pytest.fixture
def engine(tiny_tokenizer: Tokenizer) -> FakeEngine:
    return FakeEngine(tiny_tokenizer)


@pytest.fixture
def address(engine: FakeEngine, tiny_tokenizer: Tokenizer) -> Iterator[str]:
    with served(engine, tiny_tokenizer, ["news", "code", "law"]) as url:
        yield url
        engine.gate.set()


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    """The official client, as it comes, but for retries: errors are to be seen."""
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def http(address: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=address, timeout=20) as made:
        yield made
