"""What `make demo` showed on this machine: perplexities, minutes and peak memory, kept as results/demo.json."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from _report import write_results


def main() -> None:
    """Read the demo's summary and write results/demo.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of a finished demo")
    path = parser.parse_args().run / "summary.json"
    if not path.exists():
        raise SystemExit(f"no {path}: run make demo first")
    summary = json.loads(path.read_text())
    rows = [{"domain": d, **values} for d, values in summary["domains"].items()]
    rows.append({"domain": "geometric mean", **summary["geo_mean"]})
    kept = ("tokens", "parameters", "repeats", "seconds", "peak_memory_gb", "answer")
    write_results("demo", rows=rows, **{name: summary[name] for name in kept})


if __name__ == "__main__":
    main()
