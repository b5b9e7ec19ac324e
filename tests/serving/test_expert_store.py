"""Where experts' weights lie, and what is counted."""

from __future__ import annotations

import numpy as np
import pytest

from readme_jax.errors import ConfigError
from readme_jax.models.experts import layer_experts
from readme_jax.serving.buckets import (
    CPU_PROGRAMS,
    GPU_PROGRAMS,
    Limits,
    decode_shapes,
    limits_for,
    present_buckets,
    spans_of,
)
from readme_jax.serving.store import PARTS, ExpertStore


def kinds_of_memory(store: ExpertStore, experts: tuple[int, ...]) -> set[str]:
    arrays = [w for layer in store.present(experts) for expert in layer for w in expert]
    arrays += [w for part in store.permanent if part is not None for w in part]
    return {w.sharding.memory_kind for w in arrays}


@pytest.mark.parametrize("kind", ["top1", "tied", "own_rows", "dense"])
@pytest.mark.parametrize("slots", [None, 2])
def test_arrays_are_the_models_and_lie_in_device_memory(tiny_model, kind, slots):
    model = tiny_model(kind)
    if kind == "dense":
        store = ExpertStore(model, slots)
        assert store.present(()) == [[]] * model.config.num_layers
        np.testing.assert_array_equal(store.permanent[1].up, model.params["layers_1"]["ffn"]["up"])
        return
    store = ExpertStore(model, slots)
    if slots is not None:
        for span in range(len(store.spans)):
            for expert in (2, 0):
                store.load(span, expert)
    assert kinds_of_memory(store, (2, 0)) == {"device"}
    for i, given in enumerate(store.present((2, 0))):
        name = f"layers_{i}"
        permanent, experts = layer_experts(model.params[name], model.channels[name], model.mixture)
        for e, arrays in zip((2, 0), given, strict=True):
            for part, array in zip(PARTS, arrays, strict=True):
                np.testing.assert_array_equal(array, experts[e][part])
        assert (permanent is None) == (store.permanent[i] is None)
        if permanent is not None:
            np.testing.assert_array_equal(store.permanent[i].down, permanent["down"])


@pytest.mark.parametrize("layers, length", [(1, 1), (2, 1), (12, 2), (22, 2), (30, 5), (31, 1), (32, 4), (80, 10)])
def test_spans_are_alike_and_at_least_six_where_there_are_layers(layers, length):
    spans = spans_of(layers)
    assert [list(range(layers))[span] for span in spans] == [
        list(range(start, start + length)) for start in range(0, layers, length)
    ]
    assert len(spans) >= min(layers, 6)


def test_places_are_taken_freed_and_counted(tiny_model):
    store = ExpertStore(tiny_model("top1"), slots=1, staging=1)
    assert store.places == 4 and store.span_layers == 1  # one a span, and a ring for two spans at a time
    empty = store.device_bytes()
    store.load(0, 1)
    store.load(0, 1)
    store.load(0, 2)
    assert (store.loads, store.bytes_loaded) == (2, 2 * store.expert_bytes)
    assert store.device_bytes() == empty + 2 * store.expert_bytes
    assert store.on_device(0) == {1, 2} and store.on_device(1) == frozenset()
    store.load(1, 0)
    store.load(1, 1)
    with pytest.raises(ConfigError, match="all 4 places"):
        store.load(0, 0)
    store.drop(1, 0)
    store.load(0, 0)
    assert store.on_device(0) == {0, 1, 2}
    with pytest.raises(ConfigError, match="span 1: expert 0 is not on the device"):
        store.present((0,))
    assert len(store.present((0,), 0)) == 1


def test_a_place_is_used_again_once_the_calls_that_were_given_it_have_run(tiny_model):
    """And counts until then: the runtime holds what a call still reads."""

    class Fence:
        waited = 0

        def block_until_ready(self) -> None:
            self.waited += 1

    store = ExpertStore(tiny_model("top1"), slots=1)
    for span in (0, 1):
        store.load(span, 0)
    first, second = Fence(), Fence()
    held = store.device_bytes()
    store.used(0, first)
    store.drop(0, 0)
    store.used(0, second)  # later calls were not given it
    assert store.device_bytes() == held and not first.waited
    store.load(0, 1)
    assert store.device_bytes() == held and first.waited and not second.waited


def test_cleared_places_are_free_at_once(tiny_model):
    store = ExpertStore(tiny_model("top1"), slots=1)
    for expert in (0, 2):
        for span in (0, 1):
            store.load(span, expert)
        store.clear()
        assert store.on_device(0) == store.on_device(1) == frozenset()


def test_present_experts_are_padded_by_repeating(tiny_model):
    store = ExpertStore(tiny_model("top1"))  # 3 experts
    assert store.padded((2,)) == (2,)
    assert store.padded((2, 1)) == (2, 1)
    assert store.padded([0, 2, 1]) == (0, 2, 1)
    pairs = ExpertStore(tiny_model("top2"))
    assert pairs.padded((1,)) == (1, 1)
    assert pairs.present((1,))[0][0] is pairs.present((1,))[0][1]


def test_kept_lists_of_experts_follow_the_store(tiny_model):
    store = ExpertStore(tiny_model("top1"), slots=1, staging=1)
    for span in (0, 1):
        store.load(span, 1)
    first = store.present((1,))
    assert store.present([1]) is first and store.present((1,), 0) == first[:1]
    store.drop(0, 1)
    for span in (0, None):
        with pytest.raises(ConfigError, match="span 0: expert 1 is not on the device"):
            store.present((1,), span)
    store.load(0, 1)
    again = store.present((1,))
    assert again[0][0] is store.arrays(0, 1)[0] and again[0][0] is not first[0][0] and again[1] == first[1]
    store.clear()
    with pytest.raises(ConfigError, match="is not on the device"):
        store.present((1,), 1)


def test_too_few_slots_for_a_token_are_refused(tiny_model):
    with pytest.raises(ConfigError, match="a token needs 2 experts"):
        ExpertStore(tiny_model("top2"), slots=1)
    assert ExpertStore(tiny_model("top2"), slots=1, staging=1).slots == 1
    with pytest.raises(ConfigError, match="resident"):
        ExpertStore(tiny_model("top1")).drop(0, 0)


@pytest.mark.parametrize(
    "rows, length, chunk", [(1, 16, 16), (16, 2048, 256), (64, 2048, 256), (256, 8192, 1024), (64, 8192, 3000)]
)
@pytest.mark.parametrize("experts, top_k", [(0, 0), (1, 1), (7, 1), (7, 2), (16, 2)])
def test_limits_stay_within_a_platforms_programs(rows, length, chunk, experts, top_k):
    for platform, most in (("cpu", CPU_PROGRAMS), ("gpu", GPU_PROGRAMS)):
        limits = limits_for(rows, length, chunk, platform)
        for streaming in (False, True):  # then each number of rows has an end of its own, too
            decodes = decode_shapes(limits, experts, top_k)
            spans = len(decodes) if streaming and platform == "gpu" else 0  # beside the whole step's programs
            prefills = len(limits.chunks) * len(present_buckets(experts, top_k)) + 1
            ends = len(limits.decode) if streaming else 0
            assert len(decodes) + spans + prefills + ends + 2 * len(limits.prompts) + 1 <= most
            assert (rows, experts) in decodes  # a full batch of any experts has a program


def test_a_call_of_few_experts_is_compiled_for_few():
    limits = Limits(16, 64, decode=(4, 16))
    assert decode_shapes(limits, 7, 1, held=3) == tuple((rows, present) for rows in (4, 16) for present in (1, 2, 4))
    assert decode_shapes(limits, 7, 2, held=2) == ((4, 2), (16, 2))


@pytest.mark.parametrize(
    "sizes, said",
    [({"decode": (2,)}, "decode"), ({"chunks": (8, 4)}, "chunks"), ({"chunks": (64,)}, "chunks")]
    + [({"rows": 0}, "rows"), ({"stretches": (8, 16)}, "stretches")],
)
def test_limits_that_do_not_fit_are_named(sizes, said):
    with pytest.raises(ConfigError, match=f"Limits.{said}"):
        Limits(**({"rows": 4, "length": 32} | sizes))


def test_an_expert_has_arrived_once_it_is_in_every_layer(tiny_model):
    store = ExpertStore(tiny_model("top1"), slots=2)
    store.load(0, 1)
    assert not store.arrived(1)
    for span in range(1, len(store.spans)):
        store.load(span, 1)
    for layer in store.present((1,)):
        for array in layer[0]:
            array.block_until_ready()
    assert store.arrived(1)
