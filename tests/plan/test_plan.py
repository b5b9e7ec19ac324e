"""Chips, mesh shapes and the command's checks; plans themselves need libtpu and are tested where it is installed."""

from __future__ import annotations

import importlib.util
import math

import pytest
from rich.console import Console

from readme_jax import config
from readme_jax.checkpoints.known import shape_of
from readme_jax.config import MixtureConfig, ModelConfig
from readme_jax.errors import ConfigError
from readme_jax.plan.chips import topology
from readme_jax.plan.compiled import Planner, TooLarge, mixture_for
from readme_jax.plan.report import row, show
from readme_jax.plan.sweep import shapes

LLAMA = shape_of("meta-llama/Llama-2-7b-hf")
RUN = config.Run(slice=config.Slice(align=128), expert_stage=config.ExpertStage(batch=128))


def test_links_of_rings_and_lines():
    assert topology("v5p:4x4x4").rates == (1.8e11,) * 3
    assert topology("v5e:16x8").rates == (9e10, 4.5e10)
    for name in ("v9:4x4", "v5p", "v5p:4"):
        with pytest.raises(ConfigError, match="v5p:4x4x4"):
            topology(name)


def test_the_mixture_that_stands_in_for_a_calibrated_one():
    mixture, channels = mixture_for(RUN, LLAMA, 7)
    assert mixture == MixtureConfig(7, 3072, 2560)  # the paper's 23% of F, padded to 128
    assert channels.active == LLAMA.ffn_dim / 2


@pytest.mark.parametrize("chips", [64, 256])
def test_every_mesh_of_a_sweep_divides_batches_and_weights(chips):
    mixture, _ = mixture_for(RUN, LLAMA, 7)
    found = shapes(RUN, LLAMA, mixture, chips)
    assert found
    for m in found:
        assert math.prod((m.data, m.fsdp, m.expert, m.tensor)) == chips
        assert 64 % (m.data * m.fsdp * m.expert) == 0 and 4096 % (m.fsdp * m.expert * 128) == 0
        assert 32 % m.tensor == 0
    assert any(m.expert > 1 for m in found) and len(set(map(str, found))) == len(found)


def test_too_large_says_by_how_much():
    error = TooLarge("experts", "RESOURCE_EXHAUSTED: XLA: Ran out of memory. Used 20.00G of 15.75G hbm. Exceeded")
    assert "the experts step does not fit a chip: needs 21.5 GB of 16.9 GB" in str(error)
    assert "ExpertStage.accumulate" in str(error)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra [plan]")
def test_a_plan_of_a_small_model():
    model = ModelConfig(1024, 512, 4, 4, 4, 128, 2048)
    run = config.Run(
        model=config.Model(compute_dtype="bfloat16", layout="scanned", remat="full"),
        data=config.Data(sequence_length=512),
        slice=config.Slice(align=128),
        router_stage=config.RouterStage(steps=2, batch=8),
        expert_stage=config.ExpertStage(steps=2, batch=8),
    )
    planner = Planner(run, model, 7, topology("v5e:2x2"))
    plan = planner.plan(config.Mesh(fsdp=4))
    experts, router = plan.stages["experts"], plan.stages["router"]
    assert plan.fits and 0 < plan.mfu < 1 and plan.chip_hours > 0
    assert experts.over_active >= 1.0 and experts.even.again > 0 and experts.skewed.once <= experts.even.once
    assert 1.0 <= router.over_active < 1.5
    assert set(experts.moved) >= {"all-gather"} and experts.memory.arguments > 0
    console = Console(record=True, width=120)
    show(plan, console)
    assert "MFU" in console.export_text() and row(plan)["fits"]
