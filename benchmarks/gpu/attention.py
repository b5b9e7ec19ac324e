"""A decode step's attention alone, over tiles of its kernel: `python benchmarks/gpu/attention.py`.

Llama-2-7B's heads (32, each with its own keys) and Mistral-7B's (8 kv heads), bf16; caches of 1024 tokens filled as
decode.py's, and `ragged` ones of 4096, of which some rows have all and most a quarter or less, as requests come.
Layers follow one another in one program, each over a cache of its own, as in a step. Rows, best first for a batch and
shape: microseconds a layer, and that over the time of the cache's bytes at the run's bandwidth. The model uses TILES.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _measure import CLOSE, Rows, apart, compiled_in_threads, copy_bandwidth, seconds_in_a_row
from einops import rearrange

from readme_jax.serving.kernels import TENSOR_ROWS, TILES, Tiles, attend_and_write
from readme_jax.serving.state import Cache

WIDTH, HEADS, FILLED = 128, 32, 0.88
LAYERS = 8
SHAPES = {"llama": 32, "mistral": 8}  # kv heads


def candidates(kv_heads: int) -> list[Tiles]:
    """Those of the model first."""
    found = [
        Tiles(block, TENSOR_ROWS, 528, tokens, 4, stages)
        for block, tokens, stages in itertools.product((64, 128), (512, 1024, 2048, 4096), (2, 3))
    ]
    if kv_heads == HEADS:  # of several heads a kv head tensor cores are taken anyway
        found += [Tiles(128, 1, 528, tokens, warps, 2) for tokens, warps in itertools.product((512, 4096), (2, 4))]
    return [TILES, *(tiles for tiles in found if tiles != TILES)]


def layers(tiles: Tiles, qkv: Any, angles: Any, caches: Any, positions: Any) -> Any:
    """Attention of all layers, each fed a little of the last one's result."""
    runs, out, written = jnp.ones(positions.shape, bool), qkv, []
    interpret = jax.default_backend() == "cpu"
    for keys, values in caches:
        cache = Cache((keys,), (values,))
        got, cache = attend_and_write(out, angles, angles, cache, positions, runs, interpret=interpret, tiles=tiles)
        out = qkv.at[: got.shape[0]].add(1e-3 * got)
        written.append((cache.keys[0], cache.values[0]))
    return out, written


def exact(qkv: Any, angles: Any, keys: Any, values: Any, positions: Any) -> Any:
    """A layer's attention by XLA in float32, [H h, B]."""
    kv, length = keys.shape[1], keys.shape[3]
    heads = rearrange(qkv, "(n h) b -> b n h", h=WIDTH)
    low, high = jnp.split(heads[:, : HEADS + kv].astype(jnp.float32), 2, axis=2)
    turned = jnp.concatenate([(low - high) * angles[0, 0], (high + low) * angles[0, 0]], axis=2).astype(qkv.dtype)
    queries = rearrange(turned[:, :HEADS], "b (k g) h -> b k g h", k=kv)
    rows = jnp.arange(len(positions))
    keys = keys.at[rows, :, :, positions].set(turned[:, HEADS:])
    values = values.at[rows, :, positions].set(heads[:, HEADS + kv :])
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = product("bkgh,bkhs->bkgs", queries, keys) / WIDTH**0.5
    seen = jnp.arange(length) <= positions[:, None, None, None]
    odds = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
    return rearrange(product("bkgs,bksh->bkgh", odds, values), "b k g h -> (k g h) b")


def check(shape: str, batch: int, length: int) -> None:
    """The model's kernel against XLA on this device. Raises SystemExit where they differ."""
    kv = SHAPES[shape]
    keys = jax.random.split(jax.random.key(1), 3)
    qkv = jax.random.normal(keys[0], ((HEADS + 2 * kv) * WIDTH, batch), jnp.bfloat16)
    angles = jnp.full((WIDTH // 2, batch), 0.5**0.5, jnp.float32)
    cache = [
        jax.random.normal(key, (batch, kv, *of), jnp.bfloat16)
        for key, of in zip(keys[1:], ((WIDTH, length), (length, WIDTH)), strict=True)
    ]
    positions = jnp.linspace(0, length - 1, batch).astype(jnp.int32)
    wanted = exact(qkv, angles, cache[0], cache[1], positions)
    runs, interpret = jnp.ones(batch, bool), jax.default_backend() == "cpu"
    kept = Cache((cache[0],), (cache[1],))
    found, _ = jax.jit(functools.partial(attend_and_write, interpret=interpret), donate_argnums=3)(
        qkv, angles, angles, kept, positions, runs
    )
    if (error := apart(found, wanted)) > CLOSE:
        raise SystemExit(f"{shape}: the kernel's attention is {error:.3f} of the largest entry off")


def measure(results: Rows, shape: str, batch: int, length: int, ragged: bool) -> None:
    """A row a candidate."""
    kv = SHAPES[shape]
    filled = FILLED * np.random.default_rng(0).random(batch) ** 3 if ragged else np.full(batch, FILLED)
    if ragged:
        filled[0] = FILLED
    draw = functools.partial(jax.random.normal, jax.random.key(0), dtype=jnp.bfloat16)
    qkv, angles = draw(((HEADS + 2 * kv) * WIDTH, batch)), jnp.ones((WIDTH // 2, batch), jnp.float32)
    positions = jnp.asarray(filled * length, jnp.int32)
    caches = [(draw((batch, kv, WIDTH, length)), draw((batch, kv, length, WIDTH))) for _ in range(LAYERS)]
    arguments = (qkv, angles, caches, positions)
    jobs = {tiles: (functools.partial(layers, tiles), arguments) for tiles in candidates(kv)}
    bytes_, found = 4 * kv * WIDTH * int(positions.sum()), []
    for tiles, program in compiled_in_threads(jobs, donated=(2,)).items():

        def call(program: Any = program) -> Any:
            nonlocal caches
            out, caches = program(qkv, angles, caches, positions)
            return out

        found.append((seconds_in_a_row(call) / LAYERS, tiles))
    for seconds, tiles in sorted(found, key=lambda each: each[0]):
        over = seconds * results.about["copy_bandwidth"] / bytes_
        about = {"shape": shape, "batch": batch, "ragged": ragged, "filled": int(positions.sum())}
        about |= {**tiles._asdict(), "chosen": tiles == TILES}
        results.add(**about, us=1e6 * seconds, over_bytes=over)


def main() -> None:
    """Measure and write results/gpu_attention.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 1])
    parser.add_argument("--shapes", nargs="+", default=["llama"], choices=list(SHAPES))
    parser.add_argument("--context", type=int, default=1024, help="tokens a row; fewer where they pass 64k together")
    args = parser.parse_args()
    results = Rows("gpu_attention")
    results.tell(copy_bandwidth=copy_bandwidth())
    for shape in args.shapes:
        check(shape, 4, args.context)
        measure(results, shape, 24, 4 * args.context, ragged=True)
        for batch in args.batch:
            measure(results, shape, batch, min(args.context, 65536 // batch), ragged=False)


if __name__ == "__main__":
    main()
