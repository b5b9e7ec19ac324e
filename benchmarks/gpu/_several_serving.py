"""The serving part of several.py: decode steps and a prefill on one GPU and on all, in turns."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _measure import copy_bandwidth, matmul_rate
from _model import EXPERTS, THREADS, model_of, shape, with_limits

from readme_jax.config import Mesh, Model, ModelConfig
from readme_jax.models.runtime import runtime_for
from readme_jax.models.sizes import forward_flops
from readme_jax.parallel.mesh import make_mesh
from readme_jax.plan import hlo, traffic
from readme_jax.serving.buckets import Limits
from readme_jax.serving.build import mesh_of
from readme_jax.serving.programs import Programs
from readme_jax.serving.sampling import Samplings
from readme_jax.serving.store import ExpertStore
from readme_jax.serving.traffic import load_streams

CONTEXT = 1 << 16  # most tokens of a batch's caches together
LONGEST, ROUNDS, STEPS = 1024, 3, 20
STREAMS = Path(__file__).parent.parent / "results" / "routes.npz"


@dataclass
class Case:
    """A call to measure: a decode step of `rows` rows at `position` of `length`, or a prompt of `length` tokens (`rows`
    1), all of one expert, or `mixed` as a tuned router sends real text (results/routes.npz)."""

    call: str
    rows: int
    mixed: bool
    length: int

    @property
    def position(self) -> int:
        return self.length * 7 // 8

    @property
    def limits(self) -> Limits:
        rows, length = self.rows, self.length
        chunk = length if self.call == "prefill" else min(64, length)
        return Limits(rows, length, chunks=(chunk,), decode=(rows,), prompts=(length,), stretches=(length,))

    @property
    def present(self) -> list[int]:
        return np.unique(self.routes()).tolist()

    @property
    def experts(self) -> int:
        """How many are present."""
        return len(self.present)

    @property
    def tokens(self) -> int:
        """Tokens that run in the call."""
        return self.length if self.call == "prefill" else self.rows

    def routes(self) -> np.ndarray:
        """[tokens, 1]: of places drawn from all domains' texts, or of a prompt put together of a text of each."""
        if not self.mixed:
            return np.zeros((self.tokens, 1), np.int32)
        texts = list(load_streams(STREAMS, "best").values())
        each = -(-self.tokens // len(texts))
        prompt = np.concatenate([text[:each] for text in texts])[: self.tokens]
        drawn = np.random.default_rng(0).choice(np.concatenate(texts), self.tokens)
        return (prompt if self.call == "prefill" else drawn).astype(np.int32)[:, None]


def cases(batches: list[int], prompt: int) -> list[Case]:
    """Decode steps of one expert and, where rows are many, mixed; a mixed prompt."""
    found = []
    for rows in sorted(batches):
        length = min(LONGEST, CONTEXT // rows)
        found += [Case("decode", rows, mixed, length) for mixed in ((False,) if rows < EXPERTS else (False, True))]
    return found + ([Case("prefill", 1, True, prompt)] if prompt else [])


class Arrangement:
    """The model on some devices, with programs for each case."""

    def __init__(self, model: Any, mesh: Mesh) -> None:
        runtime = runtime_for(Model(compute_dtype="bfloat16"))
        self.store = ExpertStore(model, dtype=jnp.bfloat16, mesh=mesh_of(mesh))
        self.base = Programs(model, self.store, Limits(1, 64), runtime)
        self.by_limits: dict[Limits, Programs] = {}

    def programs(self, case: Case) -> Programs:
        """Over the same weights."""
        if case.limits not in self.by_limits:
            self.by_limits[case.limits] = with_limits(self.base, case.limits)
        return self.by_limits[case.limits]

    def key(self, case: Case) -> tuple[Any, ...]:
        """Of the case's compiled call: all layers of a decode step, a span of a prefill's."""
        each = len(self.store.padded(case.present)) // self.store.ways
        if case.call == "decode":
            return "decode", case.rows, each
        return "prefill_span", case.tokens, each, case.tokens

    def compile(self, case: Case) -> None:
        self.programs(case).program(*self.key(case))
        if case.call == "prefill":
            self.programs(case).program("prefill_end", case.tokens)

    def moved(self, case: Case) -> float:
        """Bytes that a device receives a layer, embedding and head not counted."""
        program = hlo.parse(self.programs(case).program(*self.key(case)).as_text())  # type: ignore[attr-defined]
        found = traffic.collectives(program, self.base.mesh.size)
        inside = [c.bytes for c in found if "attention" in c.op_name or "feed_forward" in c.op_name]
        return sum(inside) / (self.base.config.num_layers if case.call == "decode" else self.store.span_layers)

    def seconds(self, case: Case) -> float:
        """Of one call, without compiling."""
        return (self._decode if case.call == "decode" else self._prefill)(case)

    def _decode(self, case: Case) -> float:
        programs, routes = self.programs(case), case.routes()
        weights, sampling = self.store.present(case.present), Samplings.greedy(case.rows)
        state, active = programs.new_state(), np.ones(case.rows, bool)
        experts, position = jax.device_put(
            (routes, np.full(case.rows, case.position, np.int32)), programs.spread.sharding()
        )

        def run(state: Any, steps: int) -> Any:
            for _ in range(steps):
                state = replace(state, experts=jnp.copy(experts), position=jnp.copy(position))
                state, _ = programs.decode(state, active, case.present, weights, sampling)
            return jax.block_until_ready(state)

        state = run(state, 3)
        began = time.perf_counter()
        run(state, STEPS)
        return (time.perf_counter() - began) / STEPS

    def _prefill(self, case: Case) -> float:
        programs, routes = self.programs(case), case.routes()
        prompt, ones = np.arange(case.length) % 500, np.ones(routes.shape, np.float32)
        weights, state = self.store.present(case.present), programs.new_state()
        times = []
        for _ in range(4):
            began = time.perf_counter()
            state, sampled, _ = programs.prefill(state, 0, prompt, 0, routes, ones, case.present, weights, last=True)
            jax.block_until_ready(sampled)
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])


def limit(config: ModelConfig, case: Case, bandwidth: float, rate: float) -> float:
    """Seconds on one device: of a decode step's bytes, of a prefill's FLOPs."""
    if case.call == "prefill":
        return case.tokens * forward_flops(config, config.ffn_dim // 2, case.length) / rate
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    width = config.ffn_dim // 2 * case.experts
    layer = config.embed_dim * (2 * heads + 2 * kv + 3 * width) + 2 * case.rows * case.position * kv
    return 2 * (config.num_layers * layer + config.vocab_size * config.embed_dim) / bandwidth


def all_to_all(config: ModelConfig, case: Case, devices: int) -> float:
    """Bytes that a device receives a layer where a layer-wise router sends tokens to their experts and back."""
    return 2 * case.tokens / devices * config.embed_dim * 2 * (devices - 1) / devices


def measure(args: argparse.Namespace, add: Callable[..., None]) -> None:
    """A row a case and arrangement, as soon as it is known."""
    config = shape(2 if args.tiny else args.layers, args.tiny)
    count = len(jax.devices())
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        bandwidth, rate = (1e10, 1e11) if args.tiny else (copy_bandwidth(), matmul_rate())
        model = model_of(config, EXPERTS)
    add(case="one device", bandwidth=bandwidth, matmul_rate=rate)
    meshes = {"one": Mesh(), "tensor": Mesh(tensor=count), "expert": Mesh(expert=count)}
    began = time.perf_counter()
    arranged = {name: Arrangement(model, mesh) for name, mesh in meshes.items()}
    add(case="placed", seconds=time.perf_counter() - began)
    wanted = cases(args.batch, args.prompt)
    began = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda pair: pair[0].compile(pair[1]), [(a, c) for c in wanted for a in arranged.values()]))
    add(case="compiled", programs=len(wanted) * len(arranged), seconds=time.perf_counter() - began)
    for case in wanted:
        times: dict[str, list[float]] = {name: [] for name in arranged}
        for _ in range(ROUNDS):
            for name, arrangement in arranged.items():
                times[name].append(arrangement.seconds(case))
        one, least = statistics.median(times["one"]), limit(config, case, bandwidth, rate)
        for name, arrangement in arranged.items():
            took, devices = statistics.median(times[name]), arrangement.base.mesh.size
            about = {"case": case.call, "mesh": f"{name} {devices}", "batch": case.rows, "length": case.length}
            figures = {"ms": 1e3 * took, "over_one": took / one, "over_limit": took * devices / least}
            bytes_ = {"moved": arrangement.moved(case), "all_to_all": all_to_all(config, case, devices)}
            add(**about, experts_present=case.experts, **figures, **bytes_)
