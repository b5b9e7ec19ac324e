"""`readme-jax batch`: a file of prompts through the engine to a file of answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing

from readme_jax.cli.settings import load_serving
from readme_jax.cli.sources import open_model, tokenizer_of
from readme_jax.progress import WarmUp, meter
from readme_jax.serving.batch import done_ids, read_prompts, run_batch
from readme_jax.serving.engine import Engine
from readme_jax.serving.request import Request


def batch(
    prompts: str, checkpoint: str, out: str, raw: bool, gin_files: Sequence[str], gin_params: Sequence[str]
) -> int:
    """Answer what `out` does not hold yet; returns how many requests had an error."""
    settings = load_serving(gin_files, gin_params)
    read_prompts(prompts)  # what is wrong with the file is told before the model is read
    done = done_ids(out)
    model = open_model(checkpoint)
    tokenizer = tokenizer_of(model, checkpoint)

    def chat(text: str) -> str | None:
        return tokenizer.chat([{"role": "user", "content": text}])

    items = read_prompts(prompts, None if raw else chat)
    engine = Engine.build(model, settings)
    left = [i.request for i in items if i.id not in done and isinstance(i.request, Request)]
    total = sum((r.params.max_tokens or engine.context) + _length(r, engine) for r in left)
    if left:
        with closing(WarmUp()) as tell:
            engine.warm_up(tell)
    engine.start()
    try:
        with meter("batch", total) as tick:
            answered, errors = run_batch(engine, items, out, tick)
    finally:
        engine.stop()
    print(f"{answered} answered ({errors} with an error), {len(done)} were there before: {out}", file=sys.stderr)
    return errors


def _length(request: Request, engine: Engine) -> int:
    if isinstance(request.prompt, str) and engine.tokenizer is not None:
        return len(engine.tokenizer.encode(request.prompt, request.special))
    return len(request.prompt) if isinstance(request.prompt, list) else 0
