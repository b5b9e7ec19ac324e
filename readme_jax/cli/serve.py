"""A checkpoint behind an address: what can be wrong is found out before the first request."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from readme_jax.checkpoints.mixture import Mixture
from readme_jax.cli.settings import load_serving
from readme_jax.cli.sources import EXPORT, expert_names, open_model, tokenizer_of
from readme_jax.memory import settle
from readme_jax.progress import WarmUp
from readme_jax.serving.engine import Engine
from readme_jax.serving.http.app import Service, create_app
from readme_jax.serving.http.server import answer_first, bind, server, url_of


def serve(
    checkpoint: str, host: str, port: int, name: str | None, gin_files: Sequence[str], gin_params: Sequence[str]
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what runs. The address is printed once the model is loaded.

    Raises ConfigError for bad settings and an address that cannot be had, CheckpointError for no model or tokenizer.
    """
    settings = load_serving(gin_files, gin_params)
    with bind(host, port) as listening:
        model = open_model(checkpoint)
        tokenizer = tokenizer_of(model, checkpoint)
        engine = Engine.build(model, settings)
        experts = expert_names(model) if isinstance(model, Mixture) else []
        known_as = name or name_of(checkpoint)
        service = Service(engine, tokenizer, known_as, experts)
        with closing(WarmUp()) as warm_up:

            def compiled(done: int, total: int) -> None:
                if done == total:
                    settle()
                warm_up(done, total)

            running = server(create_app(service, compiled, answer_first))
            # uvicorn puts its own handler here while it runs and hands its signal on at the end: a clean exit, not a
            # death.
            signal.signal(signal.SIGTERM, lambda *_: setattr(running, "should_exit", True))
            print(f"{known_as}: {url_of(listening)}/v1", flush=True)
            running.run(sockets=[listening])


def name_of(checkpoint: str) -> str:
    """A model's name where none is given: its folder's, or its run's for a run's export."""
    path = Path(checkpoint).resolve()
    return path.parent.name if path.name == EXPORT else path.stem if path.is_file() else path.name
