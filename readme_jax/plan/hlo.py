"""Compiled HLO text as instructions by computation, with how often each computation runs.

`cost_analysis()` counts a loop's body once. Here bodies are counted as often as they run; `Program.unknown` names loops
whose length data decide, which count once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip

_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|called_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_METADATA = re.compile(r"(kernel_metadata=\{)\n[^\n]*\n(\}\})")  # of a kernel: JSON on a line of its own
_SAME = ("copy", "bitcast", "convert")  # the same number
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True)
class Shape:
    """An array's number format and dimensions; `near`: held in the core's own memory, not in HBM."""

    dtype: str
    dims: tuple[int, ...]
    near: bool = False

    @property
    def bytes(self) -> float:
        """Bytes without padding."""
        return prod(self.dims) * BYTES.get(self.dtype, 0)


@dataclass
class Instruction:
    """One line of a computation: `shapes` has an entry an array of the result."""

    name: str
    opcode: str
    shapes: list[Shape]
    operands: list[str]
    attributes: str
    root: bool
    number: str = ""  # of a parameter

    @property
    def op_name(self) -> str:
        """Where in the program it comes from, as JAX names it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, *kinds: str) -> list[str]:
        """Names of the computations it calls, of these kinds (all where none is given)."""
        names: list[str] = []
        for kind, several, one in _CALLED.findall(self.attributes):
            if not kinds or kind in kinds:
                names += [n.strip().lstrip("%") for n in (several or one).split(",")]
        return names


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def _instruction(line: str) -> Instruction | None:
    named = _NAME.match(line)
    if named is None:
        return None
    rest = line[named.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    closing = _closing(rest, opening)
    arrays = [Shape(d, tuple(int(x) for x in s.split(",") if x), "S(1)" in at) for d, s, at in _ARRAY.findall(kind)]
    operands = re.findall(r"%([\w.\-]+)", rest[opening:closing])
    root, number = "ROOT " in line[: named.end()], rest[opening + 1 : closing]
    return Instruction(named[1], rest[:opening], arrays, operands, rest[closing + 1 :], root, number)


@dataclass
class Program:
    """A compiled module: instructions by computation and name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    @cached_property
    def unknown(self) -> list[str]:
        """Loops (by instruction name) whose length XLA does not know."""
        loops = ((n, i) for n, c in self.computations.items() for i in c.values() if i.opcode == "while")
        return [i.name for n, i in loops if self.trips(n, i) is None]

    @cached_property
    def runs(self) -> dict[str, float]:
        """How often each computation runs, fused ones included. Branches of a conditional count fully, each."""
        counts: dict[str, float] = defaultdict(float)
        order = self._order()
        counts[self.entry] = 1
        for name in order:
            for i in self.computations[name].values():
                times = counts[name]
                if i.opcode == "while":
                    trips = self.trips(name, i)
                    times *= 1 if trips is None else trips
                for called in i.called():
                    counts[called] += times
        return counts

    def trips(self, computation: str, loop: Instruction) -> int | None:
        """How often a loop's body runs, None where data decide: XLA's word, or else how many steps take the counter of
        its condition from where it starts to its bound."""
        found = _TRIPS.search(loop.attributes)
        if found:
            return int(found[1])
        condition = self.computations[loop.called("condition")[0]]
        root = _root(condition)
        # of a fusion, the operands are the counter and the bound
        compare = _root(self.computations[root.called("calls")[0]]) if root.opcode == "fusion" else root
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return None
        body, begins = self.computations[loop.called("body")[0]], self.computations[computation]
        start, first, step, bound = begins.get(loop.operands[0]), None, None, None
        for i in (condition[o] for o in root.operands):
            at = _index(i)
            if at is None:
                bound = _constant(condition, i.name)
            elif start is not None and start.opcode == "tuple":
                value, added = _constant(begins, start.operands[at]), self._added(body, _root(body).operands[at], at)
                if added == 0:
                    bound = value
                else:
                    first, step = value, added
        if first is None or bound is None or not step:
            return None
        return max(0, -(-(bound - first) // step))

    def _added(self, body: dict[str, Instruction], name: str, at: int) -> int | None:
        """What a loop's body adds to the entry `at` of what it carries, `name` being that entry's new value; None where
        it does something else than add constants."""
        i = body[name]
        if i.opcode in _SAME:
            return self._added(body, i.operands[0], at)
        if i.opcode == "get-tuple-element":
            return 0 if _index(i) == at and body[i.operands[0]].opcode == "parameter" else None
        operands, outer = i.operands, body
        if i.opcode == "fusion":
            inner = self.computations[i.called("calls")[0]]
            i = _root(inner)
            places = {n: operands[int(p.number)] for n, p in inner.items() if p.opcode == "parameter"}
            outer = body | {n: p for n, p in inner.items() if n not in places}
            operands = [places.get(o, o) for o in i.operands]
        if i.opcode != "add":
            return None
        constants = [_constant(outer, o) for o in operands]
        carried = [o for o, c in zip(operands, constants, strict=True) if c is None]
        before = self._added(body, carried[0], at) if len(carried) == 1 and carried[0] in body else None
        return None if before is None else before + sum(c for c in constants if c is not None)

    def _order(self) -> list[str]:
        """Computations, callers first."""
        done: list[str] = []
        seen: set[str] = set()

        def visit(name: str) -> None:
            if name in seen or name not in self.computations:
                return
            seen.add(name)
            for i in self.computations[name].values():
                for called in i.called():
                    visit(called)
            done.append(name)

        visit(self.entry)
        return done[::-1]

    def each(self) -> Iterator[tuple[str, Instruction, float]]:
        """Every instruction that runs: its computation, itself, how often."""
        for name, times in self.runs.items():
            for i in self.computations.get(name, {}).values():
                yield name, i, times

    def shapes(self, computation: str, i: Instruction) -> list[Shape]:
        """First (or only) array of each operand."""
        table = self.computations[computation]
        return [table[o].shapes[0] for o in i.operands if o in table and table[o].shapes]


def _root(computation: dict[str, Instruction]) -> Instruction:
    return next(i for i in computation.values() if i.root)


def _index(i: Instruction) -> int | None:
    """Which entry of a tuple it takes, None of anything else."""
    found = re.search(r"index=(\d+)", i.attributes) if i.opcode == "get-tuple-element" else None
    return int(found[1]) if found else None


def _constant(table: dict[str, Instruction], name: str) -> int | None:
    i = table.get(name)
    while i is not None and i.opcode in _SAME:
        i = table.get(i.operands[0])
    whole = i is not None and i.opcode == "constant" and re.fullmatch(r"-?\d+", i.number)
    return int(i.number) if i is not None and whole else None


def parse(text: str) -> Program:
    """The text of `compiled.as_text()`. Raises ValueError where it has no entry computation."""
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] | None = None
    entry = ""
    for line in _METADATA.sub(r"\1\2", text).splitlines():
        head = _HEAD.match(line) if line.endswith("{") else None
        if head:
            current = computations.setdefault(head[1], {})
            entry = head[1] if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (i := _instruction(line)):
            current[i.name] = i
    if not entry:
        raise ValueError("no entry computation in the compiled HLO")
    return Program(computations, entry)
