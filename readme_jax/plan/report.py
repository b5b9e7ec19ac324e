"""A plan as text and as a row of a result."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from readme_jax.plan.compiled import LANES, Memory, Plan, StagePlan


def row(plan: Plan) -> dict[str, Any]:
    """A plan as one row: FLOPs ratios, MFU and chip-hours are dimensionless, dimensionless and hours."""
    stages = plan.stages
    return {
        "topology": plan.topology.name,
        "mesh": plan.mesh,
        "remat": plan.remat,
        "fits": plan.fits,
        "hbm_bytes": max(s.memory.bytes for s in stages.values()),
        "flops_over_active": stages["experts"].over_active if "experts" in stages else None,
        "router_over_dense": stages["router"].over_active if "router" in stages else None,
        "mfu": plan.mfu,
        "mfu_hbm": plan.mfu_hbm,
        "chip_hours": plan.chip_hours,
        "largest_collective_over_layer": max(s.largest for s in stages.values()) / plan.layer_experts,
        "stages": {name: _stage(s) for name, s in stages.items()},
    }


def _stage(s: StagePlan) -> dict[str, Any]:
    return {
        "arguments_bytes": s.memory.arguments,
        "temporaries_bytes": s.memory.temporaries,
        "beside_bytes": s.memory.beside,
        "flops_wanted": s.wanted,
        "flops_even": s.even.once,
        "flops_skewed": s.skewed.once,
        "flops_again": s.even.again,
        "hbm_traffic_bytes": s.hbm_bytes,
        "moved_bytes": s.moved,
        "seconds": {"arithmetic": s.compute_s, "hbm": s.hbm_s, "interconnect": s.links_s, "step": s.seconds},
        "limit": s.limit,
    }


def mesh_name(mesh: dict[str, int]) -> str:
    """`data 2 x fsdp 32`: the axes of more than one device."""
    return " x ".join(f"{a} {n}" for a, n in mesh.items() if n > 1) or "one device"


def show(plan: Plan, console: Console) -> None:
    """Print one plan."""
    chip = plan.topology.chip
    fits = "fits" if plan.fits else "DOES NOT FIT"
    console.print(f"{plan.topology.name}, mesh {mesh_name(plan.mesh)}, remat {plan.remat}: {fits}")
    console.print(
        f"peaks a chip: {chip.flops / 1e12:g} TFLOP/s bf16, HBM {chip.hbm / 1e9:g} GB at {chip.hbm_rate / 1e9:g} GB/s, "
        f"links {' + '.join(f'{r / 1e9:g}' for r in plan.topology.rates)} GB/s"
    )
    table = Table()
    table.add_column("one step, one chip")
    for name in plan.stages:
        table.add_column(f"{name} stage", justify="right")
    stages = list(plan.stages.values())
    for label, cells in _lines(stages):
        table.add_row(label, *cells)
    console.print(table)
    if plan.narrow:
        ways = plan.mesh["fsdp"] * plan.mesh["expert"]
        console.print(
            f"warning: fsdp x expert = {ways} leaves each chip {plan.width // ways} of the model width, under {LANES}: "
            "XLA makes gathers of all-reduces, at twice the traffic; give more of the mesh to data or tensor"
        )
    unknown = sum(s.unknown for s in stages)
    if unknown:
        console.print(f"{unknown} loops of a length that data decide are counted once")
    largest = max(s.largest for s in stages) / plan.layer_experts
    console.print(f"largest collective: {largest:.2f} of one layer's experts ({plan.layer_experts / 1e9:.2f} GB)")
    console.print(
        f"MFU of the expert stage on activated FLOPs {plan.mfu:.1%} (arithmetic, then the links, not overlapped), "
        f"{plan.mfu_hbm:.1%} where HBM traffic may take longer than arithmetic; the recipe's steps take at the latter "
        f"{plan.chip_hours:,.0f} chip-hours "
        f"({plan.chip_hours / _chips(plan):.1f} h), calibration and evaluation not counted"
    )


def _chips(plan: Plan) -> int:
    count = 1
    for size in plan.mesh.values():
        count *= size
    return count


def _lines(stages: list[StagePlan]) -> list[tuple[str, list[str]]]:
    kinds = sorted({kind for s in stages for kind in s.moved})
    each = [
        ("HBM, arguments", [_gb(s.memory.arguments) for s in stages]),
        ("HBM, temporaries", [_gb(s.memory.temporaries) for s in stages]),
        ("HBM, kept beside", [_gb(s.memory.beside) for s in stages]),
        ("HBM, left", [_left(s.memory) for s in stages]),
        ("TFLOP wanted", [f"{s.wanted / 1e12:.2f}" for s in stages]),
        ("TFLOP compiled, even routes", [f"{s.even.once / 1e12:.2f} ({s.over_active:.3f}x)" for s in stages]),
        ("TFLOP compiled, all routes one", [f"{s.skewed.once / 1e12:.2f}" for s in stages]),
        ("TFLOP computed again", [f"{s.even.again / 1e12:.2f}" for s in stages]),
        *((f"moved, {kind}", [_gb(s.moved.get(kind, 0.0)) for s in stages]) for kind in kinds),
        ("arithmetic", [f"{s.compute_s:.3f} s" for s in stages]),
        ("HBM traffic", [f"{s.hbm_s:.3f} s" for s in stages]),
        ("interconnect", [f"{s.links_s:.3f} s" for s in stages]),
        ("step", [f"{s.seconds:.3f} s, {s.limit} binds" for s in stages]),
    ]
    return each


def _left(memory: Memory) -> str:
    return f"{(memory.available - memory.bytes) / 1e9:.1f} GB of {memory.available / 1e9:.0f}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
