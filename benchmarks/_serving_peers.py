"""What each peer of `serving_cpu.py` is timed on, a process each: `python benchmarks/_serving_peers.py PEER FOLDER`.

Prints one JSON line: seconds of each case, and for ours the limits that the machine sets. SmolLM2, fp32, caches of 200
tokens when decoding. Decode cases are medians over STEPS steps. Ours runs the batches of one expert in every size of
ROWS, which our own dense model runs too.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from readme_jax.serving.store import ExpertStore

BATCH, PROMPT, CONTEXT, STEPS = 16, 1024, 200, 24
ROWS = (1, 2, 4, 8, BATCH, 32)  # of batches of one expert
MIXED = (2, 4, 7)  # experts present in batches made of them
HERE = Path(__file__).parent


def median_seconds(step: Callable[[int], Any], steps: int = STEPS) -> float:
    """Median over steps, the first two left out."""
    times = []
    for i in range(steps + 2):
        start = time.perf_counter()
        step(i)
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:]))


def real_routes(experts: int) -> np.ndarray:
    """Experts [STEPS + 2, BATCH] of the next tokens of BATCH texts, taken from the domains in turn."""
    with np.load(HERE / "results" / "routes.npz") as held:
        streams = [held[name] for name in sorted(held.files) if name.startswith("best/")]
    rng, columns = np.random.default_rng(0), []
    for row in range(BATCH):
        stream = streams[row % len(streams)]
        text = stream[rng.integers(len(stream))]
        at = rng.integers(len(text) - STEPS - 2)
        columns.append(text[at : at + STEPS + 2])
    return np.minimum(np.stack(columns, axis=1), experts - 1).astype(np.int32)


class Served:
    """Our programs over a model, all experts resident, and a cache of `rows` rows. Each is compiled when it is run."""

    def __init__(self, model: Any, store: ExpertStore, rows: int = BATCH) -> None:
        from readme_jax.serving.buckets import Limits
        from readme_jax.serving.programs import Programs

        self.store, self.rows = store, rows
        sizes = tuple(n for n in ROWS if n <= rows)
        limits = Limits(rows, PROMPT + 256, chunks=(PROMPT,), decode=sizes, stretches=(256, PROMPT + 256))
        self.programs = Programs(model, self.store, limits)
        self.state = self.programs.new_state()
        self.kx = self.programs.shape.top_k

    def decode(self, rows: int, routes: np.ndarray | None) -> tuple[float, int, int]:
        """Seconds a step, bytes of weights that a step reads and multiply-adds it needs (means over the steps).

        routes [steps, rows]: whom each row's token goes to; None: a dense model.
        """
        import jax

        from readme_jax.serving.sampling import Samplings

        put = self.programs.spread.sharding()
        position = jax.device_put(np.full(self.rows, CONTEXT, np.int32), put)
        self.state = replace(self.state, position=position)
        times, read, work = [], [], []
        weights = self.programs.weights
        always = sum(w.size for w in jax.tree.leaves((weights.layers, weights.head, weights.permanent)))
        router = 0 if weights.router is None else sum(w.size for n, w in _flat(weights.router) if n != "embed")
        expert = self.store.expert_bytes // 4 * self.store.num_layers
        for i in range(STEPS + 2):
            experts: tuple[int, ...] = ()
            if routes is not None:
                now = np.zeros((self.rows, 1), np.int32)
                now[:rows, 0] = routes[i]
                experts = tuple(np.unique(routes[i]).tolist())
                self.state = replace(self.state, experts=jax.device_put(now, put))
            jax.block_until_ready(self.state)
            start = time.perf_counter()
            present = self.store.present(experts)
            self.state, sampled = self.programs.decode(
                self.state, np.ones(rows, bool), experts, present, Samplings.greedy(rows)
            )
            sampled.tokens.block_until_ready()
            times.append(time.perf_counter() - start)
            read.append(4 * (always + router + expert * len(experts)))
            work.append(rows * (always + router + (expert if experts else 0)))
        return float(np.median(times[2:])), int(np.mean(read[2:])), int(np.mean(work[2:]))

    def prefill(self) -> float:
        tokens = np.random.default_rng(0).integers(0, 40000, PROMPT)
        experts = (0,) if self.kx else ()
        routes, present = np.zeros((PROMPT, self.kx), np.int32), self.store.present(experts)

        def step(_: int) -> None:
            self.state, sampled, _scores = self.programs.prefill(
                self.state, 0, tokens, 0, routes, routes + np.float32(1), experts, present, last=True
            )
            assert sampled is not None
            sampled.tokens.block_until_ready()

        return median_seconds(step, steps=3)


def _flat(tree: Any) -> list[tuple[str, Any]]:
    import jax

    return [(p[0].key, x) for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]]


def limits_of_machine() -> dict[str, float]:
    """Bytes/s of reading 400 MB, multiply-adds/s of a large matmul: medians, as the times are that they limit."""
    import jax
    import jax.numpy as jnp

    long, square = jnp.ones(100_000_000, jnp.float32), jnp.ones((2048, 2048), jnp.float32)
    total, product = jax.jit(jnp.sum), jax.jit(jnp.matmul)
    read = median_seconds(lambda _: total(long).block_until_ready(), steps=8)
    return {
        "bytes": long.nbytes / read,
        "work": 2048**3 / median_seconds(lambda _: product(square, square).block_until_ready(), steps=8),
    }


def ours(folder: Path) -> dict[str, Any]:
    from readme_jax.checkpoints.mixture import load_mixture
    from readme_jax.serving.store import ExpertStore

    model = load_mixture(folder / "mixture")
    store, experts = ExpertStore(model), model.mixture.num_experts
    served = Served(model, store)
    cases = {}
    for rows in ROWS:
        here = served if rows <= BATCH else Served(model, store, rows)
        name = "decode_b1" if rows == 1 else f"decode_b{rows}_one"
        cases[name] = here.decode(rows, np.zeros((STEPS + 2, rows), np.int32))
    for present in MIXED:
        even = np.broadcast_to(np.arange(BATCH) * present // BATCH, (STEPS + 2, BATCH))
        cases[f"decode_b16_of_{present}"] = served.decode(BATCH, even)
    cases["decode_b16_mixed"] = served.decode(BATCH, real_routes(experts))
    seconds = {name: figures[0] for name, figures in cases.items()} | {"prefill_1024": served.prefill()}
    limits = {name: {"bytes": read, "work": work} for name, (_, read, work) in cases.items()}
    on_average = float(np.mean([len(np.unique(r)) for r in real_routes(experts)[2:]]))
    return {"seconds": seconds, "needs": limits, "machine": limits_of_machine(), "mixed_present": on_average}


def own_dense(folder: Path) -> dict[str, Any]:
    from readme_jax.checkpoints.hf import load_dense
    from readme_jax.serving.store import ExpertStore

    model = load_dense(str(folder / "dense"))
    store = ExpertStore(model)
    served, seconds = Served(model, store), {}
    for rows in ROWS:
        here = served if rows <= BATCH else Served(model, store, rows)
        seconds[f"decode_b{rows}"] = here.decode(rows, None)[0]
    return {"seconds": seconds | {"prefill_1024": served.prefill()}}


def transformers(folder: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).eval()
    seconds = {}
    with torch.inference_mode():
        for rows in (1, BATCH):
            prompt = torch.randint(0, 40000, (rows, CONTEXT))
            out = model(prompt, use_cache=True, logits_to_keep=1)
            held = {"cache": out.past_key_values, "token": out.logits[:, -1].argmax(-1, keepdim=True)}

            def step(_: int, held: dict[str, Any] = held) -> None:
                out = model(held["token"], past_key_values=held["cache"], use_cache=True)
                held["token"] = out.logits[:, -1].argmax(-1, keepdim=True)

            seconds[f"decode_b{rows}"] = median_seconds(step)
        prompt = torch.randint(0, 40000, (1, PROMPT))
        seconds["prefill_1024"] = median_seconds(lambda _: model(prompt, use_cache=True, logits_to_keep=1), steps=3)
    return {"seconds": seconds}


def llama_cpp(folder: Path) -> dict[str, Any]:
    """Through the server inside `xllamacpp`: its own timings, without HTTP."""
    from concurrent.futures import ThreadPoolExecutor

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(folder / "f32.gguf")
    params.n_parallel, params.n_ctx = BATCH, BATCH * (PROMPT + 256)
    params.n_batch = params.n_ubatch = PROMPT
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.n_gpu_layers, params.warmup = 0, True
    server = xllamacpp.Server(params)
    rng = np.random.default_rng(0)

    def complete(length: int, new: int) -> dict[str, float]:
        prompt = rng.integers(0, 40000, length).tolist()
        request = {"prompt": prompt, "max_tokens": new, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        return server.handle_completions(request)["timings"]

    complete(CONTEXT, 4)
    one = [complete(CONTEXT, STEPS)["predicted_per_token_ms"] for _ in range(3)]
    with ThreadPoolExecutor(BATCH) as pool:
        # Rows start one after another's prompts: only the middle, when all of them decode, is a batch of 16.
        many = list(pool.map(lambda _: complete(CONTEXT, 8 * STEPS), range(BATCH)))
    prompts = [complete(PROMPT, 1)["prompt_ms"] for _ in range(3)]
    batch = float(np.median([t["predicted_per_token_ms"] for t in many]))
    seconds = {"decode_b1": min(one), "decode_b16": batch, "prefill_1024": min(prompts)}
    return {"seconds": {name: ms / 1e3 for name, ms in seconds.items()}}


PEERS = {f.__name__: f for f in (ours, own_dense, transformers, llama_cpp)}

if __name__ == "__main__":
    print(json.dumps(PEERS[sys.argv[1]](Path(sys.argv[2]))))
