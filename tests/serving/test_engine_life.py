"""What an engine holds on the device: how much at most, in which memory, and that none of it is left in the end."""

from __future__ import annotations

import dataclasses
import gc
import random
from collections import Counter
from collections.abc import Callable
from string import printable
from typing import Any

import jax
import numpy as np
import pytest
from alone import assert_nothing_left, run_out
from fake_programs import COSTS, Ticks
from tiny_shape import TINY

from readme_jax import config
from readme_jax.errors import ConfigError
from readme_jax.serving import footprint as footprints
from readme_jax.serving.buckets import Limits
from readme_jax.serving.build import measure, residency_of
from readme_jax.serving.calls import Caller
from readme_jax.serving.engine import Engine
from readme_jax.serving.footprint import Metered, device_bytes, footprint
from readme_jax.serving.live import Live
from readme_jax.serving.passes import PrefillPass
from readme_jax.serving.programs import KEPT
from readme_jax.serving.request import Request, SamplingParams
from readme_jax.serving.scheduler import make_scheduler
from readme_jax.serving.state import State
from readme_jax.serving.store import ExpertStore

pytestmark = pytest.mark.usefixtures("quickly_compiled")
# Experts so large that one too many would show, in so many layers that a ring is less than one in each.
WIDE = dataclasses.replace(TINY, embed_dim=64, ffn_dim=1536, num_layers=6)
EXPERTS, ROWS, LENGTH, CHUNK = 7, 8, 64, 8


class Watched(Metered):
    """Programs that remember the memory kinds of their array arguments, the most bytes handed over from NumPy, and how
    many were alive on the device with each new state."""

    kinds: set[str | None]
    handed = 0
    begun: list[int]

    def new_state(self) -> State:
        state = super().new_state()
        self.begun.append(device_bytes() - self.before)
        return state

    def program(self, name: str, *sizes: int) -> Callable[..., Any]:
        program = super().program(name, *sizes)

        def call(*arguments: Any) -> Any:
            leaves = jax.tree.leaves(arguments)
            self.kinds |= {x.sharding.memory_kind for x in leaves if isinstance(x, jax.Array)}
            self.handed = max(self.handed, sum(x.nbytes for x in leaves if not isinstance(x, jax.Array)))
            return program(*arguments)

        return call


@pytest.fixture(scope="module")
def make_engine(tiny_model, tiny_tokenizer):
    """Engines that share compiled programs and nothing else, over a model whose arrays are on the host."""
    jax.config.update("jax_disable_most_optimizations", True)
    made = tiny_model("top1", tiny_tokenizer, EXPERTS, WIDE)
    params, router = (jax.tree.map(lambda x: np.array(x), tree) for tree in (made.params, made.router))
    model = dataclasses.replace(made, params=params, router=router)
    del made
    compiled: dict[Any, Any] = {}

    def make(**chosen: Any) -> Engine:
        gc.collect()
        before = device_bytes()
        settings = {"rows": ROWS, "length": LENGTH, "page_size": 4, "chunk": CHUNK, "queue": 100, "budget": 40}
        serving = config.Serving(**{**settings, **chosen})
        store = ExpertStore(model, serving.slots, serving.staging)
        programs = Watched(model, store, Limits(ROWS, LENGTH, chunks=(CHUNK,), decode=(ROWS,)))
        programs._programs, programs.before, programs.kinds, programs.begun = compiled, before, set(), []
        scheduler = make_scheduler(serving.scheduler, serving.budget, COSTS, EXPERTS)
        caller = Caller(programs, residency_of(store, serving))
        return Engine(caller, scheduler, serving, WIDE.vocab_size, tiny_tokenizer, clock=Ticks())

    return make


def ask(rng: random.Random, **params: Any) -> Request:
    prompt, seed = [rng.randrange(256) for _ in range(rng.randrange(1, 20))], rng.randrange(2**31)
    return Request(prompt, SamplingParams(max_tokens=rng.randrange(1, 9), temperature=1.0, seed=seed, **params))


def buffers_beside(engine: Engine) -> tuple[int, int]:
    """How many buffers are alive besides experts' places and the few small inputs that calls keep, and their bytes."""
    gc.collect()
    programs, store = engine._caller.programs, engine._caller.residency.store
    spans = [held for home in (store._on_device, store._waiting) for held in home]
    experts = [layer for held in spans for layers in held.values() for layer in layers]
    experts += [layer for place in store._free for layer in place.held or ()]
    kept = [w for layer in experts for w in layer] + list(programs._small.values())
    kept += jax.tree.leaves((store._fences, [place.fence for place in store._free]))  # a number each
    known = {x.unsafe_buffer_pointer() for x in kept}
    found = {x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays() if not x.is_deleted()}
    others = {pointer: size for pointer, size in found.items() if pointer not in known}
    return len(others), sum(others.values())


@pytest.mark.parametrize("requests", [300, pytest.param(2000, marks=pytest.mark.sweep)])
def test_requests_leave_nothing_behind(make_engine, requests):
    rng, reasons, alive = random.Random(0), Counter(), []
    engine = make_engine(pages=24, slots=3, staging=1, scheduler="decode_first")
    engine._caller.programs.metering = False
    for _ in range(50):
        engine.submit(ask(rng))
    run_out(engine)
    before = buffers_beside(engine)
    for _ in range(requests):
        stops = ["".join(rng.choices(printable, k=length)) for length in (1, 1, 1, 2)]
        told = lambda event: reasons.update([event.finish_reason])  # noqa: E731
        alive.append(engine.submit(ask(rng, stop=stops), told).id)
        while engine.stats().waiting > 12:
            engine.step()
        if rng.random() < 0.2:
            engine.cancel(rng.choice(alive[-16:]))
    run_out(engine)
    stats = engine.stats()
    assert reasons.total() - reasons[None] == requests == stats.finished - 50
    assert min(reasons[reason] for reason in ("stop", "length", "cancelled")) > requests // 100 and not reasons["error"]
    assert stats.preemptions > 0 and stats.missing > 0 and stats.loads > requests // 2
    assert_nothing_left(engine)
    assert buffers_beside(engine) == before
    assert not [x for x in gc.get_objects() if isinstance(x, Live)]
    assert len(engine._caller.programs._small) <= KEPT
    store = engine._caller.residency.store
    assert all(len(store.on_device(span)) == store.slots for span in range(len(store.spans)))


@pytest.mark.parametrize("slots, staging, ahead", [(1, 1, True), (3, 0, True), (3, 1, False)])
def test_peak_memory_and_where_arguments_lie(make_engine, slots, staging, ahead):
    """At any call at most 1.05 x (all but experts, k experts a layer and the ring, caches), and every array a call is
    given lies in device memory: what a CPU computes on from `pinned_host` a GPU would not."""
    rng = random.Random(1)
    engine = make_engine(slots=slots, staging=staging, ahead=ahead)
    for _ in range(60):
        engine.submit(ask(rng))
    run_out(engine)
    programs = engine._caller.programs
    needed = footprint(programs)
    assert engine.stats().loads > 100
    assert needed.total < programs.peak <= 1.05 * needed.total
    assert programs.kinds == {"device"} and 0 < programs.handed < 4096


@pytest.mark.parametrize("slots", [3, EXPERTS])
def test_caches_are_held_once(make_engine, monkeypatch, slots):
    """Also where costs were measured, and after a step that failed halfway: its traceback knows the caches."""
    engine = make_engine(slots=slots, staging=1)
    programs, needed = engine._caller.programs, footprint(engine._caller.programs)
    measure(engine._caller)
    assert engine._caller.state.position.tolist() == [0] * ROWS
    finished = PrefillPass.finish
    monkeypatch.setattr(PrefillPass, "finish", lambda *_: 1 / 0)
    engine.start()
    prompt = Request([1, 2, 3], SamplingParams(max_tokens=3))
    assert engine.submit(prompt).result().finish_reason == "error"
    monkeypatch.setattr(PrefillPass, "finish", finished)
    assert engine.submit(prompt).result().finish_reason in ("stop", "length")
    engine.stop()
    assert engine.stats().failures == 1
    assert len(programs.begun) == 3 and max(programs.begun) < needed.total + 0.1 * needed.caches


def test_what_does_not_fit_the_device_is_refused(tiny_model, monkeypatch):
    """Before anything is compiled; what fits by a byte is served."""
    model, settings = tiny_model("top1"), config.Serving(rows=4, length=64, chunk=8, slots=2, staging=1)
    engine = Engine.build(model, settings, costs=COSTS)
    most = footprint(engine._caller.programs).most
    engine.submit(Request([1, 2, 3], SamplingParams(max_tokens=3)))
    run_out(engine)
    alive = jax.tree.leaves((engine._caller.state, engine._caller.programs.weights))
    assert sum({x.unsafe_buffer_pointer(): x.nbytes for x in alive}.values()) < most
    monkeypatch.setattr(footprints, "device_room", lambda mesh: most)
    Engine.build(model, settings, costs=COSTS)
    monkeypatch.setattr(footprints, "device_room", lambda mesh: most - 1)
    with pytest.raises(ConfigError, match=r"GB of device memory.* 4 rows of 64 tokens.*lower Serving.rows, length"):
        Engine.build(model, settings, costs=COSTS)
