"""The engine's logic, on a fake model whose every token depends on every key before it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_programs import FakeModel, fake_engine
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from readme_jax import config
from readme_jax.serving.engine import STALLED, Draining, Engine
from readme_jax.serving.request import Overloaded, Request, SamplingParams
from readme_jax.serving.text import Transcript

MODEL = FakeModel()


def serving(**changes) -> config.Serving:
    small = {"rows": 4, "length": 64, "page_size": 4, "chunk": 8, "budget": 16, "queue": 5000}
    return config.Serving(**{**small, "scheduler": "decode_first", **changes})


def run_out(engine: Engine, most: int = 20000) -> int:
    for steps in range(most):
        if not engine.step():
            return steps
    raise AssertionError(engine.stats())


def assert_nothing_left(engine: Engine) -> None:
    stats, loop = engine.stats(), engine._loop
    assert (stats.waiting, stats.running) == (0, 0)
    assert (stats.free_rows, stats.free_pages) == (loop.rows.count, loop.pages.total)
    assert not loop.caller._routed and not loop._flight


def prompts(rng: random.Random, count: int, longest: int = 30) -> list[list[int]]:
    return [[rng.randrange(256) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


ROOM_MAKER = {"scheduler": "algorithm1", "slots": 0, "staging": 0, "policy": "belady", "ahead": False}
ROOM_MAKER |= {"rows": 4, "page_size": 3, "chunk": 1, "budget": 1}  # a step that does nothing but preempt


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@example(chosen=ROOM_MAKER, top_k=1, load_seconds=None, pages=0.0, seed=6)
@given(
    chosen=st.fixed_dictionaries(
        {
            "scheduler": st.sampled_from(["decode_first", "prefill_first", "algorithm1", "lookahead"]),
            "slots": st.integers(0, 4),
            "staging": st.integers(0, 2),
            "policy": st.sampled_from(["belady", "lru", "random"]),
            "ahead": st.booleans(),
            "rows": st.integers(1, 5),
            "page_size": st.sampled_from([1, 3, 16]),
            "chunk": st.sampled_from([1, 5, 64]),
            "budget": st.sampled_from([1, 7, 100]),
        }
    ),
    top_k=st.sampled_from([1, 2]),
    load_seconds=st.sampled_from([None, 0.001, 0.1]),
    pages=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_tokens_do_not_depend_on_what_else_runs(chosen, top_k, load_seconds, pages, seed):
    if 0 < chosen["slots"] + chosen["staging"] < top_k:
        chosen["slots"] = 2
    least, most = -(-64 // chosen["page_size"]), -(-64 * chosen["rows"] // chosen["page_size"])
    model = FakeModel(top_k=top_k)
    held = least + int(pages * (most - least))
    engine, rng = fake_engine(serving(**chosen, pages=held), model, load_seconds=load_seconds), random.Random(seed)
    asked = []
    for prompt in prompts(rng, 12):
        params = SamplingParams(max_tokens=rng.randrange(1, 20), temperature=rng.choice([0, 1]), seed=rng.randrange(9))
        asked.append((prompt, params, engine.submit(Request(prompt, params))))
        if rng.random() < 0.3:
            engine.step()
        if rng.random() < 0.2:
            rng.choice(asked)[2].cancel()
    run_out(engine)
    assert_nothing_left(engine)
    for prompt, params, handle in asked:
        done = handle.result()
        wanted = model.generate(prompt, params.max_tokens, (params.temperature, params.seed))
        assert done.finish_reason in ("length", "cancelled")
        assert list(done.tokens) == wanted[: len(done.tokens)]
        assert len(done.tokens) == params.max_tokens or done.finish_reason == "cancelled"
        routes = [model.route([*prompt, *wanted[: i + 1]]) for i in range(len(done.tokens))]
        assert list(done.experts) == routes


def test_residents_change_in_the_background_for_those_who_wait():
    model, rng = FakeModel(switch=50), random.Random(2)
    engine = fake_engine(serving(slots=1, staging=1, scheduler="lookahead", rows=4), model, load_seconds=0.005)
    residency, seen = engine._caller.residency, set()
    handles = [engine.submit(Request(p, SamplingParams(max_tokens=12))) for p in prompts(rng, 40)]
    while engine.step():
        seen |= residency.resident
        if residency.cache.swapping is None:  # else the victim has left and the other one is on its way
            assert len(residency.resident) == 1
    assert seen == {0, 1, 2, 3} and all(len(h.result().tokens) == 12 for h in handles)
    assert_nothing_left(engine)


def test_soak_leaves_nothing_behind(tiny_tokenizer):
    model, rng = FakeModel(vocab=257), random.Random(0)
    engine = fake_engine(serving(rows=8, pages=40, slots=2, scheduler="algorithm1"), model, tiny_tokenizer)
    alive, handles = [], []
    for number in range(2000):
        prompt = [rng.randrange(256) for _ in range(rng.randrange(1, 40))]
        stops = [bytes(rng.choices(range(97, 123), k=rng.randrange(1, 3))).decode() for _ in range(rng.randrange(4))]
        params = SamplingParams(max_tokens=rng.randrange(1, 20), stop=stops, temperature=1.0, seed=number)
        alive.append(engine.submit(Request(prompt, params)))
        handles.append(alive[-1])
        while engine.stats().waiting > 12:
            engine.step()
        if rng.random() < 0.2:
            alive.pop(rng.randrange(len(alive))).cancel()
    run_out(engine)
    reasons = {handle.result().finish_reason for handle in handles}
    assert reasons == {"stop", "length", "cancelled"}
    assert_nothing_left(engine)
    stats = engine.stats()
    assert stats.finished == 2000 and stats.preemptions > 0 and stats.missing > 0


def test_cancelling_frees_everything_within_one_step():
    engine = fake_engine(serving(rows=2, ahead=True))
    handles = [engine.submit(Request(p, SamplingParams(max_tokens=30))) for p in prompts(random.Random(1), 5)]
    for _ in range(6):
        engine.step()
    assert engine.stats().running == 2
    for handle in handles:
        handle.cancel()
        handle.cancel()
    engine.step()
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.free_rows) == (0, 0, 2)
    assert stats.free_pages == engine._loop.pages.total
    assert {handle.result().finish_reason for handle in handles} == {"cancelled"}
    handles[0].cancel()  # after the end: nothing
    run_out(engine)


def test_a_full_queue_refuses_before_any_work():
    engine = fake_engine(serving(queue=3))
    for _ in range(3):
        engine.submit(Request([1], SamplingParams(max_tokens=2)))
    with pytest.raises(Overloaded) as error:
        engine.submit(Request([1], SamplingParams(max_tokens=2)))
    assert error.value.retry_after >= 1
    assert engine.stats().refused == 1 and engine.stats().waiting == 3
    run_out(engine)
    engine.submit(Request([1], SamplingParams(max_tokens=2)))


def test_shared_prefixes_are_computed_once():
    engine = fake_engine(serving(rows=4))
    common, rng = [rng_token % 256 for rng_token in range(7, 7 + 22)], random.Random(2)
    first = engine.submit(Request(common, SamplingParams(max_tokens=12)))
    for _ in range(4):
        engine.step()
    later = [[*common, rng.randrange(256)] for _ in range(3)]
    handles = [engine.submit(Request(p, SamplingParams(max_tokens=5))) for p in later]
    run_out(engine)
    again = engine.submit(Request([*common, 3], SamplingParams(max_tokens=5)))
    run_out(engine)
    assert list(first.result().tokens) == MODEL.generate(common, 12)
    for prompt, handle in zip([*later, [*common, 3]], [*handles, again], strict=True):
        done = handle.result()
        assert list(done.tokens) == MODEL.generate(prompt, 5)
        assert done.usage.cached_tokens == 20  # five full pages
    assert engine._caller.programs.prefilled == 22 + 4 * 3


def test_a_sequence_short_of_pages_preempts_the_newest_which_is_recomputed():
    log = []
    engine = fake_engine(serving(rows=2, pages=16), step_log=log.append)
    old = engine.submit(Request([1] * 20, SamplingParams(max_tokens=40)))
    new = engine.submit(Request([2] * 20, SamplingParams(max_tokens=40)))
    run_out(engine)
    assert {id for step in log for id in step.preempted} == {new.id}
    assert list(old.result().tokens) == MODEL.generate([1] * 20, 40)
    assert list(new.result().tokens) == MODEL.generate([2] * 20, 40)


def test_the_step_log_tells_every_token_that_ran():
    log = []
    engine = fake_engine(serving(ahead=False), step_log=log.append)
    handles = [engine.submit(Request(p, SamplingParams(max_tokens=4))) for p in prompts(random.Random(3), 5)]
    run_out(engine)
    for handle, prompt in zip(handles, prompts(random.Random(3), 5), strict=True):
        chunks = [c[1:] for step in log for c in step.chunks if c[0] == handle.id]
        ran = [i for start, count in chunks for i in range(start, start + count)]
        assert ran == list(range(len(prompt) + 3))  # the last new token is not run
    assert all(later.now > step.now + step.seconds for step, later in zip(log, log[1:], strict=False))


def test_stop_ids_and_the_models_own_end(tiny_tokenizer):
    engine = fake_engine(serving(), FakeModel(vocab=257), tiny_tokenizer)
    free = FakeModel(vocab=257).generate([5], 12)
    stopped = engine.submit(Request([5], SamplingParams(max_tokens=12, stop_ids=[free[4]])))
    whole = engine.submit(Request([5], SamplingParams(max_tokens=12)))
    run_out(engine)
    done = stopped.result()
    assert (list(done.tokens), done.finish_reason) == (free[: free.index(free[4])], "stop")
    assert done.usage.completion_tokens == free.index(free[4]) + 1
    assert whole.result().text == tiny_tokenizer.decode(free)
    prompt, model = next(([p], m) for m in [FakeModel(vocab=257)] for p in range(256) if 256 in m.generate([p], 40))
    tokens = model.generate(prompt, 40)
    ends = engine.submit(Request(prompt, SamplingParams(max_tokens=40)))
    goes_on = engine.submit(Request(prompt, SamplingParams(max_tokens=40, ignore_eos=True)))
    run_out(engine)
    assert list(ends.result().tokens) == tokens[: tokens.index(256)] and len(goes_on.result().tokens) == 40


def test_echo_scores_the_whole_prompt_over_chunks_and_preemptions():
    engine = fake_engine(serving(rows=2, pages=16, chunk=8, budget=8))
    asked = prompts(random.Random(4), 6, 40)
    handles = [
        engine.submit(Request(p, SamplingParams(max_tokens=n, echo=True, logprobs=3)))
        for p, n in zip(asked, [0, 5, 12, 0, 20, 1], strict=True)
    ]
    run_out(engine)
    for prompt, handle in zip(asked, handles, strict=True):
        done = handle.result()
        assert [p.token for p in done.prompt_logprobs] == prompt and done.prompt_logprobs[0].logprob is None
        tokens = [*prompt, *done.tokens]
        for at, each in enumerate([*done.prompt_logprobs, *done.logprobs][1:], start=1):
            assert each.logprob == MODEL.logprob(tokens[:at], tokens[at]) == each.top[0][1]
            assert len(each.top) == 3 and each.top[0][0] == each.token == tokens[at]


def test_logprobs_only_where_asked():
    engine = fake_engine(serving())
    none, zero = (engine.submit(Request([1], SamplingParams(max_tokens=3, logprobs=n))) for n in (None, 0))
    run_out(engine)
    assert none.result().logprobs == ()
    assert [p.top for p in zero.result().logprobs] == [(), (), ()]


def test_route_tells_experts_and_bytes_without_generating():
    engine = fake_engine(serving(slots=1))
    route = engine.route([1, 2, 3, 4, 5, 6])
    assert route.experts == [MODEL.route([1, 2, 3, 4, 5, 6][: i + 1]) for i in range(6)]
    away = {e for r in route.experts for e in r} - set(engine.stats().resident)
    assert away and route.load_bytes == len(away) * 200
    assert engine.stats().steps == 0
    everything = fake_engine(serving())
    assert everything.route([1, 2]).load_bytes == 0


# --- text ---------------------------------------------------------------------------------------------------------

TEXT = st.text(alphabet="ab€😀é", max_size=12)


@given(TEXT, st.lists(st.text(alphabet="ab€", min_size=1, max_size=4), max_size=3))
def test_text_is_whole_and_ends_before_the_first_stop_string(tiny_tokenizer, text, stops):
    tokens = tiny_tokenizer.encode(text)  # a byte each
    ends = [(at + len(s), at) for s in stops if (at := text.find(s)) >= 0]
    wanted = text[: min(ends)[1]] if ends else text
    transcript, shown, items, stopped = Transcript(tiny_tokenizer, stops), "", [], False
    for number, token in enumerate(tokens):
        new = transcript.push(token, number)
        shown, stopped = shown + new.text, new.stopped
        items += new.items
        assert wanted.startswith(shown)  # never a part of a stop string, never half a character
        if stopped:
            break
    if not stopped:
        new = transcript.finish()
        shown, stopped = shown + new.text, new.stopped
        items += new.items
    assert shown == wanted and stopped == bool(ends)
    assert items == list(range(len(wanted.encode())))


@given(st.lists(st.integers(0, 255), max_size=20))
def test_any_bytes_come_out_as_they_decode_at_once(tiny_tokenizer, tokens):
    transcript: Transcript[int] = Transcript(tiny_tokenizer)
    parts = [transcript.push(t, t) for t in tokens]
    parts.append(transcript.finish())
    assert "".join(p.text for p in parts) == tiny_tokenizer.decode(tokens)
    assert [i for p in parts for i in p.items] == tokens


def test_streamed_text_never_shows_part_of_a_stop_string(tiny_tokenizer):
    model = FakeModel(vocab=128)
    text = tiny_tokenizer.decode(model.generate([65], 30))
    stop = text[11:15]
    engine = fake_engine(serving(), model, tiny_tokenizer)
    seen = []
    handle = engine.submit(Request([65], SamplingParams(max_tokens=30, stop=[stop])), seen.append)
    run_out(engine)
    assert handle.id == 1
    assert "".join(e.text for e in seen) == text[: text.index(stop)]
    assert (seen[-1].finish_reason, sum(e.finish_reason is not None for e in seen)) == ("stop", 1)
    assert_nothing_left(engine)


# --- threads ------------------------------------------------------------------------------------------------------


def test_requests_from_many_threads_while_the_engine_runs():
    engine = fake_engine(serving())
    engine.start()
    asked = prompts(random.Random(5), 40)

    def ask(prompt):
        return engine.submit(Request(prompt, SamplingParams(max_tokens=7))).result()

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(ask, asked))
    assert [list(d.tokens) for d in done] == [MODEL.generate(p, 7) for p in asked]
    assert engine.ready and engine.healthy
    assert engine.drain(timeout=10)
    with pytest.raises(Draining):
        engine.submit(Request([1]))
    engine.stop()
    assert not engine.ready
    assert_nothing_left(engine)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.001)


def test_ready_once_programs_are_compiled():
    engine, compiled = fake_engine(serving()), threading.Event()
    engine._caller.programs.warm_up = lambda progress: compiled.wait(20)
    assert not engine.ready
    engine.start()
    handle = engine.submit(Request([1, 2], SamplingParams(max_tokens=3)))
    assert engine.healthy and not engine.ready and engine.stats().waiting == 1
    compiled.set()
    assert list(handle.result().tokens) == MODEL.generate([1, 2], 3)
    assert engine.healthy and engine.ready
    engine.stop()


def test_a_step_that_hangs_is_neither_healthy_nor_ready():
    now = [0.0]
    engine, hangs, goes_on = fake_engine(serving(), clock=lambda: now[0]), threading.Event(), threading.Event()
    decode = engine._caller.programs.decode_pass

    def hanging(*args):
        hangs.set()
        goes_on.wait(20)
        return decode(*args)

    engine._caller.programs.decode_pass = hanging
    engine.start()
    handle = engine.submit(Request([1, 2], SamplingParams(max_tokens=3)))
    assert hangs.wait(20)
    now[0] += STALLED - 1
    assert engine.healthy and engine.ready
    now[0] += 1
    assert not engine.healthy and not engine.ready
    goes_on.set()
    handle.result()
    until(lambda: engine.healthy and engine.ready)
    now[0] += 10 * STALLED  # nothing to do is no stall
    assert engine.healthy and engine.ready
    engine.stop()


@pytest.mark.parametrize("fails", ["warm-up", "reset"])
def test_an_engine_that_cannot_go_on_keeps_nobody_waiting(caplog, fails):
    """Its programs do not compile, or after a failed step there is no room for a new state."""
    engine, asked = fake_engine(serving()), threading.Event()

    def broken(*args):
        asked.wait(20)
        raise RuntimeError("out of memory")

    if fails == "warm-up":
        engine._caller.programs.warm_up = broken
    else:
        engine._caller.programs.decode_pass = engine._caller.reset = broken
    engine.start()
    handles = [engine.submit(Request([1, 2], SamplingParams(max_tokens=3))) for _ in range(3)]
    asked.set()
    done = [handle.result() for handle in handles]
    assert {(d.finish_reason, d.error) for d in done} == {("error", "the engine failed: RuntimeError")}
    until(lambda: not engine.healthy)
    assert not engine.ready
    with pytest.raises(Draining, match="failed"):
        engine.submit(Request([1]))
    assert engine.drain(timeout=20)
    engine.stop()
    assert_nothing_left(engine)


def test_stopping_does_not_wait_for_the_warm_up():
    engine, begun, seen = fake_engine(serving()), threading.Event(), []

    def warm_up(progress):
        for done in range(1, 4):
            begun.set()
            until(lambda: engine._stopping)
            progress(done, 3)
        return 3

    engine._caller.programs.warm_up = warm_up
    engine.start(lambda done, total: seen.append((done, total)))
    assert begun.wait(20)
    assert engine.drain(timeout=20)
    engine.stop()
    assert seen == [(1, 3)] and not engine.ready


def test_stopping_ends_what_is_alive():
    engine = fake_engine(serving(rows=1))
    engine.start()
    handles = [engine.submit(Request([i + 1], SamplingParams(max_tokens=50))) for i in range(20)]
    engine.stop()
    assert all(h.result().finish_reason in ("cancelled", "length") for h in handles)


@pytest.mark.parametrize("slots", [0, 1])
def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(caplog, slots):
    """With slots in the middle of a span, where its experts have come and those of the next one have not."""
    engine = fake_engine(serving(slots=slots, staging=1))
    programs, broken = engine._caller.programs, threading.Event()
    decode = programs.decode_pass

    def failing(*args):
        made = decode(*args)
        if not broken.is_set():
            broken.set()
            made.run = made.finish = fail
        return made

    def fail(*args):
        raise RuntimeError("device lost")

    programs.decode_pass = failing
    engine.start()
    failed = engine.submit(Request([1, 2], SamplingParams(max_tokens=5))).result()
    assert failed.finish_reason == "error" and "RuntimeError" in failed.error
    after = engine.submit(Request([1, 2], SamplingParams(max_tokens=5))).result()
    assert list(after.tokens) == MODEL.generate([1, 2], 5)
    assert engine.stats().failures == 1
    engine.stop()
    assert_nothing_left(engine)
