"""The simulation against the real engine: fed its step times, it makes every decision again.

Requests arrive while steps run, end at their limit or a stop token, are cancelled and preempted, and share prefixes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from alone import engine_over
from fake_programs import COSTS, FakeModel, fake_engine
from pairwise import pairwise

from readme_jax import config
from readme_jax.serving.buckets import Limits
from readme_jax.serving.cost import CostModel, Device, Shape
from readme_jax.serving.engine import Engine
from readme_jax.serving.expert_cache import ExpertCache
from readme_jax.serving.loop import Logged
from readme_jax.serving.programs import Programs
from readme_jax.serving.request import Request, SamplingParams
from readme_jax.serving.scheduler import make_scheduler
from readme_jax.serving.simulate import Outcome, Setup, replay_decisions, simulate
from readme_jax.serving.store import ExpertStore
from readme_jax.serving.traffic import Request as Simulated

pytestmark = pytest.mark.usefixtures("quickly_compiled")
EXPERTS, ROWS, LENGTH = 7, 4, 48
MODEL = CostModel(Shape(64, 4, 4, 4, 16, 256, 100, EXPERTS, width=0.5, permanent=0.125), Device(1e9, 1e8, 2e7, 1e-4))
FACTORS = {
    "scheduler": ["decode_first", "prefill_first", "algorithm1", "lookahead"],
    "slots": [0, 2, 3, 5],
    "staging": [0, 1, 2],
    "policy": ["belady", "lru", "random"],
    "prefetch": [True, False],  # with it and staging, residents are swapped in the background
    "ahead": [True, False],
    "chunk": [4, 16],
    "page_size": [1, 4],
    "budget": [6, 40],
    "scarce": [True, False],  # so few pages that sequences are preempted
}


class Traffic:
    """Requests put to an engine while it runs, and how they went."""

    def __init__(self, engine: Engine, vocab: int, seed: int, count: int = 24) -> None:
        self.engine, rng = engine, random.Random(seed)
        self.prompts: list[list[int]] = []
        self.params: list[SamplingParams] = []
        self.arrivals: list[float] = []
        self.handles: list[Any] = []
        start = [rng.randrange(vocab) for _ in range(9)]
        for number in range(count):
            prompt = [rng.randrange(vocab) for _ in range(rng.randrange(1, 24))]
            prompt = [*start, *prompt[:8]] if number % 3 == 0 else prompt
            stops = [rng.randrange(vocab) for _ in range(vocab // 12)] if number % 2 else []
            params = SamplingParams(
                max_tokens=rng.randrange(1, 14), stop_ids=stops, temperature=1.0, seed=number, ignore_eos=True
            )
            self.handles.append(engine.submit(Request(prompt, params)))
            self.arrivals.append(engine._inbox[-1].arrival)
            self.prompts.append(prompt)
            self.params.append(params)
            if rng.random() < 0.15:
                rng.choice(self.handles).cancel()
            for _ in range(rng.randrange(4)):
                engine.step()
        while engine.step():
            pass

    def simulated(self) -> list[Simulated]:
        """The same requests for a simulation: what each of them got is known by now."""
        asked = []
        for prompt, params, arrival, handle in zip(self.prompts, self.params, self.arrivals, self.handles, strict=True):
            done = handle.result()
            tokens, experts = [*prompt, *done.tokens], [*self.engine.route(prompt).experts, *done.experts]
            output, limit = done.usage.completion_tokens, params.max_tokens
            if done.finish_reason == "stop":  # the token itself is not shown, and its experts are never used
                assert output == len(done.tokens) + 1
                tokens, experts = [*tokens, -1], [*experts, experts[-1]]
            elif done.finish_reason == "cancelled":  # what it would have got is not known, nor needed
                tokens += [0] * (limit - output)
                experts += [experts[-1]] * (limit - output)
                output = limit
            else:
                assert output == limit
            asked.append(Simulated(handle.id, arrival, len(prompt), output, tuple(experts), limit, tuple(tokens)))
        return asked


def simulated(engine: Engine, asked: list[Simulated], log: list[Logged]) -> tuple[Outcome, ExpertCache]:
    """What a simulation set up like the engine makes of its log."""
    serving, loop, residency = engine.settings, engine._loop, engine._caller.residency
    limits, store = engine._caller.limits, residency.store
    setup = Setup(
        rows=serving.rows,
        swaps=residency.swaps,
        ahead=serving.ahead,
        chunk=limits.chunks[-1],
        page_size=loop.pages.size,
        pages=loop.pages.total,
        buckets=limits.decode,
        top_k=engine._caller.programs.shape.top_k,
        load_seconds=residency.load_seconds,
    )
    slots = 0 if store.resident else store.slots
    cache = ExpertCache(store.num_experts, slots, store.staging, serving.policy)
    scheduler = make_scheduler(serving.scheduler, serving.budget, COSTS, store.num_experts)
    return simulate(asked, scheduler, cache, MODEL, setup, log), cache


def check(engine: Engine, traffic: Traffic, log: list[Logged]) -> Outcome:
    """Every decision is made again: batches, preemptions, rows that ran again, residents, swaps."""
    outcome, cache = simulated(engine, traffic.simulated(), log)
    assert [(s.chunks, s.preempted) for s in outcome.log] == [(s.chunks, s.preempted) for s in log]
    stats = engine.stats()
    assert (outcome.missing, outcome.preemptions, outcome.swaps) == (stats.missing, stats.preemptions, stats.swaps)
    if not engine._caller.residency.store.resident:
        assert (cache.hits, cache.misses) == (stats.hits, stats.misses)
        assert cache.resident == engine._caller.residency.resident
    return outcome


def settings_of(chosen: dict[str, Any], top_k: int = 1) -> config.Serving:
    chosen = dict(chosen)
    scarce = chosen.pop("scarce")
    if top_k == 2 and 0 < chosen["slots"] + chosen["staging"] < 2:
        chosen["slots"] = 2
    pages = -(-LENGTH // chosen["page_size"]) if scarce else 0
    return config.Serving(rows=ROWS, length=LENGTH, queue=1000, pages=pages, **chosen)


@pytest.fixture(scope="module")
def real_engine(tiny_model) -> Callable[..., Engine]:
    """Engines of real programs, compiled once for all of them, over a tiny mixture of seven experts."""
    compiled: dict[str, Any] = {}

    def make(kind: str, serving: config.Serving, **options: Any) -> Engine:
        if kind not in compiled:
            model = tiny_model(kind, None, EXPERTS)
            limits = Limits(ROWS, LENGTH, chunks=(4, 16), decode=(ROWS,))
            compiled[kind] = (Programs(model, ExpertStore(model), limits), model)
        return engine_over(*compiled[kind], serving, **options)

    return make


@pytest.mark.parametrize(("kind", "cases"), [("top1", None), ("top2", 8)])
def test_the_real_engines_decisions_are_made_again(real_engine, kind, cases) -> None:
    seen: dict[str, int] = {"missing": 0, "preemptions": 0, "swaps": 0, "shared": 0, "cancelled": 0}
    for number, chosen in enumerate(pairwise(FACTORS)[:cases]):
        serving, log = settings_of(chosen, 2 if kind == "top2" else 1), []
        engine = real_engine(kind, serving, step_log=log.append)
        if engine._caller.residency.load_seconds is not None:
            engine._caller.residency.load_seconds = 1e-3  # of the clock that it is run by
        outcome = check(engine, Traffic(engine, engine.vocab_size, number), log)
        for name in ("missing", "preemptions", "swaps"):
            seen[name] += getattr(outcome, name)
        seen["shared"] += engine.stats().shared_tokens
        seen["cancelled"] += sum(len(step.cancelled) for step in log)
    assert all(seen.values()), seen  # what can make decisions differ did happen


def test_decisions_of_a_wild_router_are_made_again() -> None:
    """A model whose route changes with every other token: rows of steps dispatched ahead are often run again."""
    missing = 0
    for number, chosen in enumerate(pairwise(FACTORS)):
        log: list[Logged] = []
        model = FakeModel(experts=EXPERTS, switch=2)
        engine = fake_engine(settings_of(chosen), model, load_seconds=0.01, step_log=log.append)
        missing += check(engine, Traffic(engine, model.vocab, number), log).missing
    assert missing > 100


def test_another_order_of_events_is_noticed(real_engine) -> None:
    """The comparison can fail: a simulation that reads each step before the next one decides otherwise."""
    log: list[Logged] = []
    serving = config.Serving(rows=ROWS, length=LENGTH, budget=6, chunk=16, slots=3, page_size=4)
    engine = real_engine("top1", serving, step_log=log.append)
    asked = Traffic(engine, engine.vocab_size, 0).simulated()
    scheduler = make_scheduler("lookahead", 6, COSTS, EXPERTS)
    setup = Setup(rows=ROWS, swaps=False, ahead=False, chunk=16, page_size=4, pages=48)
    made = replay_decisions(asked, log, scheduler, ExpertCache(EXPERTS, 3), MODEL, setup)
    assert made != [step.chunks for step in log if step.chunks]
