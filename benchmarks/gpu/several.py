"""Several GPUs of one host: serving and training over all of them against one: `python benchmarks/gpu/several.py`.

`serving`: Llama-2-7B's shape, random bf16 weights, seven experts of half the width, all resident. Decode steps and a
prompt's prefill on one GPU, with weights cut over all (`tensor`), and with experts handed out (`expert`), in turns;
tokens are of one expert, or go where a tuned router sends real text (results/routes.npz). `over_limit` is the time over
that of its bytes (decode: weights of the experts present, attention, head, caches) or FLOPs (prefill) on all devices
together, at the copy bandwidth and matmul rate of one in the same run. `moved` are the bytes that a device receives in
a layer, from the compiled program; `all_to_all` what a layer-wise router's exchange of tokens would move instead: 2
(there and back) x N / n tokens of a device x D values of 2 bytes x (n - 1) / n.

`exact`: a checkpoint's greedy tokens in float32 (`--checkpoint`), all devices against one. `training`: expert steps at
sequence 4096 with weights spread over all (fsdp) against one GPU; a checkpoint saved there, restored on one.

Rows go to results/several_gpus.json as they are measured; parts that do not run keep theirs, and so do machines of
another number of GPUs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import _several_exact
import _several_serving
import _several_training
import jax
from _report import RESULTS, command, commit, show_rows, write_results

from readme_jax.serving import programs

PARTS = {"serving": _several_serving.measure, "exact": _several_exact.measure, "training": _several_training.measure}


class Results:
    """Measured rows, printed and, where they are to be kept, written one by one."""

    def __init__(self, kept: bool) -> None:
        self.kept = kept
        path = RESULTS / "several_gpus.json"
        before = json.loads(path.read_text()) if path.exists() else {"rows": [], "runs": {}}
        self.rows: list[dict[str, Any]] = before["rows"]
        self.runs: dict[str, dict[str, str]] = before["runs"]

    def begin(self, part: str) -> Callable[..., None]:
        """Forget a part's rows of a machine with as many devices; returns what adds new ones."""
        devices = len(jax.devices())
        self.rows = [row for row in self.rows if (row["part"], row["devices"]) != (part, devices)]
        self.runs[f"{part} on {devices}"] = {"command": command(), "commit": commit()}

        def add(**figures: Any) -> None:
            self.rows.append({"part": part, "devices": len(jax.devices()), **figures})
            print(json.dumps(self.rows[-1]), flush=True)
            if self.kept:
                write_results("several_gpus", runs=self.runs, rows=self.rows)

        return add

    def show(self, part: str) -> None:
        """A part's rows as a table."""
        rows = [{k: v for k, v in row.items() if k != "part"} for row in self.rows if row["part"] == part]
        show_rows(part, rows, ".3g", 160)


def main() -> None:
    """Measure the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of the prefill; 0 for none")
    parser.add_argument("--layers", type=int, default=32, help="of the serving part; fewer for a quick look")
    parser.add_argument("--depth", type=int, default=6, help="layers of the training part")
    parser.add_argument("--checkpoint", help="a mixture's or dense model's, for the part `exact`")
    parser.add_argument("--option", nargs="+", default=[], help="XLA options of serving's programs, NAME=VALUE")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try the script; writes nothing")
    args = parser.parse_args()
    if len(jax.devices()) < 2:
        raise SystemExit("several.py needs two devices or more")
    for name, value in (option.split("=", 1) for option in args.option):
        programs.GPU_OPTIONS[name] = {"true": True, "false": False}.get(value, value)
    results = Results(kept=not args.tiny)
    for part in args.part:
        PARTS[part](args, results.begin(part))
        gc.collect()  # the next part needs the memory
        results.show(part)


if __name__ == "__main__":
    main()
