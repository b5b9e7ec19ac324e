"""FLOPs of matmuls in compiled HLO: dots, the convolutions that a TPU makes of them, and Pallas kernels by formula."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

from readme_jax.models import attention_tpu
from readme_jax.models.grouped_tpu import tile_rows, tile_width
from readme_jax.plan.hlo import Instruction, Program, Shape


@dataclass(frozen=True)
class Rows:
    """How rows of a grouped matmul fall to experts, as a share of the rows that it is given.

    `covered`: rows that have an expert on this device; `borders`: tiles that two experts share, computed twice.
    """

    covered: float = 1.0
    borders: int = 0


def even(experts: int, ways: int = 1) -> Rows:
    """Rows spread evenly: over an expert axis of X devices each has 1/X of its group's."""
    return Rows(1 / ways, -(-experts // ways) - 1)


SKEWED = Rows()  # all rows to one expert: the device that has it computes all of its group's


@dataclass(frozen=True)
class Flops:
    """Matmul FLOPs of one device: what the step asks for, and what its backward pass computes a second time."""

    once: float
    again: float

    @property
    def total(self) -> float:
        return self.once + self.again


def count(program: Program, rows: Rows) -> Flops:
    """FLOPs of a program run once, with loops as often as they run."""
    once = again = 0.0
    for computation, i, times in program.each():
        flops = times * instruction_flops(i, program.shapes(computation, i), rows)
        share = _again(i)
        once += flops * (1 - share)
        again += flops * share
    return Flops(once, again)


def _again(i: Instruction) -> float:
    """Share of an instruction's FLOPs that was computed before."""
    if "rematted_computation" in i.op_name:
        return 1.0
    backward = i.name.startswith("splash_mha_dkv")
    return attention_tpu.AGAIN / attention_tpu.BACKWARD if backward else 0.0


def instruction_flops(i: Instruction, operands: list[Shape], rows: Rows) -> float:
    """FLOPs of one instruction; zero for anything but a matmul."""
    if i.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
        inner = prod(operands[0].dims[int(d)] for d in axes[1].split(",") if d) if axes else 1
        return 2.0 * prod(i.shapes[0].dims) * inner
    if i.opcode == "convolution":
        return _convolution(i, operands)
    if i.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in i.attributes:
        return _attention(i, operands) if i.name.startswith("splash_mha") else _grouped(i, operands, rows)
    return 0.0


def _attention(i: Instruction, operands: list[Shape]) -> float:
    """A splash kernel: matmuls of its blocks. Its first operand of floats is the queries, [H, T, h] or [B, H, T, h]."""
    *each, length, width = next(s.dims for s in operands if s.dtype in ("bf16", "f32"))
    matmuls = attention_tpu.FORWARD if i.name.startswith("splash_mha_fwd") else attention_tpu.BACKWARD
    return 2.0 * matmuls * prod(each) * attention_tpu.computed(length) * width


def _grouped(i: Instruction, operands: list[Shape], rows: Rows) -> float:
    """A megablox kernel: gmm [M, K] x [E, .., ..] -> [M, N], or tgmm [K, M] x [M, N] -> [E, K, N], in whole tiles."""
    out = i.shapes[0]
    wide = [s for s in operands if s.dtype in ("bf16", "f32")]
    if "gmm" not in i.op_name or len(wide) < 2:
        raise ValueError(f"{i.name}: a kernel without a formula ({i.op_name})")
    if len(out.dims) == 2:
        (m, k), n = wide[0].dims, out.dims[1]
    else:
        (k, n), m = out.dims[1:], wide[1].dims[0]
    dtype = "bfloat16" if wide[0].dtype == "bf16" else "float32"
    whole = [size + -size % tile_width(size, dtype) for size in (k, n)]
    return 2.0 * (m * rows.covered + rows.borders * tile_rows(m)) * prod(whole)


def _convolution(i: Instruction, operands: list[Shape]) -> float:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    if labels is None:
        raise ValueError(f"{i.name}: a convolution without dim_labels")
    left, right, out = labels[1], labels[2], labels[3]
    sizes = [dict(zip(names, s.dims, strict=True)) for names, s in ((left, operands[0]), (right, operands[1]))]
    result = dict(zip(out, i.shapes[0].dims, strict=True))
    spatial = sorted(c for c in left if c.isdigit())
    window = _window(i.attributes, len(spatial))
    places = prod(_pairs(sizes[0][c], sizes[1][c], result[c], w) for c, w in zip(spatial, window, strict=True))
    return 2.0 * result["b"] * result["f"] * sizes[1]["i"] * places


def _window(attributes: str, count: int) -> list[tuple[int, int, int, int]]:
    """Stride, low padding, dilation of the left side and of the right side, a spatial dimension."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    entries = dict(e.split("=") for e in found[1].split()) if found else {}

    def values(name: str, default: str) -> list[str]:
        return entries[name].split("x") if name in entries else [default] * count

    stride, pad = values("stride", "1"), values("pad", "0_0")
    left, right = values("lhs_dilate", "1"), values("rhs_dilate", "1")
    return [(int(stride[d]), int(pad[d].split("_")[0]), int(left[d]), int(right[d])) for d in range(count)]


def _pairs(inputs: int, kernel: int, outputs: int, window: tuple[int, int, int, int]) -> int:
    """Pairs of output and kernel positions that meet an input which is neither padding nor a hole of dilation."""
    stride, low, left, right = window
    total = 0
    for k in range(kernel):
        for o in range(outputs):
            at = o * stride - low + k * right
            total += at % left == 0 and 0 <= at // left < inputs
    return total
