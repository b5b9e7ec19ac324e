"""Requests that can never be served are refused at once, each with the field that is wrong."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from fake_programs import FakeModel, fake_engine

from readme_jax import config
from readme_jax.cli.settings import load_serving
from readme_jax.errors import CheckpointError, ConfigError
from readme_jax.serving.build import slots_of
from readme_jax.serving.engine import Engine
from readme_jax.serving.request import Request, RequestError, SamplingParams
from readme_jax.serving.store import ExpertStore

BAD_PARAMS = [
    ("temperature", math.nan),
    ("temperature", -0.1),
    ("temperature", math.inf),
    ("temperature", "hot"),
    ("temperature", True),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("min_p", math.nan),
    ("min_p", -1),
    ("top_k", -1),
    ("top_k", 1.5),
    ("max_tokens", -1),
    ("max_tokens", 0),
    ("max_tokens", True),
    ("seed", "x"),
    ("logprobs", 21),
    ("logprobs", -1),
    ("stop", ["a"] * 5),
    ("stop", [""]),
    ("stop", ["x" * 300]),
    ("stop", [3]),
    ("stop", 3),
    ("stop_ids", 3),
    ("echo", 1),
]


@pytest.mark.parametrize("field, value", BAD_PARAMS, ids=lambda v: repr(v)[:20])
def test_bad_parameter_is_named(field, value):
    with pytest.raises(RequestError) as error:
        SamplingParams(**{field: value})
    assert error.value.field == field and str(error.value).startswith(f"{field}: ")
    assert len(str(error.value).splitlines()) == 1


def test_good_parameters_are_kept_in_one_form():
    params = SamplingParams(temperature=1, stop="end", stop_ids=[3], max_tokens=0, echo=True)
    assert (params.temperature, params.stop, params.stop_ids) == (1.0, ("end",), (3,))


BAD_REQUESTS = [
    ("prompt", Request([])),
    ("prompt", Request("")),
    ("prompt", Request([1] * 65)),
    ("prompt", Request([1] * 64)),  # no room for an answer
    ("prompt", Request([1, 256])),
    ("prompt", Request([-1])),
    ("prompt", Request([1.5])),
    ("prompt", Request([True])),
    ("prompt", Request({"a": 1})),
    ("max_tokens", Request([1] * 10, SamplingParams(max_tokens=55))),
    ("stop_ids", Request([1], SamplingParams(stop_ids=[256]))),
]


@pytest.mark.parametrize("field, request_", BAD_REQUESTS)
def test_bad_request_is_named_and_the_engine_goes_on(field, request_, tiny_tokenizer):
    engine = fake_engine(config.Serving(rows=2, length=64, chunk=8), tokenizer=tiny_tokenizer)
    before = engine.submit(Request([1, 2], SamplingParams(max_tokens=4)))
    with pytest.raises(RequestError) as error:
        engine.submit(request_)
    assert error.value.field == field
    after = engine.submit(Request([1, 2], SamplingParams(max_tokens=4)))
    while engine.step():
        pass
    assert before.result().tokens == after.result().tokens == tuple(FakeModel().generate([1, 2], 4))


def test_a_router_of_another_number_of_experts_is_refused(tiny_model):
    model = tiny_model("top1")
    wrong = dataclasses.replace(model, router_config=dataclasses.replace(model.router_config, num_experts=7))
    with pytest.raises(CheckpointError, match="the router chooses among 7 experts, but the mixture has 3"):
        Engine.build(wrong, config.Serving(rows=1, length=64))


def test_what_exceeds_all_pages_is_refused():
    engine = fake_engine(config.Serving(rows=2, length=64, chunk=8, page_size=8, pages=4))
    with pytest.raises(RequestError, match="the context holds 32"):
        engine.submit(Request([1] * 30, SamplingParams(max_tokens=3)))
    engine.submit(Request([1] * 30, SamplingParams(max_tokens=2)))


def test_text_needs_a_tokenizer():
    engine = fake_engine(config.Serving(rows=2, length=64, chunk=8))
    with pytest.raises(RequestError, match="prompt: the model has no tokenizer"):
        engine.submit(Request("hello"))
    with pytest.raises(RequestError, match="stop: the model has no tokenizer"):
        engine.submit(Request([1], SamplingParams(stop=["x"])))


@pytest.mark.parametrize(
    "field, value",
    [("rows", 0), ("slots", -1), ("scheduler", "magic"), ("policy", "fifo"), ("chunk", 0), ("page_size", 1.5)],
)
def test_bad_serving_setting_is_named(field, value):
    with pytest.raises(ConfigError, match=f"Serving.{field}"):
        config.Serving(**{field: value})


@pytest.mark.parametrize("name", ["cpu", "three_slots", "gpu_7b"])
def test_settings_that_come_with_the_project_load(name):
    path = Path(__file__).resolve().parents[2] / "configs" / "serving" / f"{name}.gin"
    assert load_serving([path], ["Serving.queue = 7"]).queue == 7
    assert load_serving([path], ["Mesh.tensor = 2"]).mesh == config.Mesh(tensor=2)


def test_slots_as_bytes_are_as_many_experts_as_fit(tiny_model):
    model = tiny_model("top1")  # 3 experts
    store = ExpertStore(model)
    one = store.expert_bytes * store.num_layers

    def slots(size: int) -> int | None:
        return slots_of(model, config.Serving(slot_bytes=size), np.float32)

    assert [slots(size) for size in (one, 2 * one - 1, 2 * one, 3 * one)] == [1, 1, 2, None]
    with pytest.raises(ConfigError, match=f"Serving.slot_bytes = {one - 1}: one expert of all layers takes {one}"):
        slots(one - 1)


def test_slots_are_a_count_or_bytes_not_both():
    with pytest.raises(ConfigError, match="slot_bytes"):
        config.Serving(slots=2, slot_bytes=10**9)
