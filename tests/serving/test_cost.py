"""The cost model: figures that can be worked out by hand, and what must not shrink."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from readme_jax.errors import ConfigError
from readme_jax.serving.cost import DEVICES, SHAPES, CostModel, Device, Shape
from readme_jax.serving.work import Batch, Chunk, Sequence

TINY = Shape(8, 2, 2, 1, 4, 32, 100, num_experts=4, width=0.5, permanent=0.25, value_bytes=2)
SLOW = Device(flops=1e6, memory=1e5, link=1e4, overhead=0.001)


def batch(*chunks: tuple[list[int], int, int]) -> Batch:
    made = [Sequence(i, 0.0, len(r), [(e,) for e in r]) for i, (r, _, _) in enumerate(chunks)]
    return Batch(tuple(Chunk(s, start, count) for s, (_, start, count) in zip(made, chunks, strict=True)))


def test_layer_by_hand() -> None:
    model = CostModel(TINY, SLOW)
    assert TINY.expert_values == 3 * 8 * 8 and TINY.shared_values == 2 * 8 * 4 * 3 + 3 * 8 * 8
    assert model.load == 2 * 192 / 1e4
    cost = model.layer(batch(([1, 1, 2], 0, 3), ([3] * 5, 4, 1)))
    # 4 tokens: reading 2 bytes a weight (2e-5 s) outweighs 8 FLOPs a weight (8e-6 s)
    assert cost.segments == pytest.approx({1: 192 * 2e-5, 2: 192 * 2e-5, 3: 192 * 2e-5})
    attention = max((3 + 5) * 2 * 4 * 2 / 1e5, ((1 + 2 + 3) + 5) * 4 * 2 * 4 / 1e6)
    assert cost.shared == pytest.approx(384 * 2e-5 + attention + 0.001)
    assert cost.total == pytest.approx(cost.shared + sum(cost.segments.values()))
    assert model.head(0) == 0 and model.head(1) == pytest.approx(800 * 2e-5)


def test_arithmetic_binds_for_many_tokens_of_one_expert() -> None:
    model = CostModel(TINY, SLOW)
    assert model.layer(batch(([1] * 100, 0, 100))).segments[1] == pytest.approx(192 * 2 * 100 / 1e6)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), st.integers(0, 3))
def test_more_tokens_never_cost_less(routes, expert) -> None:
    model = CostModel(TINY, SLOW)
    less, more = ((routes, 0, len(routes)),), ((routes, 0, len(routes)), ([expert], 0, 1))
    assert model.layer(batch(*less)).total <= model.layer(batch(*more)).total


def test_loads_of_named_models() -> None:
    """One expert of Llama-2-7B, all layers: 94 ms on an A100 and 52 ms on an H100."""
    seconds = {name: CostModel(SHAPES["llama2_7b"], DEVICES[name]).costs().load for name in DEVICES}
    assert seconds["a100"] == pytest.approx(0.094, rel=0.02) and seconds["h100"] == pytest.approx(0.052, rel=0.02)
    assert seconds["v5e"] > seconds["a100"]
    assert SHAPES["mistral_7b"].expert_bytes > SHAPES["llama2_7b"].expert_bytes


def test_costs_of_a_scheduler_follow_the_model() -> None:
    """The scheduler's few figures stay within a third of the model for decode and for long prompts."""
    model = CostModel(SHAPES["llama2_7b"], DEVICES["a100"])
    costs = model.costs()
    for made, tokens, experts in (
        (batch(([2] * 9, 8, 1)), 1, 1),
        (batch(*[([e % 3] * 9, 8, 1) for e in range(16)]), 16, 3),
        (batch(([1] * 2048, 0, 2048)), 2048, 1),
    ):
        modelled = 32 * model.layer(made).total + model.head(1)
        assert costs.compute(tokens, experts) == pytest.approx(modelled, rel=0.33)


def test_bad_figures_name_themselves() -> None:
    with pytest.raises(ConfigError, match=r"Device.link"):
        Device(1e12, 1e12, 0.0)
    with pytest.raises(ConfigError, match=r"Shape.width"):
        Shape(8, 2, 2, 1, 4, 32, 100, width=0.2, permanent=0.25)
