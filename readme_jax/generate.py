"""Generation, dense or mixture: a jitted prefill and a jitted decode step over the key/value caches.

The router runs in the same call as the sampling, so each new token comes back already routed (section 3, fact d).

# B batch, T prompt length, S cache slots, K experts a token, V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax import config
from readme_jax.checkpoints.hf import Dense
from readme_jax.checkpoints.mixture import Mixture
from readme_jax.errors import CheckpointError, ConfigError
from readme_jax.models import attention
from readme_jax.models.experts import plan_batch
from readme_jax.models.feed_forward import linear
from readme_jax.models.layerwise import with_gates
from readme_jax.models.llama import Llama, head_weight
from readme_jax.models.router import Router, choose, router_cache
from readme_jax.models.runtime import Runtime, runtime_for
from readme_jax.parallel.mesh import make_mesh

SMALLEST = 16  # shortest compiled prompt; longer ones are its doublings
SLOTS = 128  # caches are a multiple of this long


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0; otherwise from the smallest set of tokens whose probability reaches `top_p`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature {self.temperature}: must be zero (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p}: must be in (0, 1]")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed {self.seed}: must be zero or more and below 2^63")


GREEDY = Sampling()
Prompts = Sequence[Sequence[int]]  # token ids


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Between two steps: the last token [B, 1] with its experts and weights [B, 1, K], not yet run, and the caches."""

    token: jax.Array
    experts: jax.Array | None
    weights: jax.Array | None
    cache: attention.Cache
    router_cache: attention.Cache | None
    step: jax.Array


class Emitted(NamedTuple):
    """One new token of every row: tokens [B], their experts [B, K] (None: dense), and which rows are not done [B]."""

    tokens: np.ndarray
    experts: np.ndarray | None
    live: np.ndarray


class Generated(NamedTuple):
    """New tokens of each prompt, the stop token left out, and the experts of each token (empty: dense)."""

    tokens: list[list[int]]
    experts: list[list[tuple[int, ...]]]


def sample(logits: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """Tokens [B] of logits [B, V]: greedy where `temperature` is 0, else from the nucleus `top_p`."""
    scaled = logits / jnp.maximum(temperature, 1e-6)
    order = jnp.argsort(-scaled, axis=-1)
    probabilities = jax.nn.softmax(jnp.take_along_axis(scaled, order, axis=-1), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    drawn = jax.random.categorical(key, jnp.where(before < top_p, jnp.log(probabilities), -jnp.inf))
    return jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0]


class Generator:
    """A model ready to generate. Compiles once for each (batch, prompt bucket, cache length)."""

    def __init__(self, model: Dense | Mixture, runtime: Runtime | None = None, mesh: Any = None) -> None:
        """`mesh` defaults to the first device. Parameters are converted to the runtime's number format once."""
        runtime = runtime_for(config.Model()) if runtime is None else runtime
        self.runtime = replace(runtime, layout="unrolled", remat="none")
        self.mesh = make_mesh(config.Mesh(), jax.devices()[:1]) if mesh is None else mesh
        self.config, self.tokenizer = model.config, model.tokenizer
        mixture = model if isinstance(model, Mixture) else None
        if mixture is not None and mixture.router is None and mixture.mixture.num_experts > 1:
            raise CheckpointError(f"a mixture of {mixture.mixture.num_experts} experts needs a router to generate")
        self.mixture = mixture.mixture if mixture else None
        self.router_config = mixture.router_config if mixture else None
        self.backbone = Llama(self.config, self.mixture, self.runtime)
        with jax.set_mesh(self.mesh):
            self.params = jax.tree.map(lambda w: jnp.asarray(w, self.runtime.dtype), model.params)
            self.router = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), mixture.router if mixture else None)
            self.channels = jax.tree.map(jnp.asarray, mixture.channels if mixture else None)
        self.layerwise = self.router_config is not None and self.router_config.kind == "layerwise"
        if self.layerwise:  # each layer routes for itself: nothing to report or to cache before it runs
            self.channels, self.router_config = with_gates(self.channels, self.router["gates"]), None
        self._prefill = jax.jit(self._first, static_argnames=("greedy", "slots"))
        self._decode = jax.jit(self._next, static_argnames=("greedy",), donate_argnames=("state",))

    def stream(
        self, prompts: Prompts, max_tokens: int, sampling: Sampling = GREEDY, stop: Sequence[int] = ()
    ) -> Iterator[Emitted]:
        """Yield the next token of every row until all rows met a token of `stop` or `max_tokens` are out.

        Rows that are done go on computing; `live` says which are not. Raises ConfigError for an empty prompt or one
        that leaves no room.
        """
        tokens, valid = self._pad(prompts, max_tokens)
        slots = -(-(tokens.shape[1] + max_tokens) // SLOTS) * SLOTS
        settings = (jax.random.key(sampling.seed), jnp.float32(sampling.temperature), jnp.float32(sampling.top_p))
        greedy = sampling.temperature == 0
        live = np.ones(len(prompts), bool)
        weights = (self.params, self.router, self.channels)
        with jax.set_mesh(self.mesh):
            state = self._prefill(weights, tokens, valid, settings, greedy=greedy, slots=slots)
        for left in reversed(range(max_tokens)):
            new = np.asarray(state.token)[:, 0]
            live = live & ~np.isin(new, list(stop))
            yield Emitted(new, None if state.experts is None else np.asarray(state.experts)[:, 0], live)
            if not left or not live.any():
                return
            with jax.set_mesh(self.mesh):
                state = self._decode(weights, state=state, settings=settings, greedy=greedy)

    def generate(
        self, prompts: Prompts, max_tokens: int, sampling: Sampling = GREEDY, stop: Sequence[int] = ()
    ) -> Generated:
        """New tokens of each prompt (token ids), up to and without the first token of `stop`: see `stream`."""
        tokens: list[list[int]] = [[] for _ in prompts]
        experts: list[list[tuple[int, ...]]] = [[] for _ in prompts]
        for new in self.stream(prompts, max_tokens, sampling, stop):
            for row in np.flatnonzero(new.live):
                tokens[row].append(int(new.tokens[row]))
                if new.experts is not None:
                    experts[row].append(tuple(int(e) for e in new.experts[row]))
        return Generated(tokens, experts)

    def _pad(self, prompts: Prompts, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompts padded on the left to one bucketed length: tokens and validity [B, T]."""
        if max_tokens < 1:
            raise ConfigError(f"max_tokens {max_tokens}: must be above zero")
        if not prompts or not all(len(p) for p in prompts):
            raise ConfigError("an empty prompt: give at least one token")
        longest = max(len(p) for p in prompts)
        if longest + max_tokens > self.config.max_position:
            raise ConfigError(
                f"a prompt of {longest} tokens and {max_tokens} new ones pass the model's {self.config.max_position}"
            )
        length = SMALLEST
        while length < longest:
            length *= 2
        tokens, valid = np.zeros((len(prompts), length), np.int32), np.zeros((len(prompts), length), bool)
        for row, prompt in enumerate(prompts):
            tokens[row, length - len(prompt) :] = prompt
            valid[row, length - len(prompt) :] = True
        return tokens, valid

    # --- traced ---------------------------------------------------------------------------------------------------

    def _caches(self, batch: int, slots: int) -> tuple[attention.Cache, attention.Cache | None]:
        c = self.config
        cache = attention.empty_cache(c.num_layers, batch, c.num_kv_heads, c.head_dim, slots, self.runtime.dtype)
        return cache, router_cache(self.router_config, batch, slots) if self.router_config else None

    def _route(self, router: Any, tokens: Any, valid: Any, cache: Any) -> tuple[Any, Any, Any]:
        """Experts and weights [B, T, K] of tokens [B, T], and the router's cache."""
        if self.mixture is None or self.layerwise:
            return None, None, None
        if self.router_config is None:  # one expert
            return jnp.zeros((*tokens.shape, 1), jnp.int32), jnp.ones((*tokens.shape, 1)), None
        logits, cache = Router(self.router_config).apply({"params": router}, tokens, valid, cache)
        return *choose(logits, self.mixture.top_k), cache

    def _forward(self, weights: Any, tokens: Any, valid: Any, cache: Any, experts: Any, mixed: Any) -> tuple[Any, Any]:
        """Logits [B, V] of the last position, and the backbone's cache."""
        params, _, channels = weights
        plan = None
        if self.mixture is not None and not self.layerwise:
            plan = plan_batch(experts, self.mixture.num_experts, mixed if self.mixture.top_k > 1 else None)
        hidden, cache = self.backbone.apply({"params": params}, tokens, plan, channels, valid, cache)
        return linear(hidden[:, -1], head_weight(params)).astype(jnp.float32), cache

    def _emit(
        self, weights: Any, logits: Any, settings: Any, greedy: bool, cache: Any, routed: Any, step: Any
    ) -> State:
        """Choose the next token and route it."""
        key, temperature, top_p = settings
        with jax.named_scope("sample"):
            if greedy:
                token = jnp.argmax(logits, axis=-1)
            else:
                token = sample(logits, jax.random.fold_in(key, step), temperature, top_p)
        token = token.astype(jnp.int32)[:, None]
        with jax.named_scope("route"):
            experts, mixed, routed = self._route(weights[1], token, None, routed)
        return State(token, experts, mixed, cache, routed, step + 1)

    def _first(self, weights: Any, tokens: Any, valid: Any, settings: Any, greedy: bool, slots: int) -> State:
        cache, routed = self._caches(tokens.shape[0], slots)
        experts, mixed, routed = self._route(weights[1], tokens, valid, routed)
        logits, cache = self._forward(weights, tokens, valid, cache, experts, mixed)
        return self._emit(weights, logits, settings, greedy, cache, routed, jnp.int32(0))

    def _next(self, weights: Any, state: State, settings: Any, greedy: bool) -> State:
        logits, cache = self._forward(weights, state.token, None, state.cache, state.experts, state.weights)
        return self._emit(weights, logits, settings, greedy, cache, state.router_cache, state.step)
