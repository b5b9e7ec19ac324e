"""The jitted calls against the whole-sequence model: tokens, top-20 log-probabilities, compile counts, memory."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from masked_model import Masked

from readme_jax.config import RopeScaling
from readme_jax.errors import ConfigError
from readme_jax.generate import Generator
from readme_jax.models.runtime import Runtime
from readme_jax.serving import matvec
from readme_jax.serving.buckets import Limits
from readme_jax.serving.decode import Sampled
from readme_jax.serving.passes import DecodePass
from readme_jax.serving.programs import Programs
from readme_jax.serving.sampling import TOP, Samplings
from readme_jax.serving.store import ExpertStore

pytestmark = pytest.mark.usefixtures("quickly_compiled")
LIMITS = Limits(rows=4, length=48, chunks=(8,), decode=(1, 4), stretches=(8, 20, 48))
PROMPTS = [[5, 3, 8, 1, 13, 2], [7], list(range(20)), [200, 100, 50, 25, 12, 6, 3, 1, 0]]
FEW = Limits(rows=4, length=48, chunks=(8,), decode=(4,), stretches=(8, 20, 48))  # fewer programs
THOROUGH = ("top1", "top2")
GPU = Runtime(segments="kernel", decode="kernel")  # as on a GPU, but in float32 and its kernel interpreted
KINDS = ["dense", "top1", "top2", "tied", "own_rows"]


@pytest.fixture(scope="module")
def served(tiny_model):
    """Programs of a kind of model with everything resident, compiled once."""

    @functools.cache
    def build(kind: str) -> Programs:
        model = tiny_model(kind)
        return Programs(model, ExpertStore(model), LIMITS if kind in THOROUGH else FEW)

    return build


class Driver:
    """Rows driven as the engine would, all greedy; keeps what was sampled of each row."""

    def __init__(self, programs: Programs) -> None:
        self.programs, self.state = programs, programs.new_state()
        self.new: dict[int, list[tuple[int, float, np.ndarray, np.ndarray]]] = {}
        self.routes: dict[int, tuple[int, ...]] = {}
        self.all_present = False  # whether calls get all experts, not only those they need

    def given(self, needed) -> tuple[int, ...]:
        return tuple(range(self.programs.store.num_experts)) if self.all_present else tuple(needed)

    def experts(self, rows) -> tuple[int, ...]:
        return tuple(sorted({e for row in rows for e in self.routes[row]}))

    def start(self, row: int, prompt: list[int], chunk: int, targets: bool = False) -> list:
        p = self.programs
        routed = p.route(prompt)
        self.state = p.insert(self.state, row, routed)
        scores = []
        for start in range(0, len(prompt), chunk):
            part = slice(start, min(start + chunk, len(prompt)))
            experts = self.given(np.unique(routed.experts[part]).tolist())
            last = part.stop == len(prompt)
            following = np.asarray((prompt + [0])[part.start + 1 : part.stop + 1])
            self.state, sampled, scored = p.prefill(
                self.state,
                row,
                np.asarray(prompt[part]),
                start,
                routed.experts[part],
                routed.weights[part],
                experts,
                p.store.present(experts),
                last=last,
                targets=following if targets else None,
            )
            if targets:
                scores.append(tuple(np.asarray(x)[: len(following)] for x in scored))
        self.new[row] = []
        self._keep(sampled, [row], [0])
        return scores

    def step(self, rows, experts=None) -> np.ndarray:
        """One decode call of `rows`; returns which of them were missing."""
        p = self.programs
        active = np.zeros(max(rows) + 1, bool)
        active[list(rows)] = True
        given = self.given(self.experts(rows)) if experts is None else experts
        sampling = Samplings.greedy(len(active))
        self.state, sampled = p.decode(self.state, active, given, p.store.present(given), sampling)
        missing = np.asarray(sampled.missing)
        assert not missing[len(active) :].any()
        ran = [r for r in rows if not missing[r]]
        self._keep(sampled, ran, ran)
        return np.flatnonzero(missing)

    def _keep(self, sampled, rows, at) -> None:
        host = jax.tree.map(np.asarray, sampled)
        for row, i in zip(rows, at, strict=True):
            top = (host.top_tokens[i], host.top_logprobs[i])
            self.new[row].append((int(host.tokens[i]), float(host.logprob[i]), *top))
            self.routes[row] = tuple(host.experts[i].tolist())

    def tokens(self, row: int) -> list[int]:
        return [t for t, *_ in self.new[row]]

    def check(self, reference: Masked, row: int, prompt: list[int]) -> None:
        """Every new token is the reference's best, with its 20 best and their log-probabilities."""
        expected = reference(prompt + self.tokens(row))
        for i, (token, logprob, top, logprobs) in enumerate(self.new[row]):
            want = expected[len(prompt) - 1 + i]
            assert token == np.argmax(want)
            assert (token, logprob) == (top[0], logprobs[0])  # the identical float
            np.testing.assert_allclose(np.sort(want)[::-1][:TOP], logprobs, atol=1e-4)
            np.testing.assert_allclose(want[top], logprobs, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_equal_the_whole_sequence_model_and_the_generator(tiny_model, served, kind):
    driver, model = Driver(served(kind)), tiny_model(kind)
    driver.all_present = kind not in THOROUGH
    for row, prompt in enumerate(PROMPTS):
        driver.start(row, prompt, chunk=[8, 1, 5, 3][row])
    for i in range(8):
        driver.step([0, 1, 2, 3] if i % 2 else [0, 2])
    driver.step([0])
    driver.step([1, 3])
    reference = Masked(model, LIMITS.length)
    expected = Generator(model).generate(PROMPTS, 12).tokens
    for row, prompt in enumerate(PROMPTS):
        driver.check(reference, row, prompt)
        assert driver.tokens(row) == expected[row][: len(driver.new[row])]


@pytest.mark.parametrize("kind", ["top1", "top2"])
def test_rows_whose_expert_is_missing_change_nothing_and_run_again(tiny_model, served, kind):
    driver, reference = Driver(served(kind)), Masked(tiny_model(kind), LIMITS.length)
    for row, prompt in enumerate(PROMPTS):
        driver.start(row, prompt, chunk=8)
    reruns = 0
    for _ in range(10):
        given = driver.experts([0])
        missing = driver.step([0, 1, 2, 3], given)
        expected = [r for r in range(4) if len(driver.new[r]) == len(driver.new[0]) - 1]
        assert missing.tolist() == expected
        if len(missing):
            reruns += 1
            assert not len(driver.step(missing.tolist()))
    assert reruns > 2
    for row, prompt in enumerate(PROMPTS):
        driver.check(reference, row, prompt)


@pytest.mark.parametrize("kind, changes", [("top1", {}), ("top2", {"sliding_window": 5})], ids=["top1", "window"])
def test_the_kernel_of_gpus_changes_no_token(tiny_model, kind, changes):
    model = tiny_model(kind)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, **changes))
    driver, reference = Driver(Programs(model, ExpertStore(model), FEW, GPU)), Masked(model, LIMITS.length)
    for row, prompt in enumerate(PROMPTS):
        driver.start(row, prompt, chunk=[8, 1, 5, 3][row])
    for i in range(6):
        given = driver.experts([0]) if i % 2 else driver.experts(range(4))
        missing = driver.step([0, 1, 2, 3], given)
        if len(missing):
            driver.step(missing.tolist())
        driver.step([1, 3])
    for row, prompt in enumerate(PROMPTS):
        driver.check(reference, row, prompt)


def test_products_of_up_to_four_rows_are_kernels_that_normalise_and_add(tiny_model, monkeypatch):
    model, columns, run = tiny_model("dense"), [], matvec._run

    def counted(weights, y, add, *options):
        columns.append((y.x if isinstance(y, matvec.Normed) else y).shape[1])
        return run(weights, y, add, *options)

    monkeypatch.setattr(matvec, "_run", counted)
    limits = dataclasses.replace(FEW, rows=8, decode=(4, 8))
    programs = Programs(model, ExpertStore(model), limits, GPU)
    for batch in limits.decode:
        programs.program("decode", batch, 0)
    assert columns == [4] * (4 * model.config.num_layers + 1)  # of a layer qkv, o, gate with up, down; the head


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 5},
        {"rope_scaling": RopeScaling("linear", 4.0)},
        {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 16)},
    ],
    ids=["window", "linear", "llama3"],
)
def test_sliding_window_and_rope_scaling(tiny_model, changes):
    model = tiny_model("top1")
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, **changes))
    driver, reference = Driver(Programs(model, ExpertStore(model), FEW)), Masked(model, LIMITS.length)
    driver.all_present = True
    driver.start(1, PROMPTS[2], chunk=7)
    for _ in range(10):
        driver.step([1])
    driver.check(reference, 1, PROMPTS[2])


def test_one_expert_without_a_router_is_a_smaller_dense_model(tiny_model):
    model = tiny_model("own_rows")
    shape = dataclasses.replace(model.mixture, num_experts=1)
    layers = {k: v for k, v in model.params.items()}
    channels = {k: v | {"experts": v["experts"][:1]} for k, v in model.channels.items()}
    model = dataclasses.replace(model, mixture=shape, params=layers, channels=channels, router=None, router_config=None)
    driver = Driver(Programs(model, ExpertStore(model), FEW))
    driver.start(0, PROMPTS[0], chunk=4)
    for _ in range(5):
        driver.step([0])
    driver.check(Masked(model, LIMITS.length), 0, PROMPTS[0])
    assert driver.routes[0] == (0,)


@pytest.mark.parametrize("chunk", [3, 8])
def test_prompt_scores_equal_the_whole_sequence_model(tiny_model, served, chunk):
    driver, prompt = Driver(served("top1")), PROMPTS[2]
    scores = driver.start(2, prompt, chunk, targets=True)
    logprob, top, values = (np.concatenate(x) for x in zip(*scores, strict=True))
    expected = Masked(tiny_model("top1"), LIMITS.length)(prompt)
    np.testing.assert_allclose(logprob[:-1], expected[np.arange(19), prompt[1:]], atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(expected, top, 1), values, atol=1e-4)
    np.testing.assert_allclose(np.sort(expected)[:, ::-1][:, :TOP], values, atol=1e-4)


def test_a_row_fills_to_its_end_and_the_last_chunk_may_pass_it_with_padding(tiny_model, served):
    prompt = np.random.default_rng(1).integers(0, 256, 46).tolist()
    driver = Driver(served("top1"))
    driver.start(3, prompt, chunk=7)  # its last chunk is tokens 42 to 46, padded to 50; the row has 48
    for _ in range(2):
        driver.step([3])
    driver.check(Masked(tiny_model("top1"), LIMITS.length), 3, prompt)
    full = np.asarray(driver.state.layers[0].keys[0][3])
    assert not len(driver.step([3]))  # a full row runs no more
    np.testing.assert_array_equal(full, driver.state.layers[0].keys[0][3])


def test_a_copied_prefix_and_a_moved_row_go_on_as_before(tiny_model, served):
    programs, reference = served("top2"), Masked(tiny_model("top2"), LIMITS.length)
    driver = Driver(programs)
    driver.start(3, PROMPTS[2], chunk=8)
    driver.step([3])
    driver.state = programs.copy_row(driver.state, 3, 0, LIMITS.length)  # moved
    driver.new[0], driver.routes[0] = driver.new.pop(3), driver.routes.pop(3)
    driver.step([0])
    prompt = PROMPTS[2][:12] + [9, 9, 9, 9]
    routed = programs.route(prompt)
    driver.state = programs.copy_row(driver.state, 0, 2, 12)
    driver.state = programs.insert(driver.state, 2, routed)
    experts = tuple(np.unique(routed.experts[12:]).tolist())
    driver.state, sampled, _ = programs.prefill(
        driver.state,
        2,
        np.asarray(prompt[12:]),
        12,
        routed.experts[12:],
        routed.weights[12:],
        experts,
        programs.store.present(experts),
        last=True,
    )
    driver.new[2] = []
    driver._keep(sampled, [2], [0])
    for _ in range(4):
        driver.step([0, 2])
    driver.check(reference, 0, PROMPTS[2])
    driver.check(reference, 2, prompt)


def test_tokens_drawn_with_a_seed_do_not_depend_on_the_batch(served):
    def run(row: int, others: list[int], chunk: int) -> list[int]:
        programs, driver = served("top1"), Driver(served("top1"))
        for other in [*others, row]:
            driver.start(other, PROMPTS[0], chunk)
        rows = [*others, row]
        for _ in range(6):
            active = np.zeros(4, bool)
            active[rows] = True
            given = (0, 1, 2)
            sampling = Samplings.of([(1.3, 50, 0.95, 0.0, 11 + (r != row)) for r in range(4)])
            present = programs.store.present(given)
            driver.state, sampled = programs.decode(driver.state, active, given, present, sampling)
            driver._keep(sampled, rows, rows)
        return driver.tokens(row)

    alone = run(0, [], 8)
    assert run(2, [0, 3], 3) == alone
    assert len(set(alone)) > 3


@pytest.mark.parametrize("by_span", [True, False])
def test_programs_are_compiled_at_warm_up_and_none_later(tiny_model, monkeypatch, by_span):
    monkeypatch.setattr(Programs, "by_span", by_span)
    model = tiny_model("top2")
    programs = Programs(model, ExpertStore(model, slots=2, staging=1), Limits(2, 16, chunks=(8,), decode=(2,)))
    seen = []
    assert programs.warm_up(lambda done, total: seen.append((done, total))) == programs.planned == len(seen)
    assert seen[-1] == (programs.planned, programs.planned)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: compiled.append(name) if "backend_compile" in name else None
    )
    driver = Driver(programs)
    compiled.clear()  # making the state is once a start
    for span in range(len(programs.store.spans)):
        programs.store.load(span, 0)
        programs.store.load(span, 1)
        programs.store.load(span, 2)
    driver.start(0, PROMPTS[0], 4, targets=True)
    driver.start(1, PROMPTS[0], 6)
    driver.step([0, 1])
    driver.step([1])
    driver.state = programs.copy_row(driver.state, 0, 1, 3)
    assert programs.compilations == programs.planned
    assert not compiled
    jax.monitoring.clear_event_listeners()


def test_an_interrupted_warm_up_compiles_no_further(tiny_model):
    model = tiny_model("top1")
    programs = Programs(model, ExpertStore(model), Limits(2, 16, chunks=(8,), decode=(2,)))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        programs.warm_up(interrupt)
    assert 1 <= programs.compilations <= 3 < programs.planned


def pointers(state) -> list[int]:
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves((state.layers, state.router))]


def test_caches_are_updated_in_place(tiny_model, served):
    """Of a call's memory beside its arguments, nothing is as large as the caches; their buffers stay where they are.
    So too where a step is a call for each span of layers and one for the end."""
    resident, model = served("top1"), tiny_model("top1")
    streaming = Programs(model, ExpertStore(model, slots=2, staging=1), LIMITS)
    state = resident.new_state()
    layers, router = (sum(x.nbytes for x in jax.tree.leaves(part)) for part in (state.layers, state.router))
    one = layers // len(streaming.store.spans)
    for programs, key, caches in (
        (resident, ("decode", 4, 2), layers + router),
        (resident, ("copy",), layers + router),
        (resident, ("prefill_span", 8, 2, 8), one),
        (resident, ("prefill_end", 8), router),
        (streaming, ("decode_span", 4, 2), one),
        (streaming, ("decode_end", 4), router),
    ):
        memory = programs.program(*key).memory_analysis()
        assert memory.alias_size_in_bytes >= caches
        assert memory.output_size_in_bytes - memory.alias_size_in_bytes < caches / 4
    for programs in (resident, streaming):
        driver = Driver(programs)
        if not programs.store.resident:
            for span in range(len(programs.store.spans)):
                for expert in range(3):
                    programs.store.load(span, expert)
        before = pointers(driver.state)
        driver.start(0, PROMPTS[0], 8)
        driver.step([0])
        assert pointers(driver.state) == before


def test_bad_calls_are_named(tiny_model, served):
    programs = served("top1")
    state, present = programs.new_state(), programs.store.present((0,))
    one = np.zeros((1, 1), np.int32)
    with pytest.raises(ConfigError, match="tokens of experts"):
        programs.prefill(state, 0, np.asarray([1]), 0, one + 2, one + 1.0, (0,), present)
    with pytest.raises(ConfigError, match="a row holds 48"):
        programs.prefill(state, 0, np.asarray([1]), 48, one, one + 1.0, (0,), present)
    with pytest.raises(ConfigError, match="tokens of a prompt"):
        programs.route([1] * 49)
    with pytest.raises(ConfigError, match="programs"):
        Programs(tiny_model("top1"), programs.store, Limits(64, 256, decode=tuple(range(1, 65))))
    with pytest.raises(ConfigError, match="no experts"):
        programs.decode(state, np.ones(1, bool), (), present, Samplings.greedy(1))


@pytest.mark.parametrize("platform, wanted", [("gpu", {"tokens", "experts", "missing"}), ("cpu", set())])
def test_results_that_are_always_read_start_for_the_host_at_dispatch(platform, wanted):
    started: set[str] = set()
    results: Any = (SimpleNamespace(copy_to_host_async=lambda name=name: started.add(name)) for name in Sampled._fields)
    step: Any = object.__new__(DecodePass)
    step.programs, sampled = SimpleNamespace(platform=platform), Sampled(*results)
    step._keep(sampled)
    assert step.sampled is sampled and started == wanted
