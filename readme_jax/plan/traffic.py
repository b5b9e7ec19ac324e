"""What collectives of compiled HLO move between chips, and how long that takes at the links' peak."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from readme_jax.plan.hlo import Instruction, Program, Shape

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}")
_LISTS = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}")


@dataclass(frozen=True)
class Collective:
    """One collective: its kind, the first of the groups of partitions that take part, bytes of its largest whole
    operand, bytes that a chip receives each time, and how often it runs."""

    kind: str
    group: tuple[int, ...]
    whole: float
    received: float
    times: float
    op_name: str

    @property
    def bytes(self) -> float:
        return self.received * self.times


def collectives(program: Program, devices: int) -> list[Collective]:
    """Every collective of more than one device. One that a TPU runs in parts, each beside other work, is named in every
    fusion of its chain and counts once."""
    found, seen = [], set()
    for computation, i, times in program.each():
        kind = i.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        chain = _CHAIN.search(i.attributes)
        if chain:
            key = (re.findall(r"channel_id=(\d+)", i.attributes)[0], chain[1])
            if key in seen:
                continue
            seen.add(key)
        group = groups(i.attributes, devices)[0]
        if len(group) > 1:
            whole, received = _moved(_kind(program, computation, i, kind), len(group), program.shapes(computation, i))
            found.append(Collective(_kind(program, computation, i, kind), group, whole, received, times, i.op_name))
    return found


def _kind(program: Program, computation: str, i: Instruction, kind: str) -> str:
    """A TPU writes a reduce-scatter as an all-reduce with its slice in one fusion of that name."""
    return "reduce-scatter" if kind == "all-reduce" and "all-reduce-scatter" in computation else kind


def _moved(kind: str, ways: int, operands: list[Shape]) -> tuple[float, float]:
    size = sum(s.bytes for s in operands)
    if kind == "all-gather":
        return size * ways, size * (ways - 1)
    if kind == "all-reduce":
        return size, 2 * size * (ways - 1) / ways
    if kind == "collective-permute":
        return size, size
    return size, size * (ways - 1) / ways


def groups(attributes: str, devices: int) -> list[tuple[int, ...]]:
    """Groups of partitions that exchange data, from an instruction's attributes."""
    if found := _PAIRS.search(attributes):
        return [tuple(int(x) for x in pair.split(",")) for pair in re.findall(r"\{(\d+,\d+)\}", found[1])]
    if found := _IOTA.search(attributes):
        shape = [int(x) for x in found[1].split(",")]
        return [tuple(int(x) for x in row) for row in _iota(found[2], found[3]).reshape(shape)]
    if found := _MESH.search(attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        over = re.findall(r"'([^']+)'", found[4])
        ids = _iota(found[2] or str(prod(sizes.values())), found[3]).reshape(list(sizes.values()))
        names = list(sizes)
        order = [names.index(n) for n in names if n not in over] + [names.index(n) for n in over]
        rows = ids.transpose(order).reshape(-1, prod(sizes[n] for n in over))
        return [tuple(int(x) for x in row) for row in rows]
    if found := _LISTS.search(attributes):
        return [tuple(int(x) for x in g.split(",") if x) for g in re.findall(r"\{([\d,]*)\}", found[1])]
    return [tuple(range(devices))]


def _iota(dims: str, order: str | None) -> np.ndarray:
    """Partitions counted up in an array of `dims`, its axes then put in `order`."""
    ids = np.arange(prod(int(x) for x in dims.split(","))).reshape([int(x) for x in dims.split(",")])
    return ids.transpose([int(x) for x in order.split(",")]) if order else ids


def seconds(each: Collective, coordinates: Sequence[tuple[int, ...]], rates: Sequence[float]) -> float:
    """Time of a collective at peak: its group uses every axis of the torus along which its chips differ."""
    places = np.array([coordinates[p][: len(rates)] for p in each.group])
    spans = [len(set(places[:, a])) > 1 for a in range(len(rates))]
    rate = sum(r for r, used in zip(rates, spans, strict=True) if used)
    return each.bytes / rate if rate else 0.0
