"""The engine part of replay.py: a trace's arrivals and real prompts through a real engine in process.

Time is scaled: the trace is stretched to a share of the rate that decode-first with everything resident serves of a
full queue here. Prompts and answers are cut so that a run takes seconds. After each run the simulation is fed the
engine's log and must make every decision again. Figure 6 is decode-first on a full queue, at capacity 2 to 5: a load
begins when its call could, or is decided on when its step is picked, also of steps dispatched before the last one is
read. A model of five experts has all of them resident at 5: nothing is loaded there.
"""

from __future__ import annotations

import gzip
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import matplotlib.pyplot as plt
import numpy as np
from _replay import SHARED, STAGING, trace

from readme_jax import config
from readme_jax.checkpoints.mixture import Mixture, load_mixture
from readme_jax.parallel.mesh import make_mesh
from readme_jax.serving.buckets import Limits
from readme_jax.serving.build import limits_of, measure, residency_of, slots_of
from readme_jax.serving.calls import Caller
from readme_jax.serving.cost import DEVICES, SHAPES, CostModel, Costs
from readme_jax.serving.engine import Engine
from readme_jax.serving.expert_cache import ExpertCache
from readme_jax.serving.loop import Logged
from readme_jax.serving.programs import Programs
from readme_jax.serving.request import Event, Request, SamplingParams, complete
from readme_jax.serving.scheduler import Policy, make_scheduler
from readme_jax.serving.simulate import Setup, simulate
from readme_jax.serving.store import ExpertStore
from readme_jax.serving.traffic import Request as Simulated

ROWS, LENGTH, CHUNK, BUDGET = 8, 256, 64, 64
LONGEST_PROMPT, LONGEST_ANSWER = 160, 32
LOAD = 0.7
# Of Figure 6: Serving.prefetch and Serving.ahead.
MODES = {"on demand": (False, False), "prefetch": (True, False), "prefetch, dispatched ahead": (True, True)}
SHOWN = (
    "scheduler", "capacity", "unique_experts", "mean", "p95", "p99_ttft", "seconds", "hit_ratio", "loads", "late",
    "missing", "agrees",
)  # fmt: skip
SCHEDULERS: tuple[Policy, ...] = ("decode_first", "prefill_first", "algorithm1", "lookahead")


@dataclass
class Ask:
    """A request of the replay."""

    arrival: float  # seconds after the first
    tokens: list[int]
    output: int


class Serves(Protocol):
    """What a run takes its engine from."""

    def engine(self, settings: config.Serving, log: list[Logged]) -> Engine: ...


class Server:
    """Programs compiled once; an engine of its own store for each run."""

    def __init__(self, model: Mixture) -> None:
        self.model = model
        settings = config.Serving(rows=ROWS, length=LENGTH, chunk=CHUNK)
        limits = Limits(ROWS, limits_of(model, settings).length, chunks=(CHUNK,), decode=(ROWS,))
        self.programs = Programs(model, ExpertStore(model), limits)
        self.programs.warm_up()
        caller = Caller(self.programs, residency_of(self.programs.store, settings))
        self.costs = measure(caller)

    def engine(self, settings: config.Serving, log: list[Logged]) -> Engine:
        """An engine over the compiled programs."""
        store = ExpertStore(self.model, slots_of(self.model, settings, np.float32), settings.staging)
        self.programs.store = store
        self.programs.warm_up()
        residency = residency_of(store, settings)
        costs = Costs(self.costs.fixed, self.costs.token, self.costs.expert, residency.load_seconds or 0.0)
        scheduler = make_scheduler(settings.scheduler, settings.budget, costs, store.num_experts)
        caller = Caller(self.programs, residency)
        return Engine(caller, scheduler, settings, self.model.config.vocab_size, None, step_log=log.append)


def engine_rows(checkpoint: str, count: int, seed: int) -> tuple[list[dict], list[dict], dict[str, Any]]:
    """Rows of replay_engine.json: schedulers with everything resident and with 3 slots; Figure 6; what was served."""
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        model = load_mixture(Path(checkpoint))
    server, experts = Server(model), model.mixture.num_experts
    asks = make_asks(model, count, seed)
    full = run(server, asks, settings_of("decode_first", 0), 0.0)
    rate = LOAD * count / full["seconds"]
    stretch = count / rate / max(asks[-1].arrival, 1e-9)
    rows = []
    for slots in (0, 3):
        for scheduler in SCHEDULERS:
            found = run(server, asks, settings_of(scheduler, slots), stretch)
            about = {"trace": "conv", "load": LOAD, "rate": rate, "scheduler": scheduler, "router": "own"}
            held = {"resident": "slots" if slots else "all", "capacity": slots or experts, "budget": BUDGET}
            rows.append({**about, **held, **found})
    fig6 = [figure6_row(server, asks, c, *mode) for c in range(2, min(experts, 5) + 1) for mode in MODES.values()]
    about = {"model": {"experts": experts, "layers": model.config.num_layers, "width": model.config.embed_dim}}
    return rows, fig6, {**about, "requests": count, "rows_of_cache": ROWS, "staging": STAGING}


def figure6_row(server: Server, asks: list[Ask], capacity: int, prefetch: bool, ahead: bool) -> dict[str, Any]:
    """The faster of two runs on a full queue; `agrees` says it of both."""
    runs = [run(server, asks, settings_of("decode_first", capacity, prefetch, ahead), 0.0) for _ in range(2)]
    best = min(runs, key=lambda found: found["mean"]) | {"agrees": all(found["agrees"] for found in runs)}
    names = ("mean", "p95", "seconds", "hit_ratio", "loads", "foreseen", "late", "missing", "agrees")
    resident = "all" if capacity == server.model.mixture.num_experts else "slots"
    about = {"capacity": capacity, "resident": resident, "prefetch": prefetch, "ahead": ahead}
    return {**about, **{n: best[n] for n in names}}


def plot(fig6: list[dict[str, Any]], path: Path) -> None:
    """Seconds a token against capacity in each mode."""
    figure, axis = plt.subplots(figsize=(4.4, 3.4))
    for (label, mode), colour in zip(MODES.items(), ("#b45309", "#0f766e", "#0f172a"), strict=True):
        rows = [r for r in fig6 if (r["prefetch"], r["ahead"]) == mode]
        axis.plot([r["capacity"] for r in rows], [r["mean"] for r in rows], "o-", color=colour, label=label)
    axis.set_xticks(sorted({r["capacity"] for r in fig6}))
    axis.set_xlabel("experts resident")
    axis.set_ylabel("seconds a token, mean")
    axis.set_ylim(0, 1.1 * max(r["mean"] for r in fig6))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def settings_of(scheduler: Policy, slots: int, prefetch: bool = True, ahead: bool = True) -> config.Serving:
    """Of one run."""
    sizes: dict[str, Any] = {"rows": ROWS, "length": LENGTH, "chunk": CHUNK, "budget": BUDGET, "queue": 10_000}
    return config.Serving(
        **sizes, scheduler=scheduler, slots=slots, staging=STAGING if slots else 0, prefetch=prefetch, ahead=ahead
    )


def make_asks(model: Mixture, count: int, seed: int) -> list[Ask]:
    """Arrivals and lengths of the conversation trace, in which real prompts repeat until they are long enough."""
    rng = np.random.default_rng(seed)
    with gzip.open(SHARED / "prompts" / "prompts.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["prompt"] for line in lines]
    rows = trace("conv")
    first = int(rng.integers(len(rows) - count))
    asks = []
    assert model.tokenizer is not None
    for row in rows[first : first + count]:
        tokens: list[int] = []
        wanted = min(row.prompt, LONGEST_PROMPT)
        while len(tokens) < wanted:
            tokens += model.tokenizer.encode(texts[int(rng.integers(len(texts)))])
        output = min(max(row.output, 2), LONGEST_ANSWER)
        asks.append(Ask(row.arrival - rows[first].arrival, tokens[:wanted], output))
    return asks


def run(server: Serves, asks: list[Ask], settings: config.Serving, stretch: float) -> dict[str, Any]:
    """Serve all requests; `stretch` their arrivals. Figures as in batching.json, and whether the simulation agrees.

    Raises SystemExit with the reason at the first request that fails.
    """
    log: list[Logged] = []
    engine = server.engine(settings, log)
    handles: list[Any] = []
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    arrived: dict[int, float] = {}

    events: list[list[Event]] = [[] for _ in asks]

    def listen(number: int) -> Any:
        def heard(event: Event) -> None:
            if event.finish_reason == "error":  # the engine lets it through, as it would not an Exception
                raise SystemExit(f"request {number} of {len(asks)} failed: {sys.exception() or event.error}")
            now = time.monotonic()
            first.setdefault(number, now)
            last[number] = now
            events[number].append(event)

        return heard

    began = time.monotonic()
    while len(handles) < len(asks) or engine._loop.busy:
        now = time.monotonic() - began
        while len(handles) < len(asks) and asks[len(handles)].arrival * stretch <= now:
            ask, number = asks[len(handles)], len(handles)
            params = SamplingParams(max_tokens=ask.output, temperature=0.0, ignore_eos=True)
            handles.append(engine.submit(Request(ask.tokens, params), listen(number)))
            arrived[number] = engine._inbox[-1].arrival
        if not engine.step():
            time.sleep(0.001)
    seconds = time.monotonic() - began
    stats = engine.stats()
    latency = np.array([(last[i] - arrived[i]) / ask.output for i, ask in enumerate(asks)])
    waits = np.array([first[i] - arrived[i] for i in range(len(asks))])
    masks, agrees = agreement(engine, asks, handles, arrived, events, log)
    return {
        "unique_experts": float(np.mean([m.bit_count() for m in masks])),
        "mean": float(latency.mean()),
        "p95": float(np.percentile(latency, 95)),
        "p99_ttft": float(np.percentile(waits, 99)),
        "seconds": seconds,
        "steps": len(masks),
        "hit_ratio": 1.0 if engine._caller.residency.cache is None else stats.hits / (stats.hits + stats.misses),
        "loads": stats.loads,
        "foreseen": stats.foreseen,
        "late": stats.late,
        "missing": stats.missing,
        "agrees": agrees,
    }


def agreement(
    engine: Engine,
    asks: list[Ask],
    handles: list[Any],
    arrived: dict[int, float],
    events: list[list[Event]],
    log: list[Logged],
) -> tuple[list[int], bool]:
    """The experts of each batch, and whether the simulation, fed the log, makes every decision again."""
    simulated = []
    for number, (ask, handle) in enumerate(zip(asks, handles, strict=True)):
        done = complete(events[number])
        routes = (*engine.route(ask.tokens).experts, *done.experts)
        tokens = (*ask.tokens, *done.tokens)
        simulated.append(Simulated(handle.id, arrived[number], len(ask.tokens), ask.output, routes, 0, tokens))
    loop, residency, settings = engine._loop, engine._caller.residency, engine.settings
    limits, store = engine._caller.limits, residency.store
    setup = Setup(
        limits.rows, swaps=residency.swaps, ahead=settings.ahead, chunk=limits.chunks[-1], page_size=loop.pages.size,
        pages=loop.pages.total, buckets=limits.decode, load_seconds=residency.load_seconds,
    )  # fmt: skip
    cache = ExpertCache(store.num_experts, 0 if store.resident else store.slots, store.staging, settings.policy)
    model = CostModel(SHAPES["llama2_7b"], DEVICES["a100"])  # not asked for seconds: they are the log's
    outcome = simulate(simulated, loop.scheduler, cache, model, setup, log)
    made = [(step.chunks, step.preempted) for step in outcome.log]
    return outcome.masks, made == [(step.chunks, step.preempted) for step in log]
