"""A chunk of one row's prompt through the backbone; routing of a whole prompt on its arrival.

Activations are token-major, [C, D]. The cache is read as it was and written last, in place (see `decode`); with a
GPU's kernel each layer's is written first, in place too, and read with the chunk in it.

# C tokens of a chunk, D model width, H heads, K kv heads, G query heads a kv head, h head width, S tokens a row,
# P experts present, Kx experts a token, V vocabulary
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from readme_jax.config import ModelConfig
from readme_jax.models import attention
from readme_jax.models.feed_forward import feed_forward, linear
from readme_jax.models.llama import rms_norm
from readme_jax.models.router import choose, route_logits
from readme_jax.models.segments import Expert, RoutePlan, grouped_ffn, plan_routes
from readme_jax.serving import attend, spread
from readme_jax.serving.decode import (
    LEFT,
    Params,
    Sampled,
    Shape,
    Step,
    Token,
    Weights,
    advance,
    after,
    attend_columns,
    route_next,
)
from readme_jax.serving.prompt_kernel import attend_chunk
from readme_jax.serving.sampling import TOP, Samplings, best, choose_tokens
from readme_jax.serving.state import Cache, State, attend_cached, write_chunk

QUERIES = 128  # of a block of the chunk's attention to itself
SCORED = 64  # positions whose logits are held at once when a prompt is scored


class Chunk(NamedTuple):
    """Tokens `start` .. `start + count` of a row: NumPy arrays, or traced ones. Arrays [C], routes [C, Kx], of which
    `count` are real; routes of the others name no expert (-1). `targets` are the tokens to score: each position's
    successor; as many as the longest chunk has."""

    row: Any
    start: Any
    count: Any
    tokens: Any
    experts: Any
    weights: Any
    targets: Any
    last: Any  # bool: the prompt ends here: choose the next token
    scored: Any  # bool: return what the model thought of targets


class Scores(NamedTuple):
    """What the model thought of a chunk's targets: log-probability [C], and the best alternatives [C, TOP]."""

    logprob: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array


class PromptRoutes(NamedTuple):
    """Experts and weights [T, Kx] of a prompt's tokens, and the router's keys [1, Hr, hr, T] and values [1, Hr, T, hr]
    of them."""

    experts: jax.Array
    weights: jax.Array
    keys: jax.Array
    values: jax.Array


def prefill_span(
    shape: Shape,
    weights: Weights,
    experts: Sequence[Sequence[Expert]],
    caches: Sequence[Cache],
    chunk: Chunk,
    present: jax.Array,
    first: jax.Array,
    x: jax.Array,
) -> tuple[tuple[Cache, ...], jax.Array, jax.Array]:
    """Some layers of a chunk, those of `weights`: x, of which the first C rows count, comes from the layers before, but
    for the `first`.

    `caches` are theirs. Returns caches, x, and a scalar that is there when all of it has run.
    """
    size = chunk.tokens.shape[0]
    own = jax.lax.cond(first, lambda: spread.embed(weights.embed, chunk.tokens, shape.cut.rest), lambda: x[:size])
    caches, own = run_layers(shape, weights, experts, caches, chunk, present, own)
    return caches, jnp.pad(own, ((0, x.shape[0] - size), (0, 0))), after(own)


def run_layers(
    shape: Shape,
    weights: Weights,
    experts: Sequence[Sequence[Expert]],
    caches: Sequence[Cache],
    chunk: Chunk,
    present: jax.Array,
    x: jax.Array,
) -> tuple[tuple[Cache, ...], jax.Array]:
    """The layers of `weights` over x [C, D]; their `caches` get the chunk's keys and values."""
    c = shape.config
    plan = _plan(shape, chunk, present) if shape.mixture else None
    freqs = attention.rotary_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
    positions = chunk.start + jnp.arange(chunk.tokens.shape[0])
    new = []
    for i, p in enumerate(weights.layers):
        with jax.named_scope("attention"):
            x, own = _attention(shape, p, x, caches[i], chunk, positions, freqs)
        new.append(own)
        with jax.named_scope("feed_forward"):
            x = x + _feed_forward(shape, weights.permanent[i], plan, experts[i], rms_norm(x, p["ffn_norm"], c.norm_eps))
    start = chunk.start + after(x)
    written = (
        own if isinstance(own, Cache) else write_chunk(cache, *own, chunk.row, start, chunk.count)
        for cache, own in zip(caches, new, strict=True)
    )
    return tuple(written), x


def _plan(shape: Shape, chunk: Chunk, present: jax.Array) -> RoutePlan:
    """Tokens sorted by expert present; of one that is repeated only the first is used. Those of other devices' experts
    come last."""
    match = chunk.experts[..., None] == present
    index = jnp.where(match.any(axis=-1), jnp.argmax(match, axis=-1), present.shape[0])
    index, count = spread.own_experts(index, present.shape[0], shape.cut)
    return plan_routes(index.astype(jnp.int32), count, chunk.weights if shape.top_k > 1 else None)


def _feed_forward(
    shape: Shape, always: Expert | None, plan: RoutePlan | None, experts: Sequence[Expert], y: jax.Array
) -> jax.Array:
    """The permanent part's and the experts' share of y [C, D]."""
    parts = [] if always is None else [feed_forward(always._asdict(), y)]
    if plan is not None:
        parts.append(grouped_ffn(y, plan, experts, shape.runtime.segments, some=shape.cut.experts > 1))
    return spread.total(functools.reduce(jnp.add, parts), shape.cut.rest)


def _attention(
    shape: Shape,
    p: Params,
    x: jax.Array,
    cache: Cache,
    chunk: Chunk,
    positions: jax.Array,
    freqs: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | Cache]:
    """x [C, D] plus self-attention, and the chunk's keys [1, K, h, C] and values [1, K, C, h], or the cache with
    them."""
    c = shape.config
    y = rms_norm(x, p["attn_norm"], c.norm_eps)
    angles = positions.astype(jnp.float32)[:, None, None] * freqs
    left = jnp.split(linear(y, p["qkv"]), _splits(c), axis=1) if "qkv" in p else [linear(y, p[n]) for n in LEFT]
    q, k, v = (rearrange(x, "t (n h) -> t n h", h=c.head_dim) for x in left)
    q, k = (attend.turn(z, jnp.cos(angles), jnp.sin(angles), axis=2) for z in (q, k))
    k = rearrange(k, "t k h -> 1 k h t").astype(cache.keys[0].dtype)
    v = rearrange(v, "t k h -> 1 k t h").astype(cache.keys[0].dtype)
    if shape.runtime.decode == "kernel":
        cache = write_chunk(cache, k, v, chunk.row, chunk.start, chunk.count)
        interpret = jax.default_backend() == "cpu"
        out = attend_chunk(q, cache, chunk.row, chunk.start, c.sliding_window, interpret=interpret)
        return x + spread.total(linear(out, p["o"]), shape.cut.heads), cache
    q = rearrange(q, "t (k g) h -> 1 k (t g) h", k=k.shape[1])
    out = _attend(q, k, v, cache, chunk, positions, c.sliding_window).astype(x.dtype)
    out = rearrange(out, "1 k (t g) h -> t (k g h)", t=positions.shape[0])
    return x + spread.total(linear(out, p["o"]), shape.cut.heads), (k, v)


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: Cache,
    chunk: Chunk,
    positions: jax.Array,
    window: int | None,
) -> jax.Array:
    """q [1, K, C * G, h] over the row's tokens before the chunk and its own keys and values, by XLA."""
    group = q.shape[2] // positions.shape[0]
    at = jnp.repeat(positions, group)[:, None]

    def seen(slots: jax.Array) -> jax.Array:
        return attention.visible(at, slots, window) & (slots < chunk.start)

    own = _own(q, k, v, at, positions, group, window)
    past = jax.lax.cond(
        chunk.start > 0,
        lambda: attend_cached(q, cache, _row(chunk.row), seen, chunk.start),
        lambda: attend.Part(
            jnp.zeros_like(own.out), jnp.zeros_like(own.total), jnp.full_like(own.largest, attention.MASKED)
        ),
    )
    return attend.merge(past, own)


def _splits(c: ModelConfig) -> tuple[int, int]:
    """Where keys and values begin in an array of queries, keys and values."""
    return c.num_heads * c.head_dim, (c.num_heads + c.num_kv_heads) * c.head_dim


def _own(
    q: jax.Array, k: jax.Array, v: jax.Array, at: jax.Array, positions: jax.Array, group: int, window: int | None
) -> attend.Part:
    """The chunk's causal attention to itself, in static blocks of queries that see only keys up to their end."""
    parts = []
    for start in range(0, positions.shape[0], QUERIES):
        stop = min(start + QUERIES, positions.shape[0])
        rows = slice(start * group, stop * group)
        seen = attention.visible(at[rows], positions[:stop], window)
        parts.append(attend.attend(q[:, :, rows], k[..., :stop], v[:, :, :stop], seen, None))
    return attend.Part(*(jnp.concatenate(x, axis=2) for x in zip(*parts, strict=True)))


def _row(row: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Takes one row of an array [R, ...]."""
    return lambda a: jax.lax.dynamic_slice_in_dim(a, row, 1, axis=0)


def prefill_end(
    shape: Shape, weights: Weights, state: State, chunk: Chunk, sampling: Samplings, x: jax.Array
) -> tuple[State, Sampled, Scores]:
    """The end of a chunk whose layers have run, x [C, D] of any C: choose and route the next token when the prompt ends
    here, set the row's last token to it, and score targets; see `Programs.prefill`.

    Before the prompt's end only the row's position is set, to the end of what is written. Arrays of `Sampled` have one
    row.
    """
    x = rms_norm(x, weights.final_norm, shape.config.norm_eps)
    end = (chunk.start + chunk.count)[None]

    def attend_router(left: Sequence[jax.Array], step: Step) -> tuple[jax.Array, Token]:
        assert shape.router is not None and state.router is not None
        return attend_columns(left, state.router, step, _row(chunk.row), divisor=shape.router.logit_divisor)

    def choose_next() -> tuple[Any, Any]:
        hidden = jax.lax.dynamic_slice_in_dim(x, chunk.count - 1, 1, axis=0)
        chosen = choose_tokens(_logits(shape, hidden, weights.head), sampling, end)
        return chosen, route_next(shape, weights.router, chosen.tokens, end, jnp.ones(1, bool), attend_router)

    def nothing() -> tuple[Any, Any]:
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(choose_next))

    chosen, routed = jax.lax.cond(chunk.last, choose_next, nothing)
    state = advance(state, chunk.row[None], chunk.last[None], chosen.tokens, end, routed)
    state = replace(state, position=state.position.at[chunk.row].set(end[0]))
    top = (chosen.top_tokens, chosen.top_logprobs)
    scores = jax.lax.cond(
        chunk.scored, lambda: _score(shape, x, weights.head, chunk.targets, chunk.count), lambda: _unscored(x)
    )
    return state, Sampled(chosen.tokens, chosen.logprob, *top, routed.experts, jnp.zeros(1, bool)), scores


def _logits(shape: Shape, hidden: jax.Array, head: jax.Array) -> jax.Array:
    """[N, D] -> [N, V] float32."""
    own = linear(hidden, head)
    return spread.whole_vocabulary(own, shape.cut.rest, shape.config.vocab_size).astype(jnp.float32)


def _score(shape: Shape, x: jax.Array, head: jax.Array, targets: jax.Array, count: jax.Array) -> Scores:
    """Log-probabilities of the first `count` of `targets` [C] after hidden states x [C, D], a block of positions at a
    time."""
    step = min(SCORED, x.shape[0])

    def block(i: jax.Array, scores: Scores) -> Scores:
        first = jnp.minimum(i * step, x.shape[0] - step)
        hidden = jax.lax.dynamic_slice_in_dim(x, first, step, axis=0)
        wanted = jax.lax.dynamic_slice_in_dim(targets, first, step, axis=0)
        logits = _logits(shape, hidden, head)
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        values, tokens = best(logits)
        own = jnp.take_along_axis(logits, wanted[:, None], axis=-1) - total
        new = Scores(own[:, 0], tokens, values - total)
        return Scores(
            *(jax.lax.dynamic_update_slice_in_dim(a, b, first, axis=0) for a, b in zip(scores, new, strict=True))
        )

    return jax.lax.fori_loop(0, -(-count // step), block, _unscored(x))


def _unscored(x: jax.Array) -> Scores:
    chunk = x.shape[0]
    return Scores(jnp.zeros(chunk), jnp.zeros((chunk, TOP), jnp.int32), jnp.zeros((chunk, TOP)))


def route_prompt(shape: Shape, p: Params, tokens: jax.Array, count: jax.Array) -> PromptRoutes:
    """Route a prompt of `count` tokens, padded to [T]. Runs under a mesh of one device, or inside `jax.shard_map`."""
    r = shape.router
    assert r is not None
    valid = (jnp.arange(tokens.shape[0]) < count)[None]
    experts, weights = choose(route_logits(p, r, tokens[None], valid, None)[0][0], shape.top_k)
    y = rms_norm(p["embed"][tokens], p["attn_norm"], r.norm_eps)  # one block: its keys need no attention
    k, v = (rearrange(y @ p[n]["w"].T + p[n]["b"], "t (n h) -> t n h", h=r.head_dim) for n in LEFT[1:])
    freqs = attention.rotary_frequencies(r.head_dim, r.rope_theta, None)
    angles = jnp.arange(tokens.shape[0], dtype=jnp.float32)[:, None, None] * freqs
    k = attend.turn(k, jnp.cos(angles), jnp.sin(angles), axis=2)
    return PromptRoutes(experts, weights, rearrange(k, "t n h -> 1 n h t"), rearrange(v, "t n h -> 1 n t h"))
