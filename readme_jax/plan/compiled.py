"""The real steps of a run, compiled for a TPU topology on a machine without one, and what they need there."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from math import prod
from typing import Any

import jax

from readme_jax import config
from readme_jax.config import MixtureConfig, ModelConfig
from readme_jax.errors import ConfigError, ReadMeError
from readme_jax.models.router import config_for
from readme_jax.models.runtime import runtime_for
from readme_jax.models.sizes import TRAINING, Channels, forward_flops
from readme_jax.parallel.mesh import make_mesh
from readme_jax.plan import flops, hbm, hlo, traffic
from readme_jax.plan.chips import Topology
from readme_jax.refactor.groups import expert_count
from readme_jax.tuning.estimate import PERMANENT
from readme_jax.tuning.schedule import STAGES, Stage, schedule_of
from readme_jax.tuning.stages import Shapes, abstract_arguments, abstract_beside, build_step

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is held
}
LANES = 128  # a TPU lays arrays out in rows of 128: narrower parts of a weight are gathered by an all-reduce instead
_TOO_LARGE = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
_UNIT = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Memory:
    """Bytes of HBM a chip: what a step is given, what it makes and drops, what the run keeps beside it, and what is
    there."""

    arguments: float
    temporaries: float
    beside: float
    available: float

    @property
    def bytes(self) -> float:
        return self.arguments + self.temporaries + self.beside

    @property
    def fits(self) -> bool:
        return self.bytes <= self.available


@dataclass(frozen=True)
class StagePlan:
    """One stage's step on one mesh; FLOPs, bytes and seconds are of one chip and one step."""

    stage: Stage
    memory: Memory
    wanted: float  # FLOPs that the activated parameters and attention take
    even: flops.Flops
    skewed: flops.Flops
    hbm_bytes: float
    moved: dict[str, float]  # bytes received over the interconnect, by collective
    largest: float  # bytes of the largest collective's whole operand
    compute_s: float
    hbm_s: float
    links_s: float
    unknown: int  # loops whose length XLA does not know: counted once

    @property
    def seconds(self) -> float:
        """Roofline: arithmetic or HBM, whichever takes longer, and then the links, nothing of which overlaps."""
        return max(self.compute_s, self.hbm_s) + self.links_s

    @property
    def limit(self) -> str:
        times = {"arithmetic": self.compute_s, "HBM": self.hbm_s, "interconnect": self.links_s}
        return max(times, key=lambda name: times[name])

    @property
    def over_active(self) -> float:
        """Compiled FLOPs over those wanted, recomputation left out."""
        return self.even.once / self.wanted


@dataclass(frozen=True)
class Plan:
    """Both stages of a run on one mesh of one topology."""

    topology: Topology
    mesh: dict[str, int]
    remat: config.Remat
    stages: dict[Stage, StagePlan]
    mfu: float  # of the expert stage: wanted FLOPs at peak over arithmetic and then the links
    mfu_hbm: float  # the same over the step's time, where HBM traffic may take longer than arithmetic
    chip_hours: float  # of all steps; calibration and evaluation are not counted
    layer_experts: float  # bytes of one layer's experts in the compute format
    width: int  # of the model

    @property
    def narrow(self) -> bool:
        """Whether parts of a weight are narrower than a TPU's rows of 128."""
        return self.width < LANES * self.mesh["fsdp"] * self.mesh["expert"]

    @property
    def fits(self) -> bool:
        return all(s.memory.fits for s in self.stages.values())


def mixture_for(run: config.Run, model: ModelConfig, domains: int) -> tuple[MixtureConfig, Channels]:
    """The mixture to compile and its true widths: calibration decides how much is permanent, the paper's share stands
    in for it; widths are padded to Slice.align."""
    experts = expert_count(run.slice, domains)
    width = max(1, round(run.slice.width * model.ffn_dim))
    shared = round(PERMANENT * width) if run.slice.permanent and experts > 1 else 0
    align = run.slice.align
    own, permanent = (-(-n // align) * align for n in (width - shared, shared))
    mixture = MixtureConfig(experts, own, permanent, run.slice.tied, run.slice.top_k)
    return mixture, Channels(experts, width - shared, shared, run.slice.top_k, run.slice.tied)


def topology_devices(topology: Topology) -> list[Any]:
    """Stand-ins for the topology's chips. Raises ConfigError where libtpu, which describes them, is not installed."""
    from jax.experimental import topologies

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return list(topologies.get_topology_desc(topology.name, platform="tpu").devices)
    except Exception as e:  # whatever the plugin raises
        raise ConfigError(
            f"{topology.name} cannot be described here: {str(e).splitlines()[0]}; "
            "install readme-jax[plan] in an environment of its own"
        ) from None


def _bytes_a_chip(tree: Any) -> float:
    """Of abstract arrays laid out on a mesh, what each chip holds."""
    return sum(prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


class Planner:
    """Plans of one run on one topology, a mesh at a time."""

    def __init__(self, run: config.Run, model: ModelConfig, domains: int, topology: Topology) -> None:
        self.run, self.model, self.topology = run, model, topology
        mixture, self.channels = mixture_for(run, model, domains)
        router = config_for(run.router, model, mixture.num_experts)
        self.shapes = Shapes(model, mixture, router, runtime_for(run.model, "tpu"))
        self.devices = topology_devices(topology)

    def plan(self, shape: config.Mesh) -> Plan:
        """Compile both stages on a mesh. Raises ConfigError where it does not suit chips, batches or weights."""
        mesh = make_mesh(shape, self.devices)
        schedule = schedule_of(self.run, self.shapes.mixture.num_experts)
        stages = {stage: self._stage(stage, mesh) for stage in STAGES if schedule.steps(stage)}
        seconds = schedule.rounds * sum(schedule.steps(name) * s.seconds for name, s in stages.items())
        experts = stages.get("experts")
        times = (experts.compute_s + experts.links_s, experts.seconds) if experts else ()
        mfu, mfu_hbm = [experts.wanted / (t * self.topology.chip.flops) for t in times] if experts else (0.0, 0.0)
        mixture = self.shapes.mixture
        layer = mixture.num_experts * 3 * self.model.embed_dim * mixture.expert * self.shapes.runtime.dtype.itemsize
        hours, remat, width = seconds * len(self.devices) / 3600, self.run.model.remat, self.model.embed_dim
        return Plan(self.topology, dict(mesh.shape), remat, stages, mfu, mfu_hbm, hours, layer, width)

    def _stage(self, stage: Stage, mesh: Any) -> StagePlan:
        chip, ways = self.topology.chip, mesh.shape["expert"]
        step = build_step(self.run, self.shapes, stage, mesh)  # outside the mesh, on whose chips nothing can run
        arguments = abstract_arguments(self.run, self.shapes, stage, mesh, step)
        beside = abstract_beside(self.run, self.shapes, stage, mesh)
        with jax.set_mesh(mesh):
            lowered = step.update.lower(*arguments)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as e:
            raise TooLarge(stage, str(e)) from None
        program = hlo.parse(compiled.as_text())
        stats = compiled.memory_analysis()
        even = flops.count(program, flops.even(self.shapes.mixture.num_experts, ways))
        moved: dict[str, float] = {}
        every = traffic.collectives(program, len(self.devices))
        places = [tuple(d.coords) for d in mesh.devices.flat]
        for c in every:
            moved[c.kind] = moved.get(c.kind, 0.0) + c.bytes
        bytes_ = hbm.traffic(program)
        return StagePlan(
            stage,
            Memory(stats.argument_size_in_bytes, stats.temp_size_in_bytes, _bytes_a_chip(beside), chip.hbm),
            self.wanted(stage) / len(self.devices),
            even,
            flops.count(program, flops.SKEWED),
            bytes_,
            moved,
            max((c.whole for c in every), default=0.0),
            even.total / chip.flops,
            bytes_ / chip.hbm_rate,
            sum(traffic.seconds(c, places, self.topology.rates) for c in every),
            len(program.unknown),
        )

    def wanted(self, stage: Stage) -> float:
        """FLOPs of a step on all chips: 6 x active parameters x tokens and attention; of the router stage one dense
        forward pass without its head."""
        length = self.run.data.sequence_length
        if stage == "router":
            tokens = self.run.router_stage.batch * length
            return tokens * forward_flops(self.model, self.model.ffn_dim, length, head=False)
        return self.run.expert_stage.batch * length * TRAINING * forward_flops(self.model, self.channels.active, length)


class TooLarge(ReadMeError):
    """A step that does not fit the chip's HBM, by the compiler's word."""

    def __init__(self, stage: Stage, message: str) -> None:
        found = _TOO_LARGE.search(message)
        if found:
            used, there = (float(found[n]) * _UNIT[found[n + 1]] for n in (1, 3))
            said = f"needs {used / 1e9:.1f} GB of {there / 1e9:.1f} GB"
        else:
            said = message.splitlines()[0]
        super().__init__(
            f"the {stage} step does not fit a chip: {said}; raise ExpertStage.accumulate, set Model.remat = 'full', or "
            "spread weights further (Mesh.fsdp, Mesh.tensor)"
        )
