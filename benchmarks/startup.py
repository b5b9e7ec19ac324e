"""Time from the start of a process to a warmed-up engine, without and with the persistent compilation cache.

`python benchmarks/startup.py --checkpoint runs/demo/export --gin_file configs/serving/cpu.gin`. The first start has an
empty cache, the second one what the first left. Writes results/startup.json: rows {checkpoint, start, seconds,
programs, ratio}; seconds include importing, loading weights and compiling all programs. Wanted: a second start at most
half of the first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from _report import write_results
from rich.console import Console


def child(args: argparse.Namespace) -> None:
    """One start."""
    from readme_jax.checkpoints.mixture import load_mixture
    from readme_jax.cli.settings import load_serving
    from readme_jax.serving.engine import Engine

    engine = Engine.build(load_mixture(args.checkpoint[0]), load_serving(args.gin_file, args.gin_param))
    print(json.dumps({"programs": engine.warm_up()}))


def start(args: argparse.Namespace, checkpoint: str, cache: str) -> dict[str, Any]:
    """Seconds of a start in a process of its own, and its programs."""
    command = [sys.executable, __file__, "--child", "--checkpoint", checkpoint]
    command += [
        part for name in ("gin_file", "gin_param") for value in getattr(args, name) for part in (f"--{name}", value)
    ]
    every = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    began = time.perf_counter()
    done = subprocess.run(command, env=os.environ | every, stdout=subprocess.PIPE, text=True, check=True)
    return {"seconds": time.perf_counter() - began, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    """Two starts of each checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="append", required=True, help="a mixture; may be given several times")
    parser.add_argument("--gin_file", action="append", default=[])
    parser.add_argument("--gin_param", action="append", default=[])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    rows = []
    for checkpoint in args.checkpoint:
        with tempfile.TemporaryDirectory() as cache:
            found = {name: start(args, checkpoint, cache) for name in ("first", "second")}
        for name, figures in found.items():
            ratio = figures["seconds"] / found["first"]["seconds"]
            rows.append({"checkpoint": os.path.basename(checkpoint), "start": name, **figures, "ratio": ratio})
    Console().print(*rows, sep="\n")
    write_results("startup", settings=args.gin_file + args.gin_param, rows=rows)


if __name__ == "__main__":
    main()
