"""What every benchmark writes: results/NAME.json with the command, the commit, the machine and its figures."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from readme_jax.files import write_text

RESULTS = Path(__file__).resolve().parent / "results"


def command() -> str:
    """The command as a user types it, relative to the repository."""
    script = Path(sys.argv[0]).resolve().relative_to(RESULTS.parent.parent)
    return shlex.join(["python", str(script), *sys.argv[1:]])


@lru_cache
def commit() -> str:
    """The commit measured, marked when the tree has changes before the first result is written; READ_ME_COMMIT where
    there is no git history."""
    if "READ_ME_COMMIT" in os.environ:
        return os.environ["READ_ME_COMMIT"]
    try:
        run = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(run, cwd=RESULTS, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, Any]:
    """Processor, cores, devices and versions: no names of hosts or paths."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "devices": sorted({d.device_kind for d in jax.devices()}),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def write_results(name: str, **figures: Any) -> Path:
    """Write results/NAME.json, beside and then renamed; returns its path."""
    path = RESULTS / f"{name}.json"
    content = {"command": command(), "commit": commit(), "machine": machine(), **figures}
    write_text(path, json.dumps(content, indent=1) + "\n")
    return path


def write_document(path: Path, text: str) -> None:
    """Write what a rich console printed, without the blanks that it fills lines with."""
    write_text(path, "\n".join(line.rstrip() for line in text.splitlines()) + "\n")


def show_rows(title: str, rows: list[dict[str, Any]], number: str = ".3f", width: int = 140) -> None:
    """Rows as a table in the terminal; `number` formats floats."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, title=title)
    for row in rows:
        cells = (row.get(key, "") for key in columns)
        table.add_row(*(f"{v:{number}}" if isinstance(v, float) else str(v) for v in cells))
    Console(width=width).print(table)
