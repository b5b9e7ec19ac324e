"""Where a program's device time goes: kernels of a profile, by the named scope of the operation they belong to.

While a profile is taken XLA launches kernels one by one in place of whole CUDA graphs: their own times are as in a
normal run and the gaps between them are not.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import jax

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$", re.MULTILINE)
_PATH = re.compile(r'op_name="([^"]*)"')
_OPERANDS = re.compile(r"\s[a-z][\w\-]*\(([^()]*)\)")
_KERNEL = re.compile(r'name = \\?"(\w+)\\?"')  # of a Pallas kernel, in its call's configuration


def scopes(program: Any, names: Sequence[str]) -> dict[str, Counter[str]]:
    """For each instruction of a compiled program, and for each of its Pallas kernels, the innermost of `names` that it
    was written under (else `rest`), and how often: equal kernels of several instructions are one. What a pass of the
    compiler made, and no line of the source names, has the scope of its first operand that has one."""
    texts = dict(_INSTRUCTION.findall(program.as_text()))
    known: dict[str, tuple[str | None, str]] = {}
    found: dict[str, Counter[str]] = {}
    for instruction, text in texts.items():
        scope, path = _scope(instruction, texts, names, known)
        if scope is None:
            continue
        own = [instruction]
        before, _, after = text.partition(f'op_name="{path}"')
        if "triton" in before:  # such a kernel has its own name, not its instruction's
            own += _KERNEL.findall(after)[:1] or path.removesuffix("/pallas_call").split("/")[-1:]
        for name in own:
            found.setdefault(_plain(name), Counter())[scope] += 1
    return found


def _scope(
    instruction: str, texts: Mapping[str, str], names: Sequence[str], known: dict[str, tuple[str | None, str]]
) -> tuple[str | None, str]:
    """The scope of an instruction, None where nothing tells it, and its own path; `known` remembers."""
    if instruction not in known:
        text, known[instruction] = texts.get(instruction, ""), (None, "")
        if path := _PATH.search(text):
            inside = [part for part in re.split(r"[/()]", path[1]) if part in names]
            known[instruction] = (inside[-1] if inside else "rest"), path[1]
        elif operands := _OPERANDS.search(text):
            scopes_ = (_scope(each, texts, names, known)[0] for each in re.findall(r"%([\w.\-]+)", operands[1]))
            known[instruction] = next((scope for scope in scopes_ if scope in names), None), ""
    return known[instruction]


def _plain(name: str) -> str:
    """As kernels of an instruction are named."""
    return re.sub(r"\W", "_", name)


def _of(names: Sequence[str], by: Mapping[str, Counter[str]]) -> Counter[str]:
    """The scopes of a kernel, by the first of its names that is known, with or without the number of a part."""
    for name in map(_plain, names):
        for known in (name, re.sub(r"_\d+$", "", name)):
            if known in by:
                return by[known]
    return Counter(unknown=1)


def device_seconds(
    run: Callable[[], Any], by: Mapping[str, Counter[str]], plane: str = "/device:GPU"
) -> tuple[Counter, Counter]:
    """Seconds of kernels while `run` runs, by scope and by kernel. `by`: from `scopes`; others count as `unknown`."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_serialized_xspace(path.read_bytes())
    scope, kernels = Counter[str](), Counter[str]()
    lost: dict[tuple[str, str], float] = {}
    for each in data.planes:
        if not each.name.startswith(plane):
            continue
        for line in each.lines:
            if plane.endswith("GPU") and not line.name.startswith("Stream"):
                continue  # lines that repeat the kernels, by module or by operation
            for event in line.events:
                seconds, stats = event.duration_ns / 1e9, {str(name): value for name, value in event.stats if name}
                operation = str(stats.get("hlo_op", ""))
                found = _of((event.name, operation), by)
                for part, count in found.items():
                    scope[part] += seconds * count / found.total()
                if "unknown" in found:
                    lost[event.name, operation] = lost.get((event.name, operation), 0.0) + seconds
                kernels[event.name] += seconds
    if by and lost:
        show_lost(lost, by)
    return scope, kernels


def show_lost(lost: Mapping[tuple[str, str], float], by: Mapping[str, Any]) -> None:
    """Print the longest kernels of no known instruction, with the operation that the profile names, and the most alike
    of the known names."""
    for (name, operation), seconds in sorted(lost.items(), key=lambda row: -row[1])[:8]:
        alike = get_close_matches(_plain(name), by, 3, 0.0)
        print(f"no instruction of kernel {name} ({operation}), {1e3 * seconds:.3f} ms; known: {alike}", flush=True)
