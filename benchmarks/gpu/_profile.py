"""Where a program's device time goes: kernels of a profile, by the named scope of the operation they belong to.

While a profile is taken XLA launches kernels one by one in place of whole CUDA graphs: their own times are as in a
normal run and the gaps between them are not.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', re.MULTILINE)


def scopes(program: Any, names: Sequence[str]) -> dict[str, str]:
    """The innermost of `names` that each instruction of a compiled program was written under; kernels of it are named
    like it, with dots made underscores."""
    found = {}
    for instruction, path in _INSTRUCTION.findall(program.as_text()):
        inside = [part for part in re.split(r"[/()]", path) if part in names]
        found[instruction.replace(".", "_").replace("-", "_")] = inside[-1] if inside else "rest"
    return found


def device_seconds(
    run: Callable[[], Any], by: Mapping[str, str], plane: str = "/device:GPU"
) -> tuple[Counter, Counter]:
    """Seconds of kernels while `run` runs, by scope and by kernel. `by`: from `scopes`; others count as `unknown`."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_serialized_xspace(path.read_bytes())
    scope, kernels = Counter[str](), Counter[str]()
    for each in data.planes:
        if not each.name.startswith(plane):
            continue
        for line in each.lines:
            if plane.endswith("GPU") and not line.name.startswith("Stream"):
                continue  # lines that repeat the kernels, by module or by operation
            for event in line.events:
                stats = {str(name): value for name, value in event.stats if name}
                operation = str(stats.get("hlo_op", event.name)).replace(".", "_").replace("-", "_")
                scope[by.get(operation, "unknown")] += event.duration_ns / 1e9
                kernels[event.name] += event.duration_ns / 1e9
    return scope, kernels
