"""Bytes that compiled HLO reads from and writes to HBM: what enters and leaves each fusion, as often as it runs."""

from __future__ import annotations

from readme_jax.plan.hlo import Instruction, Program

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "opt-barrier", "domain",
}  # fmt: skip
_INSIDE = ("fusion", "reduce", "sort", "scatter", "map", "reduce-window", "select-and-scatter", "all-reduce")


def traffic(program: Program) -> float:
    """Bytes of one run. Of an operand that a fusion slices or updates in place, the slice or the update counts."""
    fused = {
        name for c in program.computations.values() for i in c.values() if i.opcode in _INSIDE for name in i.called()
    }
    total = 0.0
    for computation, i, times in program.each():
        if computation not in fused and i.opcode not in _FREE and not i.opcode.endswith(("-start", "-done")):
            total += times * _bytes(program, computation, i)
    return total


def _bytes(program: Program, computation: str, i: Instruction) -> float:
    table = program.computations[computation]
    body = program.computations.get(i.called("calls")[0], {}) if i.opcode == "fusion" else {}
    places = [p for p in body.values() if p.opcode == "parameter"]
    places.sort(key=lambda p: int(p.number))
    total = 0.0
    for n, name in enumerate(i.operands):
        if name not in table:
            continue
        whole = sum(s.bytes for s in table[name].shapes if not s.near)
        total += min(whole, _read(body, places[n].name)) if n < len(places) and whole else _direct(i, n, whole)
    return total + _written(i, body, table)


def _direct(i: Instruction, operand: int, whole: float) -> float:
    if i.opcode in ("dynamic-slice", "gather") and operand == 0:
        return sum(s.bytes for s in i.shapes)
    return 0.0 if i.opcode == "dynamic-update-slice" and operand == 0 else whole


def _read(body: dict[str, Instruction], name: str) -> float:
    """Bytes read of a fusion's parameter: slices alone where nothing else looks at it."""
    users = [u for u in body.values() if name in u.operands]
    total = 0.0
    for u in users:
        if u.opcode == "dynamic-slice" and u.operands[0] == name:
            total += sum(s.bytes for s in u.shapes)
        elif not (u.opcode == "dynamic-update-slice" and u.operands[0] == name):
            return float("inf")
    return total


def _written(i: Instruction, body: dict[str, Instruction], table: dict[str, Instruction]) -> float:
    root = next((b for b in body.values() if b.root), None)
    roots = [body[o] for o in root.operands if o in body] if root and root.opcode == "tuple" else [root or i]
    names = body if root else table
    total = 0.0
    for r, shape in zip(roots, i.shapes, strict=False):
        updated = r.opcode == "dynamic-update-slice" and len(r.operands) > 1 and r.operands[1] in names
        size = sum(s.bytes for s in names[r.operands[1]].shapes) if updated else shape.bytes
        total += 0.0 if shape.near else size
    return total
