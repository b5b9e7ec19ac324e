"""Chips, mesh shapes and the command's checks; plans themselves need libtpu and are tested where it is installed."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
from rich.console import Console

from readme_jax import config
from readme_jax.checkpoints.known import shape_of
from readme_jax.cli import plan as cli
from readme_jax.cli.plan import recommend
from readme_jax.config import MixtureConfig, ModelConfig
from readme_jax.errors import ConfigError
from readme_jax.plan import flops
from readme_jax.plan.chips import topology
from readme_jax.plan.compiled import Memory, Plan, Planner, StagePlan, TooLarge, mixture_for
from readme_jax.plan.report import mesh_name, row, show
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


def made(fsdp: int, temporaries: float, hours: float) -> Plan:
    """A plan of an expert stage on a mesh of 64 chips of 32 GB."""
    none = flops.Flops(1.0, 0.0)
    stage = StagePlan("experts", Memory(4e9, temporaries, 1e9, 32e9), 1.0, none, none, 1.0, {}, 1.0, 1.0, 1.0, 1.0, 0)
    mesh = {"data": 64 // fsdp, "fsdp": fsdp, "expert": 1, "tensor": 1}
    return Plan(topology("v6e:8x8"), mesh, "dots", {"experts": stage}, 0.4, 0.4, hours, 1.0, 4096)


def test_the_cheapest_that_fits_is_recommended():
    console = Console(record=True, width=200)
    plans = [made(8, 40e9, 1.0), made(32, 20e9, 30.0), made(16, 25e9, 20.0)]
    assert recommend(plans, console) is plans[2]
    assert "recommended: data 4 x fsdp 16 (20 chip-hours): Mesh.data = 4, Mesh.fsdp = 16" in console.export_text()
    with pytest.raises(ConfigError, match="no mesh of the sweep fits"):
        recommend(plans[:1], console)


def test_a_mesh_that_cuts_weights_too_narrow_is_warned_of():
    for fsdp, warned in ((32, False), (64, True)):
        console = Console(record=True, width=200)
        show(made(fsdp, 1e9, 1.0), console)
        assert ("leaves each chip 64 of the model width, under 128" in console.export_text()) == warned


SMALL = ModelConfig(1024, 512, 4, 4, 4, 128, 2048)
SMALL_RUN = config.Run(
    model=config.Model(compute_dtype="bfloat16", layout="scanned", remat="full"),
    data=config.Data(sequence_length=512, domains=tuple("abcdefg")),
    slice=config.Slice(align=128),
    router_stage=config.RouterStage(steps=2, batch=8),
    expert_stage=config.ExpertStage(steps=2, batch=8),
)
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra [plan]")


@needs_libtpu
def test_a_sweep_of_a_small_model(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "load_run", lambda *_: SMALL_RUN)
    monkeypatch.setattr(cli, "check_model", lambda _: SMALL)
    console, out = Console(record=True, width=200), tmp_path / "rows.json"
    plans = cli.plan("v5e:2x2", [], [], 3, str(out), console)
    assert len({str(p.mesh) for p in plans}) == 3 and all(p.fits for p in plans)
    best = min(plans, key=lambda p: p.chip_hours)
    assert f"recommended: {mesh_name(best.mesh)} " in console.export_text()
    assert [r["mesh"] for r in json.loads(out.read_text())["rows"]] == [p.mesh for p in plans]


@needs_libtpu
def test_a_plan_of_a_small_model():
    plan = Planner(SMALL_RUN, SMALL, 7, topology("v5e:2x2")).plan(config.Mesh(fsdp=4))
    experts, router = plan.stages["experts"], plan.stages["router"]
    assert plan.fits and 0 < plan.mfu < 1 and plan.chip_hours > 0
    assert experts.over_active >= 1.0 and experts.even.again > 0 and experts.skewed.once <= experts.even.once
    assert 1.0 <= router.over_active < 1.5
    assert set(experts.moved) >= {"all-gather"} and experts.memory.arguments > 0
    console = Console(record=True, width=120)
    show(plan, console)
    assert "MFU" in console.export_text() and row(plan)["fits"]
