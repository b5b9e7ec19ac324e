"""One decode step: the last token of each row through the backbone, the next one sampled and routed; in one program, or
in one for each span of layers and one for the end.

Activations are feature-major, [D, B], times weights [out, in]: on CPU the fast form for few rows. Caches are read as
they were and written last, in place, at an index that depends on what was read: else XLA copies them.

# B rows, D model width, H heads, K kv heads, G query heads a kv head, h head width, S tokens a row, P experts present,
# Kx experts a token, V vocabulary, R router width
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from readme_jax.config import MixtureConfig, ModelConfig, RouterConfig
from readme_jax.models import attention
from readme_jax.models.router import choose
from readme_jax.models.runtime import Runtime
from readme_jax.models.segments import Expert, kernel_pairs
from readme_jax.serving import attend, kernels, matvec, spread
from readme_jax.serving.matvec import Normed
from readme_jax.serving.sampling import Samplings, choose_tokens
from readme_jax.serving.spread import ONE, Cut
from readme_jax.serving.state import Cache, State, attend_cached, write_tokens

Params = Mapping[str, Any]
LEFT = ("q", "k", "v")


class Shape(NamedTuple):
    """What a program is compiled for beside its sizes. `config` has the heads of one device."""

    config: ModelConfig
    mixture: MixtureConfig | None
    router: RouterConfig | None
    runtime: Runtime
    length: int  # tokens of a row that may be used
    cut: Cut = ONE

    @property
    def top_k(self) -> int:
        """Kx: 0 for a dense model."""
        return self.mixture.top_k if self.mixture else 0


class Weights(NamedTuple):
    """A model's weights but for its experts. `layers` hold attention and norms, `permanent` what every token runs."""

    embed: jax.Array
    head: jax.Array
    final_norm: jax.Array
    layers: tuple[Params, ...]
    permanent: tuple[Expert | None, ...]
    router: Params | None

    def span(self, layers: slice) -> Weights:
        """Some of the layers."""
        some = (self.layers[layers], self.permanent[layers])
        return self._replace(head=self.embed, layers=some[0], permanent=some[1], router=None)

    @property
    def end(self) -> Weights:
        """What comes after the layers."""
        return self._replace(layers=(), permanent=())


class Sampled(NamedTuple):
    """What a call returns of each of its B rows, on the device: the new token, its log-probability, the best
    alternatives [B, TOP], and the new token's experts [B, Kx]. `missing` rows needed an expert that was not given:
    nothing was sampled, nothing of the row has changed, run it again. Rows that were not active mean nothing."""

    tokens: jax.Array
    logprob: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array
    experts: jax.Array
    missing: jax.Array


class Plan(NamedTuple):
    """Rows sorted by expert present: slots [B * Kx] (the pair b * Kx + k of each sorted one), inverse [B, Kx] (where
    each went), start and size [P] of each expert's segment, weights [B, Kx]."""

    slots: jax.Array
    inverse: jax.Array
    start: jax.Array
    size: jax.Array
    weights: jax.Array


def plan_rows(
    experts: jax.Array, weights: jax.Array, present: jax.Array, active: jax.Array, cut: Cut = ONE
) -> tuple[Plan, jax.Array]:
    """Segments of rows with experts [B, Kx] among `present` [P] (of an expert that is repeated only the first), and
    which rows [B] run: active, with all their experts present. Rows that do not run are in no segment, nor those of
    other devices' experts."""
    match = experts[..., None] == present
    runs = active & match.any(axis=-1).all(axis=-1)
    index = jnp.where(runs[:, None], jnp.argmax(match, axis=-1), present.shape[0]).reshape(-1)
    index, count = spread.own_experts(index, present.shape[0], cut)
    slots = jnp.argsort(index, stable=True)
    inverse = jnp.argsort(slots).reshape(experts.shape)
    size = jnp.sum(index[:, None] == jnp.arange(count), axis=0, dtype=jnp.int32)
    return Plan(slots, inverse, jnp.cumsum(size) - size, size, weights), runs


def few(runtime: Runtime, y: jax.Array | Normed) -> bool:
    """Whether products of so few columns are our kernels'."""
    columns = (y.x if isinstance(y, Normed) else y).shape[1]
    return runtime.decode == "kernel" and columns <= matvec.COLUMNS


def times(runtime: Runtime, w: jax.Array, y: jax.Array | Normed, add: jax.Array | None = None) -> jax.Array:
    """w [N, D] @ y [D, B], [N, B], with `add` [N, B] added."""
    if few(runtime, y):
        return matvec.matvec(w, y, add, interpret=jax.default_backend() == "cpu")
    out = w @ plain(y)
    return out if add is None else add + out


def swiglu(runtime: Runtime, y: jax.Array | Normed, w: Expert, add: jax.Array | None = None) -> jax.Array:
    """Feature-major SwiGLU, [D, N] -> [D, N], with `add` added."""
    if few(runtime, y):
        h = matvec.gated(w.gate, w.up, y, interpret=jax.default_backend() == "cpu")
    else:
        y = plain(y)
        h = jax.nn.silu(w.gate @ y) * (w.up @ y)
    return times(runtime, w.down, h, add)


def plain(y: jax.Array | Normed) -> jax.Array:
    """[D, B], normalised now."""
    return _norm(*y) if isinstance(y, Normed) else y


def _norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the first axis of [D, B], in float32."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=0, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)[:, None]).astype(x.dtype)


def expert_columns(
    y: jax.Array, plan: Plan, experts: Sequence[Expert], runtime: Runtime, some: bool = False
) -> jax.Array:
    """The weighted sum of each column's experts, [D, B] -> [D, B].

    `kernel` is prefill's; `blocks` runs each segment as matmuls over a static number of columns, of which the spare
    ones are overwritten by the experts that follow; other back ends run every expert over all columns. With `some`, the
    plan need not cover all columns: the rest belong to experts elsewhere and add nothing here.
    """
    if runtime.segments == "kernel":
        pairs = kernel_pairs(y.T, plan.slots, plan.inverse, plan.size, list(experts))
        return _weigh(rearrange(pairs, "(b k) d -> d b k", b=y.shape[1]), plan)
    if runtime.segments != "blocks":
        return _masked_columns(runtime, y, plan, experts)
    top = plan.slots.shape[0]
    sizes = segment_sizes(top)
    columns = jnp.pad(jnp.take(y, plan.slots // plan.inverse.shape[1], axis=1), ((0, 0), (0, top)))
    out = jnp.zeros_like(columns)

    def segment(w: Expert, start: jax.Array, size: int) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(columns, start, size, axis=1)
        return jnp.pad(swiglu(runtime, part, w), ((0, 0), (0, top - size)))

    for p, w in enumerate(experts):
        start = plan.start[p]
        branch = sum((plan.size[p] > size).astype(jnp.int32) for size in (0, *sizes[:-1]))
        nothing = functools.partial(jnp.zeros, (y.shape[0], top), y.dtype)
        new = jax.lax.switch(branch, [nothing, *(functools.partial(segment, w, start, size) for size in sizes)])
        out = jax.lax.dynamic_update_slice_in_dim(out, new, start, axis=1)
    if some:
        out = jnp.where(jnp.arange(2 * top) < plan.size.sum(), out, 0)
    return _weigh(jnp.take(out, plan.inverse, axis=1), plan)


def segment_sizes(columns: int) -> tuple[int, ...]:
    """Columns of a segment that matmuls are compiled for. On CPU one of 2 to 4 columns takes the time of one, 8 a fifth
    more, 16 half more; a single column's kernel would be compiled again for every expert and layer."""
    return (*(n for n in (4, 8, 16, 64) if n < columns), columns)


def _masked_columns(runtime: Runtime, y: jax.Array, plan: Plan, experts: Sequence[Expert]) -> jax.Array:
    at = jnp.arange(plan.slots.shape[0])[:, None]
    mine = (at >= plan.start) & (at < plan.start + plan.size)  # [B * Kx, P]
    weights = plan.weights if plan.weights.shape[1] > 1 else jnp.ones_like(plan.weights)
    share = jnp.einsum("bkp,bk->pb", mine[plan.inverse].astype(jnp.float32), weights)
    parts = [swiglu(runtime, y, w) * share[p].astype(y.dtype) for p, w in enumerate(experts)]
    return functools.reduce(jnp.add, parts)


def _weigh(pairs: jax.Array, plan: Plan) -> jax.Array:
    """[D, B, Kx] -> [D, B]; the weight of an only expert is 1."""
    if pairs.shape[2] == 1:
        return pairs[:, :, 0]
    return jnp.sum(pairs * plan.weights.astype(pairs.dtype), axis=2)


class Step(NamedTuple):
    """What the layers of one step share: positions [B] of its tokens, which rows run [B], rotary cos and sin [h/2, B]
    and how many keys are read."""

    positions: jax.Array
    runs: jax.Array
    cos: jax.Array
    sin: jax.Array
    reach: jax.Array

    @classmethod
    def at(cls, positions: jax.Array, runs: jax.Array, freqs: jax.Array) -> Step:
        """With rotary frequencies [h/2]."""
        angles = freqs[:, None] * positions.astype(jnp.float32)
        return cls(positions, runs, jnp.cos(angles), jnp.sin(angles), jnp.max(jnp.where(runs, positions, 0)))


class Token(NamedTuple):
    """A token's key and value [B, K, h] of a layer, to be written to its cache."""

    key: jax.Array
    value: jax.Array


def _attention(shape: Shape, p: Params, x: jax.Array, cache: Cache, step: Step) -> tuple[jax.Array, Token | Cache]:
    """x [D, B] with self-attention added, and the tokens' keys and values, or the cache with them in it already."""
    y = Normed(x, p["attn_norm"], shape.config.norm_eps)
    left = [times(shape.runtime, p[n], y) for n in (("qkv",) if "qkv" in p else LEFT)]
    out, new = _self_attention(shape.runtime, left, cache, step, shape.config.sliding_window)
    if shape.cut.heads:
        return x + spread.total(times(shape.runtime, p["o"], out), shape.cut.heads), new
    return times(shape.runtime, p["o"], out, x), new


def _self_attention(
    runtime: Runtime,
    left: Sequence[jax.Array],
    cache: Cache,
    step: Step,
    window: int | None = None,
    divisor: float | None = None,
) -> tuple[jax.Array, Token | Cache]:
    """`left`: queries, keys and values [n h, B], or all in one. Returns [H h, B]."""
    if runtime.decode == "kernel":
        qkv = left[0] if len(left) == 1 else jnp.concatenate(left)
        angles, interpret = (step.cos, step.sin), jax.default_backend() == "cpu"
        return kernels.attend_and_write(
            qkv, *angles, cache, step.positions, step.runs, window, divisor, interpret=interpret
        )
    return attend_columns(left, cache, step, lambda a: a[: step.positions.shape[0]], window, divisor)


def attend_columns(
    left: Sequence[jax.Array],
    cache: Cache,
    step: Step,
    pick: Callable[[jax.Array], jax.Array],
    window: int | None = None,
    divisor: float | None = None,
) -> tuple[jax.Array, Token]:
    """Self-attention of one token a row by XLA; `pick` takes the call's rows of an array [R, ...]."""
    kv_heads, width = cache.keys[0].shape[1:3]
    q, k, v = (rearrange(x, "(n h) b -> n h b", h=width) for x in left)
    q, k = (attend.turn(z, step.cos, step.sin, axis=1) for z in (q, k))
    q = rearrange(q, "(k g) h b -> b k g h", k=kv_heads)
    k, v = (rearrange(z, "k h b -> b k h").astype(cache.keys[0].dtype) for z in (k, v))

    def seen(slots: jax.Array) -> jax.Array:  # the token before this one sees as far as this one's window but itself
        return attention.visible(step.positions[:, None] - 1, slots, window and window - 1)[:, None, None]

    past = attend_cached(q, cache, pick, seen, step.reach, divisor)
    out = attend.merge(past, attend.attend_self(q, k, v, divisor)).astype(left[0].dtype)
    return rearrange(out, "b k g h -> (k g h) b"), Token(k, v)


def _feed_forward(
    shape: Shape, p: Params, always: Expert | None, plan: Plan | None, experts: Sequence[Expert], x: jax.Array
) -> jax.Array:
    """x [D, B] with the permanent part and the experts added."""
    y, cut = Normed(x, p["ffn_norm"], shape.config.norm_eps), shape.cut
    alone = plan is not None and len(experts) == 1 and cut.experts == 1  # then it is every column's
    out = None if cut.rest else x
    for w in (always, experts[0] if alone else None):
        if w is not None:
            out = swiglu(shape.runtime, y, w, out)
    if plan is not None and not alone:
        mixed = expert_columns(plain(y), plan, experts, shape.runtime, some=cut.experts > 1)
        out = mixed if out is None else out + mixed
    assert out is not None
    return x + spread.total(out, cut.rest) if cut.rest else out


class Layout(NamedTuple):
    """What all layers of a step share: the step, its plan (None: a dense model), and which rows [B] are `missing` an
    expert."""

    step: Step
    plan: Plan | None
    missing: jax.Array


def decode_step(
    shape: Shape,
    weights: Weights,
    experts: Sequence[Sequence[Expert]],
    state: State,
    active: jax.Array,
    present: jax.Array,
    sampling: Samplings,
) -> tuple[State, Sampled]:
    """Run the last token of rows 0 .. B and choose and route the next; see `Programs.decode`.

    active [B] bool, present [P] int32 names `experts`, which has an entry a layer (of none: a dense model).
    """
    rows = lay_out(shape, state, active, present)
    x = embed_rows(shape, weights, state, active.shape[0])
    layers, x = run_layers(shape, weights, experts, state.layers, rows, x)
    return finish(shape, weights, replace(state, layers=layers), rows, x, sampling)


def decode_span(
    shape: Shape,
    weights: Weights,
    experts: Sequence[Sequence[Expert]],
    caches: Sequence[Cache],
    state: State,
    active: jax.Array,
    present: jax.Array,
    first: jax.Array,
    x: jax.Array,
) -> tuple[tuple[Cache, ...], jax.Array, jax.Array]:
    """Some layers of a step, those of `weights`: x [D, B] comes from the layers before, but for the `first`.

    `caches` are theirs; `state` is only read. Returns caches, x, and a scalar that is there when all of it has run.
    """
    rows = lay_out(shape, state, active, present)
    x = jax.lax.cond(first, lambda: embed_rows(shape, weights, state, active.shape[0]), lambda: x)
    caches, x = run_layers(shape, weights, experts, caches, rows, x)
    return caches, x, after(x)


def decode_end(
    shape: Shape,
    weights: Weights,
    state: State,
    active: jax.Array,
    present: jax.Array,
    x: jax.Array,
    sampling: Samplings,
) -> tuple[State, Sampled]:
    """The end of a step whose layers have run: x [D, B] comes from the last one."""
    return finish(shape, weights, state, lay_out(shape, state, active, present), x, sampling)


def lay_out(shape: Shape, state: State, active: jax.Array, present: jax.Array) -> Layout:
    """The rows' last tokens sorted by expert."""
    c, rows = shape.config, active.shape[0]
    positions = state.position[:rows]
    active = active & (positions < shape.length)
    plan, runs = None, active
    if shape.mixture:
        plan, runs = plan_rows(state.experts[:rows], state.weights[:rows], present, active, shape.cut)
    step = Step.at(positions, runs, attention.rotary_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))
    return Layout(step, plan, active & ~runs)


def embed_rows(shape: Shape, weights: Weights, state: State, rows: int) -> jax.Array:
    """The last tokens of rows 0 .. B before the first layer [D, B]."""
    return spread.embed(weights.embed, state.token[:rows], shape.cut.rest).T


def run_layers(
    shape: Shape,
    weights: Weights,
    experts: Sequence[Sequence[Expert]],
    caches: Sequence[Cache],
    rows: Layout,
    x: jax.Array,
) -> tuple[tuple[Cache, ...], jax.Array]:
    """The layers of `weights` over x [D, B]. Their `caches` get the rows' keys and values."""
    step, plan, _ = rows
    new = []
    for i, p in enumerate(weights.layers):
        with jax.named_scope("attention"):
            x, token = _attention(shape, p, x, caches[i], step)
        new.append(token)
        with jax.named_scope("feed_forward"):
            x = _feed_forward(shape, p, weights.permanent[i], plan, experts[i], x)
    positions = step.positions + after(x)
    return _with(caches, new, jnp.arange(positions.shape[0]), positions, step.runs), x


def after(x: jax.Array) -> jax.Array:
    """Zero, known once x [N, M] is: added to an index it orders writes after all reads that x needs."""
    return jnp.minimum(jnp.argmax(x[0]).astype(jnp.int32), 0)


def finish(
    shape: Shape, weights: Weights, state: State, rows: Layout, x: jax.Array, sampling: Samplings
) -> tuple[State, Sampled]:
    """Choose and route the rows' next tokens; x [D, B] comes from the last layer."""
    runs, positions = rows.step.runs, rows.step.positions + 1
    with jax.named_scope("sample"):
        own = times(shape.runtime, weights.head, Normed(x, weights.final_norm, shape.config.norm_eps)).T
        logits = spread.whole_vocabulary(own, shape.cut.rest, shape.config.vocab_size).astype(jnp.float32)
        chosen = choose_tokens(logits, sampling, positions)

    def attend_router(left: Sequence[jax.Array], at: Step) -> tuple[jax.Array, Token | Cache]:
        assert shape.router is not None and state.router is not None
        return _self_attention(shape.runtime, left, state.router, at, divisor=shape.router.logit_divisor)

    routed = route_next(shape, weights.router, chosen.tokens, jnp.where(runs, positions, 0), runs, attend_router)
    state = advance(state, jnp.arange(runs.shape[0]), runs, chosen.tokens, positions, routed)
    return state, Sampled(*chosen, routed.experts, rows.missing)


class Routed(NamedTuple):
    """Experts and weights [B, Kx] of new tokens, and the router's keys and values [B, Hr, hr] of them, or its cache."""

    experts: jax.Array
    weights: jax.Array
    new: Token | Cache | None


def _affine(p: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    return p["w"] @ x + p["b"][:, None]


def route_next(
    shape: Shape,
    p: Params | None,
    tokens: jax.Array,
    positions: jax.Array,
    runs: jax.Array,
    attend_router: Callable[[Sequence[jax.Array], Step], tuple[jax.Array, Token | Cache]],
) -> Routed:
    """Route one new token of each row: tokens and positions [B], where it `runs` [B].

    `attend_router` is given queries, keys and values [n h, B], and attends to the router's cache. The equations are
    those of `models.router.route_logits`.
    """
    r, rows = shape.router, tokens.shape[0]
    if r is None:
        ones = jnp.ones((rows, shape.top_k), jnp.float32)
        return Routed(jnp.zeros((rows, shape.top_k), jnp.int32), ones, None)
    assert p is not None
    with jax.named_scope("route"):
        step = Step.at(positions, runs, attention.rotary_frequencies(r.head_dim, r.rope_theta, None))
        x = p["embed"][tokens].T
        y = _norm(x, p["attn_norm"], r.norm_eps)
        out, new = attend_router([_affine(p[n], y) for n in LEFT], step)
        x = x + _affine(p["o"], out)
        y = _norm(x, p["mlp_norm"], r.norm_eps)
        x = x + _affine(p["down"], jax.nn.silu(_affine(p["up"], y)))
        logits = _affine(p["head"], _norm(x, p["final_norm"], r.norm_eps)).T
        return Routed(*choose(logits, shape.top_k), new)


def advance(
    state: State, rows: jax.Array, runs: jax.Array, tokens: jax.Array, positions: jax.Array, routed: Routed
) -> State:
    """The state with `rows` [B], where it `runs` [B], at the new tokens [B], which have `positions` [B], and their
    routes.

    Experts are never negative: adding the lesser of them and 0 to an index orders writes after all reads.
    """
    router = state.router
    if router is not None:
        assert routed.new is not None
        (router,) = _with([router], [routed.new], rows, positions + jnp.minimum(routed.experts[:, 0], 0), runs)

    def update(old: jax.Array, values: jax.Array) -> jax.Array:
        mask = runs.reshape(-1, *[1] * (values.ndim - 1))
        return old.at[rows].set(jnp.where(mask, values, old[rows]).astype(old.dtype))

    return State(
        state.layers,
        router,
        update(state.token, tokens),
        update(state.position, positions),
        update(state.experts, routed.experts),
        update(state.weights, routed.weights),
    )


def _with(
    caches: Sequence[Cache], new: Sequence[Token | Cache], rows: jax.Array, positions: jax.Array, runs: jax.Array
) -> tuple[Cache, ...]:
    """Caches with the new tokens: as a kernel has left them, or written now."""
    written = tuple(n for n in new if isinstance(n, Cache))
    tokens = [n for n in new if isinstance(n, Token)]
    return written or write_tokens(caches, tokens, rows, positions, runs)
