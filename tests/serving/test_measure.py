"""What steps cost, as an engine measures it when it starts: from known times to `Costs`, and what is left behind."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from readme_jax import config
from readme_jax.serving import build
from readme_jax.serving.build import build_engine, measure, residency_of
from readme_jax.serving.calls import Caller
from readme_jax.serving.engine import Engine
from readme_jax.serving.sampling import Samplings

pytestmark = pytest.mark.usefixtures("quickly_compiled")
ROWS, LENGTH, CHUNK = 6, 24, 8
COMPILING, WAITING, FIXED, EXPERT, TOKEN = 100.0, 0.5, 4.0, 1.25, 0.5


def caller_of(model: Any, **chosen: Any) -> Caller:
    settings = config.Serving(rows=ROWS, length=LENGTH, page_size=4, chunk=CHUNK, budget=CHUNK, **chosen)
    engine = build_engine(Engine, model, replace(settings, scheduler="decode_first"))
    return Caller(engine._caller.programs, residency_of(engine._caller.residency.store, settings))


class Simulated:
    """Stands in for a device: calls take known seconds one after another, the host waits, and the first call of each
    kind compiles. Remembers how many experts its decode calls were given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, caller: Caller) -> None:
        self.now, self.caller, self.compiled, self.given = 0.0, caller, set[Any](), set[int]()
        self.ready = jax.block_until_ready
        monkeypatch.setattr(build, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(caller.programs, "decode", self.decode)
        monkeypatch.setattr(caller.programs, "prefill", self.prefill)
        monkeypatch.setattr(jax, "block_until_ready", self.wait)

    def wait(self, tree: Any) -> Any:
        self.now += WAITING
        return self.ready(tree)

    def run(self, key: Any, seconds: float) -> None:
        self.now += seconds + (0 if key in self.compiled else COMPILING)
        self.compiled.add(key)

    def decode(self, state: Any, active: np.ndarray, experts: Any, weights: Any, sampling: Samplings) -> Any:
        assert active.tolist() == [True] * ROWS and len(sampling.seed) == ROWS
        assert weights == self.caller.residency.store.present(experts)
        named = np.asarray(state.experts)
        assert set(named.flat) == set(experts) and all(len(set(row)) == len(row) for row in named.tolist())
        self.given.add(len(experts))
        self.run(len(experts), FIXED + EXPERT * len(experts))
        return replace(state, experts=state.experts * 0), None

    def prefill(self, state: Any, row: int, tokens: np.ndarray, *_: Any, **__: Any) -> Any:
        self.run("prefill", FIXED + TOKEN * len(tokens))
        return state, None, None


@pytest.mark.parametrize("kind, slots, given", [("top1", 0, {1, 6}), ("top2", 0, {2, 7}), ("top1", 3, {1, 3})])
def test_an_experts_part_is_what_one_more_takes(tiny_model, monkeypatch, kind, slots, given):
    """A wait's share is all that the host adds to the fixed part."""
    caller = caller_of(tiny_model(kind, experts=7), slots=slots, staging=1)  # of which six rows of one can name six
    device = Simulated(monkeypatch, caller)
    costs = measure(caller)
    assert device.given == given
    assert costs.expert == pytest.approx(EXPERT)
    assert FIXED <= costs.fixed <= FIXED + WAITING / 4
    assert costs.token == pytest.approx((FIXED + TOKEN * CHUNK + WAITING - costs.fixed) / CHUNK)
    assert costs.load == (caller.residency.load_seconds or 0.0) and (costs.load > 0) is (slots > 0)


def test_what_a_load_takes_is_known_without_prefetching_too(tiny_model):
    caller = caller_of(tiny_model("top1"), slots=2, staging=1, prefetch=False)
    assert measure(caller, repeats=1).load > 0 and not caller.residency.swaps


@pytest.mark.parametrize("kind, slots, each", [("top1", 1, 1), ("top2", 2, 2), ("dense", 0, 1)])
def test_where_one_number_of_experts_is_possible_they_are_half_of_a_step(tiny_model, monkeypatch, kind, slots, each):
    caller = caller_of(tiny_model(kind), slots=slots)
    device = Simulated(monkeypatch, caller)
    costs = measure(caller)
    assert len(device.given) == 1
    assert costs.fixed == pytest.approx(costs.expert * each)
    assert costs.fixed + costs.expert * each == pytest.approx(FIXED + EXPERT * max(device.given), abs=WAITING / 4)


def test_parts_stay_above_zero_where_the_clock_lies(tiny_model, monkeypatch):
    caller = caller_of(tiny_model("top1"))
    device, clock = Simulated(monkeypatch, caller), iter(range(1000))
    monkeypatch.setattr(device, "run", lambda key, seconds: setattr(device, "now", device.now + 1 / (1 + next(clock))))
    costs = measure(caller)
    assert min(costs.fixed, costs.token, costs.expert) > 0


@pytest.mark.parametrize("kind, slots", [("dense", 0), ("top1", 0), ("top2", 2)])
def test_measuring_needs_no_program_of_its_own_and_leaves_nothing(tiny_model, kind, slots):
    caller = caller_of(tiny_model(kind), slots=slots)
    store, programs = caller.residency.store, caller.programs
    loads = store.loads
    costs = measure(caller, repeats=1)
    assert min(costs.fixed, costs.token, costs.expert) > 0
    assert programs.compilations > 0 and set(programs._programs) <= set(programs._all())
    for found, empty in zip(jax.tree.leaves(caller.state), jax.tree.leaves(programs.new_state()), strict=True):
        assert np.array_equal(found, empty)
    assert store.loads == loads and store.on_device() == caller.residency.held
