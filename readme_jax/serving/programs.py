"""The jitted calls of serving: route a prompt, prefill a chunk, decode a step, copy a row. No request logic.

Each is compiled ahead of time for the shapes of `Limits`, unrolled over its layers (all, or a span of them: `passes`),
with the arrays of the experts present as arguments. State and what is sampled stay on the device, so a call may be made
before the last one's tokens are read.

# R rows of the cache, S tokens a row, B rows of a decode call, C tokens of a chunk, P experts present, Kx experts a
# token (0: a dense model), T tokens of a prompt
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from readme_jax import config
from readme_jax.checkpoints.hf import Dense
from readme_jax.checkpoints.mixture import Mixture
from readme_jax.errors import CheckpointError, ConfigError
from readme_jax.models.llama import head_weight
from readme_jax.models.runtime import Runtime, runtime_for
from readme_jax.serving import decode as decoding
from readme_jax.serving import prefill as prefilling
from readme_jax.serving.buckets import CPU_PROGRAMS, GPU_PROGRAMS, Limits, bucket, decode_shapes
from readme_jax.serving.decode import LEFT, Sampled, Shape, Weights
from readme_jax.serving.kernels import BLOCK
from readme_jax.serving.passes import DecodePass, Given, PrefillPass
from readme_jax.serving.prefill import Chunk, Scores
from readme_jax.serving.sampling import Samplings
from readme_jax.serving.spread import Axes
from readme_jax.serving.state import State, copy_rows, empty_state, insert_routed
from readme_jax.serving.store import ExpertStore

# A whole call becomes one CUDA graph, branches and loops included: else the host waits for each of their conditions.
GPU_OPTIONS: dict[str, str | bool] = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,WHILE,DYNAMIC_SLICE_FUSION"
}
COMPILED_AT_ONCE = 16  # programs, on a GPU; XLA on a CPU has threads of its own
KEPT = 256  # small inputs of calls that are kept on the device
WHOLE = PartitionSpec()
Program = tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...], Any]  # with arguments, donated ones, result specs


class Routed(NamedTuple):
    """A routed prompt: experts and weights [T, Kx] on the host, the router's keys and values on the device."""

    experts: np.ndarray
    weights: np.ndarray
    keys: jax.Array | None
    values: jax.Array | None


class Programs:
    """Compiled calls over one model. `compilations` counts programs compiled, `planned` is how many there can be."""

    def __init__(
        self,
        model: Dense | Mixture,
        store: ExpertStore,
        limits: Limits,
        runtime: Runtime | None = None,
    ) -> None:
        """Runs on the store's mesh.

        Raises CheckpointError for a mixture without its router, ConfigError when the limits do not fit the model or
        need more programs than a platform's bound.
        """
        mixture = model if isinstance(model, Mixture) else None
        if mixture is not None and mixture.router is None and mixture.mixture.num_experts > 1:
            raise CheckpointError(f"a mixture of {mixture.mixture.num_experts} experts needs a router to serve")
        if mixture is not None and mixture.router_config is not None and mixture.router_config.kind != "pregating":
            kind = mixture.router_config.kind
            raise CheckpointError(f"a {kind} router is not served: use `readme-jax generate`, or a pre-gating router")
        if limits.length > model.config.max_position:
            raise ConfigError(f"Limits.length = {limits.length}: the model takes {model.config.max_position} tokens")
        runtime = runtime_for(config.Model()) if runtime is None else runtime
        self.spread, self.mesh = store.spread, store.spread.mesh
        self.limits, self.store, self.config = limits, store, model.config
        self.shape = Shape(
            model.config,
            mixture.mixture if mixture else None,
            mixture.router_config if mixture else None,
            replace(runtime, layout="unrolled", remat="none"),
            limits.length,
        )
        self._own = self.shape._replace(config=self.spread.own, cut=self.spread.cut)
        self.platform = self.mesh.devices.flat[0].platform
        self._whole = self.spread.sharding()
        self.weights = self._place(model, store)
        self._programs: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._small: dict[tuple[Any, ...], jax.Array] = {}
        self._blank: dict[tuple[int, ...], jax.Array] = {}
        self.planned = len(self._all())
        most = CPU_PROGRAMS if self.platform == "cpu" else GPU_PROGRAMS
        if self.planned > most:
            raise ConfigError(f"{self.planned} programs, {most} at most: give fewer Limits.chunks or Limits.decode")

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return len(self._programs)

    @property
    def by_span(self) -> bool:
        """Whether a decode call runs span by span even where nothing streams: on CPU calls cost nothing, and spans
        compile in a third of the time; on a GPU steps that are dispatched ahead are faster as one call."""
        return not self.store.resident and self.platform == "cpu"

    def new_state(self) -> State:
        """An empty state of R rows."""
        placed = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self._state_spec)
        return jax.jit(self._empty_state, out_shardings=placed)()

    def route(self, tokens: Sequence[int]) -> Routed:
        """Route a whole prompt on its arrival. Raises ConfigError when it is longer than a row."""
        count, kx = len(tokens), self.shape.top_k
        size = bucket(count, self.limits.prompts, "tokens of a prompt")
        if self.shape.router is None:
            return Routed(np.zeros((count, kx), np.int32), np.ones((count, kx), np.float32), None, None)
        padded = np.zeros(size, np.int32)
        padded[:count] = tokens
        out = self.program("route", size)(self.weights.router, padded, np.int32(count))
        return Routed(np.asarray(out.experts)[:count], np.asarray(out.weights)[:count], out.keys, out.values)

    def insert(self, state: State, row: int, routed: Routed) -> State:
        """The state with the router's cache of a prompt in a row; before the row's first `prefill`. Uses `state` up."""
        if routed.keys is None or state.router is None:
            return state
        program = self.program("insert", routed.keys.shape[3])
        return replace(state, router=program(state.router, np.int32(row), routed.keys, routed.values))

    def prefill(
        self,
        state: State,
        row: int,
        tokens: np.ndarray,
        start: int,
        routes: np.ndarray,
        route_weights: np.ndarray,
        experts: Sequence[int],
        weights: Given,
        sampling: Samplings | None = None,
        last: bool = False,
        targets: np.ndarray | None = None,
    ) -> tuple[State, Sampled | None, Scores | None]:
        """Run tokens `start` .. `start + C` of a row, C at most the largest of `Limits.chunks`. Uses `state` up.

        `routes` and `route_weights` [C, Kx] are the tokens' (from `route`), `experts` those present and `weights` what
        `store.present(experts)` gave. With `last` the next token is sampled with `sampling` (one row; default greedy),
        routed, and set as the row's last: `Sampled` of one row. With `targets` [C], the successor of each token,
        `Scores` holds what the model thought of them (the first C of the returned arrays). Raises ConfigError when a
        route names an expert that is not present, or the chunk passes the row's end.
        """
        chunk = self.prefill_pass(row, tokens, start, routes, route_weights, experts, sampling, last, targets)
        state = chunk.whole(state, weights)
        return state, chunk.sampled, chunk.scores

    def prefill_pass(
        self,
        row: int,
        tokens: np.ndarray,
        start: int,
        routes: np.ndarray,
        route_weights: np.ndarray,
        experts: Sequence[int],
        sampling: Samplings | None = None,
        last: bool = False,
        targets: np.ndarray | None = None,
    ) -> PrefillPass:
        """What `prefill` does, to be run span by span."""
        count = len(tokens)
        size = bucket(count, self.limits.chunks, "tokens of a chunk")
        if start + count > self.limits.length:
            raise ConfigError(f"tokens {start} to {start + count}: a row holds {self.limits.length}")
        absent = set(np.unique(routes).tolist()) - set(experts)
        if absent:
            raise ConfigError(f"tokens of experts {sorted(absent)}, but only {sorted(set(experts))} are present")
        kx = self.shape.top_k
        chunk = Chunk(
            np.int32(row),
            np.int32(start),
            np.int32(count),
            _padded(tokens, size, 0, np.int32),
            _padded(routes, size, -1, np.int32).reshape(size, kx),
            _padded(route_weights, size, 1, np.float32).reshape(size, kx),
            _padded(() if targets is None else targets, self.limits.chunks[-1], 0, np.int32),
            np.bool_(last),
            np.bool_(targets is not None),
        )
        return PrefillPass(self, chunk, experts, Samplings.greedy(1) if sampling is None else sampling)

    def decode(
        self, state: State, active: np.ndarray, experts: Sequence[int], weights: Given, sampling: Samplings
    ) -> tuple[State, Sampled]:
        """Run the last token of the rows 0 .. B that are `active` [B] bool and sample, and route, the next. Uses
        `state` up.

        `experts` are those present, `weights` what `store.present(experts)` gave; `sampling` has B rows. The arrays of
        `Sampled` may have more rows than B. Rows whose token needs another expert are returned as `missing`.
        """
        step = self.decode_pass(active, experts, sampling)
        state = step.whole(state, weights)
        assert step.sampled is not None
        return state, step.sampled

    def decode_pass(self, active: np.ndarray, experts: Sequence[int], sampling: Samplings) -> DecodePass:
        """What `decode` does, to be run span by span."""
        return DecodePass(self, active, experts, sampling)

    def copy_row(self, state: State, source: int, target: int, length: int) -> State:
        """The first `length` tokens of row `source` copied to `target`. Uses `state` up.

        With a length of S (or past the row's position) the whole row moves, its last token and route included, as
        known to the device.
        """
        return self.program("copy")(state, np.int32(source), np.int32(target), np.int32(length))

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Compile every program, on a GPU side by side; returns how many there are. `progress(done, total)` is called
        after each; what it raises, or an interrupt, ends it after those that are being compiled."""
        keys = self._all()
        pool = ThreadPoolExecutor(1 if self.platform == "cpu" else COMPILED_AT_ONCE)
        try:
            compiling = [pool.submit(self.program, *key) for key in keys]
            for done, each in enumerate(as_completed(compiling), start=1):
                each.result()
                if progress is not None:
                    progress(done, len(keys))
        finally:
            pool.shutdown(cancel_futures=True)
        return len(keys)

    def kept(self, array: np.ndarray | jax.Array) -> jax.Array:
        """A small host array on the device: the same one again where the last steps had an equal one, because a copy
        costs a GPU more than a layer."""
        key = (array.shape, array.dtype.str, array.tobytes())
        if key not in self._small:
            if len(self._small) >= KEPT:
                self._small.pop(next(iter(self._small)))
            self._small[key] = jax.device_put(array, self._whole)
        return self._small[key]

    def blank(self, *shape: int) -> jax.Array:
        """Zeros on the device: what comes before the first layer."""
        if shape not in self._blank:
            self._blank[shape] = jax.device_put(np.zeros(shape, self.shape.runtime.dtype), self._whole)
        return self._blank[shape]

    # --- shapes ---------------------------------------------------------------------------------------------------

    def present(self, experts: Sequence[int], places: int = 0) -> np.ndarray:
        """The experts of a call, padded as their arrays are; with `places`, by -1 to so many."""
        given = np.asarray(self.store.padded(experts), np.int32)
        return np.concatenate([given, np.full(max(places - len(given), 0), -1, np.int32)])

    def decode_rows(self, rows: int, present: int) -> int:
        """The smallest compiled decode call of at least `rows` rows with that many experts present."""
        for size, experts in self._decode_shapes():
            if size >= rows and experts == present:
                return size
        raise ConfigError(f"{rows} rows: the cache has {self.limits.rows}")

    def _decode_shapes(self) -> tuple[tuple[int, int], ...]:
        store = self.store
        held = None if store.resident else store.slots + store.staging
        return decode_shapes(self.limits, store.num_experts, self.shape.top_k, store.ways, held)

    def _present_sizes(self) -> list[int]:
        return sorted({present for _, present in self._decode_shapes()})

    def _all(self) -> list[tuple[Any, ...]]:
        shapes, longest = self._decode_shapes(), self.limits.chunks[-1]
        keys: list[tuple[Any, ...]] = [] if self.by_span else [("decode", *each) for each in shapes]
        if not self.store.resident:
            keys += [("decode_span", *each) for each in shapes]
            keys += [("decode_end", rows) for rows in sorted({rows for rows, _ in shapes})]
        chunks = self.limits.chunks
        keys += [("prefill_span", chunk, present, longest) for chunk in chunks for present in self._present_sizes()]
        keys.append(("prefill_end", longest))
        if self.shape.router is not None:
            keys += [(name, size) for size in self.limits.prompts for name in ("route", "insert")]
        return [*keys, ("copy",)]

    # --- compiling ------------------------------------------------------------------------------------------------

    def program(self, name: str, *sizes: int) -> Callable[..., Any]:
        key = (name, *sizes)
        if key not in self._programs:
            function, arguments, donated, results = getattr(self, f"_{name}_program")(*sizes)
            if self.mesh.size > 1:
                function = self._on_all(function, arguments, results)
            with jax.set_mesh(self.mesh):
                lowered = jax.jit(function, donate_argnums=donated).lower(*arguments)
                self._programs[key] = lowered.compile(GPU_OPTIONS if self.platform == "gpu" else None)
        return self._programs[key]

    def _on_all(self, function: Callable[..., Any], arguments: Any, results: Any) -> Callable[..., Any]:
        """A function of one device's parts on all devices, each argument cut as its abstract array says."""
        specs = jax.tree.map(lambda x: x.sharding.spec, arguments)
        return jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=results, check_vma=False)

    def _abstract(self, tree: Any) -> Any:
        """Arrays, or what stands for them, as arguments; those that lie nowhere yet are whole on every device."""

        def one(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or self._whole)

        return jax.tree.map(one, tree)

    def _empty_state(self) -> State:
        s, limits = self.shape, self.limits
        ends = limits.stretches
        if s.runtime.decode == "kernel":
            ends = (-(-limits.length // BLOCK) * BLOCK,)
        return empty_state(s.config, s.router, s.top_k, limits.rows, ends, s.runtime.dtype)

    @property
    def _state_spec(self) -> State:
        """How a state is cut: caches by kv head."""
        whole = PartitionSpec()
        return State(PartitionSpec(None, self.spread.heads or None), whole, whole, whole, whole, whole)  # type: ignore[arg-type]

    @property
    def _cache_spec(self) -> Any:
        return self._state_spec.layers

    @property
    def _rest_spec(self) -> State:
        return replace(self._state_spec, layers=())

    def abstract_state(self) -> State:
        """Shapes of a state, and how it lies on the devices."""

        def cut(spec: PartitionSpec, part: Any) -> Any:
            sharding = NamedSharding(self.mesh, spec)
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part)

        return jax.tree.map(cut, self._state_spec, jax.eval_shape(self._empty_state))

    def _span(self, present: int) -> tuple[Any, Any, Any]:
        """Weights, experts and caches of a span's layers."""
        layers = self.store.spans[0]
        experts = [[self.store.like] * present for _ in range(layers.stop)]
        return self.weights.span(layers), experts, self.abstract_state().layers[layers]

    def _present_shape(self, present: int) -> np.ndarray:
        return np.zeros(present * self.store.ways, np.int32)

    def _decode_program(self, rows: int, present: int) -> Program:
        arguments = (
            self.weights,
            [[self.store.like] * present for _ in range(self.config.num_layers)],
            self.abstract_state(),
            np.zeros(rows, bool),
            self._present_shape(present),
            Samplings.greedy(rows),
        )
        return partial(decoding.decode_step, self._own), self._abstract(arguments), (2,), (self._state_spec, WHOLE)

    def _decode_span_program(self, rows: int, present: int) -> Program:
        rest = replace(self.abstract_state(), layers=(), router=None)
        x = self.blank(self.config.embed_dim, rows)
        small = (np.zeros(rows, bool), self._present_shape(present), np.bool_(0), x)
        arguments = self._abstract((*self._span(present), rest, *small))
        return partial(decoding.decode_span, self._own), arguments, (2,), (self._cache_spec, WHOLE, WHOLE)

    def _decode_end_program(self, rows: int) -> Program:
        x, present = self.blank(self.config.embed_dim, rows), np.zeros(self.store.num_experts, np.int32)
        rest = replace(self.abstract_state(), layers=())
        arguments = (self.weights.end, rest, np.zeros(rows, bool), present, x, Samplings.greedy(rows))
        return partial(decoding.decode_end, self._own), self._abstract(arguments), (1,), (self._rest_spec, WHOLE)

    def _prefill_span_program(self, size: int, present: int, longest: int) -> Program:
        x = self.blank(longest, self.config.embed_dim)
        small = (self._chunk(size, longest), self._present_shape(present), np.bool_(0), x)
        arguments = self._abstract((*self._span(present), *small))
        return partial(prefilling.prefill_span, self._own), arguments, (2,), (self._cache_spec, WHOLE, WHOLE)

    def _prefill_end_program(self, longest: int) -> Program:
        chunk = self._chunk(0, longest)._replace(tokens=None, experts=None, weights=None)
        x, rest = self.blank(longest, self.config.embed_dim), replace(self.abstract_state(), layers=())
        arguments = self._abstract((self.weights.end, rest, chunk, Samplings.greedy(1), x))
        return partial(prefilling.prefill_end, self._own), arguments, (1,), (self._rest_spec, WHOLE, WHOLE)

    def _chunk(self, size: int, longest: int) -> Chunk:
        zero, tokens = np.int32(0), np.zeros(size, np.int32)
        routes = np.zeros((size, self.shape.top_k), np.int32)
        targets = np.zeros(longest, np.int32)
        return Chunk(zero, zero, zero, tokens, routes, routes.astype(np.float32), targets, np.bool_(0), np.bool_(0))

    def _route_program(self, size: int) -> Program:
        arguments = (self.weights.router, np.zeros(size, np.int32), np.int32(0))
        return partial(prefilling.route_prompt, self._own), self._abstract(arguments), (), WHOLE

    def _insert_program(self, size: int) -> Program:
        r = self.shape.router
        assert r is not None
        keys = jax.ShapeDtypeStruct((1, r.num_heads, r.head_dim, size), jnp.float32)
        values = jax.ShapeDtypeStruct((1, r.num_heads, size, r.head_dim), jnp.float32)
        arguments = (self.abstract_state().router, np.int32(0), keys, values)
        return insert_routed, self._abstract(arguments), (0,), WHOLE

    def _copy_program(self) -> Program:
        zero = np.int32(0)
        return copy_rows, self._abstract((self.abstract_state(), zero, zero, zero)), (0,), self._state_spec

    def _place(self, model: Dense | Mixture, store: ExpertStore) -> Weights:
        """The model's weights but for its experts on the device, in the runtime's number format (router: float32)."""
        p, dtype, spread = model.params, self.shape.runtime.dtype, self.spread
        every, heads = spread.every, spread.heads
        cuts: dict[str, tuple[Axes, ...]] = {
            "attn_norm": (),
            "ffn_norm": (),
            "o": ((), heads),
            **dict.fromkeys(LEFT, (heads,)),
        }

        def block(layer: Mapping[str, Any]) -> dict[str, jax.Array]:
            weights = {n: spread.put(layer[n], dtype, *cut) for n, cut in cuts.items()}
            if self.shape.runtime.decode == "kernel":  # which reads all three from one matmul
                weights["qkv"] = spread.fuse([weights.pop(n) for n in LEFT], heads)
            return weights

        embed = spread.put(p["embed"], dtype, every)
        head = embed if "lm_head" not in p else spread.put(head_weight(p), dtype, every)
        layers = tuple(block(p[f"layers_{i}"]) for i in range(model.config.num_layers))
        router = model.router if isinstance(model, Mixture) else None
        router = None if router is None else jax.tree.map(lambda w: spread.put(w, jnp.float32), dict(router))
        return Weights(embed, head, spread.put(p["final_norm"], dtype), layers, tuple(store.permanent), router)


def _padded(values: Any, size: int, fill: float, dtype: Any) -> np.ndarray:
    values = np.asarray(values, dtype)
    out = np.full((size, *values.shape[1:]), fill, dtype)
    out[: len(values)] = values
    return out
