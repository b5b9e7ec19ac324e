"""Prefill of Llama-2-7B's shape on one GPU, through the engine's own programs: `python benchmarks/gpu/prefill.py`.

Random bf16 weights; a prompt's tokens spread over seven experts in runs, or all of one, or the dense model; in one
call, or in chunks. MFU counts what a token activates, two FLOPs a weight (attention and one expert) and causal
attention, over the matmul rate of the same run. `--tune` measures tiles of the attention kernel alone instead.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _measure import Rows, matmul_rate, seconds_in_a_row
from _model import EXPERTS, compile_side_by_side, model_of, shape

from readme_jax.config import Mesh, Model
from readme_jax.models.attention import causal_attention
from readme_jax.models.runtime import runtime_for
from readme_jax.models.sizes import forward_flops, mean_keys
from readme_jax.parallel.mesh import make_mesh
from readme_jax.serving.buckets import Limits
from readme_jax.serving.programs import Programs
from readme_jax.serving.prompt_kernel import Tiles, attend_chunk
from readme_jax.serving.state import Cache
from readme_jax.serving.store import ExpertStore

PROMPTS = 4  # in a row: the host prepares one while the device computes another


def prefill(programs: Programs, tokens: int, chunk: int, routes: np.ndarray) -> float:
    """Seconds of a prompt's prefill, in calls of `chunk` tokens, among several prompts in a row."""
    prompt = np.arange(tokens) % programs.config.vocab_size
    present = sorted(set(routes[:, 0].tolist())) if routes.size else []
    weights, state = programs.store.present(present), programs.new_state()
    ones = np.ones(routes.shape, np.float32)

    def once(state: Any) -> Any:
        for start in range(0, tokens, chunk):
            part, last = slice(start, start + chunk), start + chunk >= tokens
            state, *_ = programs.prefill(
                state, 0, prompt[part], start, routes[part], ones[part], present, weights, last=last
            )
        return state

    state, times = jax.block_until_ready(once(state)), []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(PROMPTS):
            state = once(state)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - began) / PROMPTS)
    return float(np.median(times))


def among(names: set[tuple[Any, Any]], key: tuple[Any, ...]) -> bool:
    """Whether a program's key has one of the names and sizes."""
    return (key[0], key[2 if len(key) > 2 else -1]) in names


def tune(tokens: int) -> None:
    """Tiles of the attention kernel, over the last quarter of a prompt and over all of it; cuDNN beside the latter."""
    heads, width = 32, 128
    draw = lambda *shape: jax.random.normal(jax.random.key(sum(shape)), shape, jnp.bfloat16)  # noqa: E731
    cache = Cache((draw(1, heads, width, tokens),), (draw(1, heads, tokens, width),))
    sizes = [(64, 4, 3), (64, 8, 3), (64, 8, 4), (128, 8, 2), (128, 8, 3), (32, 4, 4)]
    zero, dense = jnp.int32(0), jax.jit(lambda q: causal_attention(q, q, q, backend="cudnn"))
    for count, start in ((tokens, 0), (tokens // 4, tokens - tokens // 4)):
        q, begin = draw(count, heads, width), jnp.int32(start)
        flops = 4 * heads * width * count * (start + mean_keys(count))
        for queries in (64, 128):
            for keys, warps, stages in sizes:
                tiles = Tiles(queries, keys, warps, stages)
                try:
                    took = seconds_in_a_row(partial(attend_chunk, q, cache, zero, begin, tiles=tiles))
                except Exception as error:  # tiles that do not fit: the others are still measured
                    print({"failed": tiles, "why": str(error).splitlines()[0][:160]}, flush=True)
                else:
                    print(f"{count} after {start}: {flops / took / 1e12:.0f} TFLOP/s  {tiles}", flush=True)
        if not start:
            took = seconds_in_a_row(partial(dense, q[None]))
            print(f"{count}: cuDNN {flops / took / 1e12:.0f} TFLOP/s", flush=True)


def main() -> None:
    """Measure and write results/gpu_prefill.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 4096, 8192])
    parser.add_argument(
        "--chunk", type=int, nargs="+", default=[2048], help="for prompts that are longer, also in chunks"
    )
    parser.add_argument("--cases", nargs="+", default=["seven", "one", "dense"], choices=("seven", "one", "dense"))
    parser.add_argument("--layers", type=int, default=32, help="fewer for a quick look")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script without a GPU")
    parser.add_argument("--tune", action="store_true")
    args = parser.parse_args()
    if args.tune:
        return tune(max(args.tokens))
    config, sizes = shape(args.layers, args.tiny), tuple(sorted({*args.tokens, *args.chunk}))
    runtime = replace(runtime_for(Model(compute_dtype="bfloat16")), decode="kernel", segments="kernel")
    results = Rows("gpu_prefill", layers=args.layers)
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        results.tell(matmul_rate=matmul_rate())
        for experts in (EXPERTS, 0):
            cases = [c for c in args.cases if (c == "dense") == (experts == 0)]
            if not cases:
                continue
            model = model_of(config, experts)
            limits = Limits(1, sizes[-1], chunks=sizes, prompts=(sizes[-1],))
            programs = Programs(model, ExpertStore(model, dtype=jnp.bfloat16), limits, runtime)
            del model
            present = {{"seven": EXPERTS, "one": 1, "dense": 0}[case] for case in cases}
            began = time.perf_counter()
            names = {("prefill_span", n) for n in present} | {("prefill_end", sizes[-1])}
            compile_side_by_side(programs, partial(among, names))
            results.tell(**{f"compile_seconds_{experts}": time.perf_counter() - began})
            for case in cases:
                measure(results, programs, case, args.tokens, args.chunk)
            del programs
    return None


def measure(results: Rows, programs: Programs, case: str, sizes: list[int], chunks: list[int]) -> None:
    """A row a prompt length and way to cut it."""
    config = programs.config
    width = config.ffn_dim if case == "dense" else config.ffn_dim // 2
    for tokens in sizes:
        routes = np.arange(tokens)[:, None] * (EXPERTS if case == "seven" else 1) // tokens
        for chunk in [tokens, *(c for c in chunks if c < tokens)]:
            took = prefill(programs, tokens, chunk, routes[:, : programs.shape.top_k])
            flops = tokens * forward_flops(config, width, tokens, head=False)
            mfu = flops / took / results.about["matmul_rate"]
            results.add(case=case, tokens=tokens, chunk=chunk, ms=1e3 * took, mfu=mfu)


if __name__ == "__main__":
    main()
