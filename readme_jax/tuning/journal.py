"""What a run leaves of its progress: metrics.jsonl and TensorBoard events, without duplicates after a resumption."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from readme_jax.files import write_text
from readme_jax.parallel.job import first_began
from readme_jax.tuning.schedule import Position

METRICS = "metrics.jsonl"


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl, in order; an incomplete last line, of a killed run, is left out."""
    path = Path(folder) / METRICS
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


class NoJournal:
    """What the other processes of a job have in the place of its one `Journal`."""

    def train(self, done: int, position: Position, values: dict[str, float]) -> None:
        """Nothing: process 0 writes."""

    def evaluation(self, done: int, position: Position, values: dict[str, Any]) -> None:
        """Nothing: process 0 writes."""

    def close(self) -> None:
        """Nothing is open."""


class Journal(NoJournal):
    """Appends one line a step and one an evaluation to a run's metrics, flushed at once.

    Lines: {kind: train | evaluation, step, round, stage, stage_step, ...}; `step` counts all steps done, including
    this one. Opened at `done` steps, it first drops what a killed run had written of later ones.
    """

    def __init__(self, folder: str | Path, done: int | None = None) -> None:
        """`done`: steps of the checkpoint that the run resumes from; None begins anew."""
        folder = Path(folder)
        kept = [] if done is None else [line for line in read_metrics(folder) if line["step"] <= done]
        write_text(folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
        self.stood = sum(line.get("seconds", 0.0) for line in kept)  # seconds in steps that stand
        self.began = first_began(folder) or time.time()
        self.lines = (folder / METRICS).open("a")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=(done or 0) + 1, flush_secs=10)

    def train(self, done: int, position: Position, values: dict[str, float]) -> None:
        """Metrics of the step taken at `position`, after which `done` steps are done; of a timed step goodput too."""
        if "seconds" in values:
            self.stood += values["seconds"]
            values = values | {"goodput": self.stood / max(time.time() - self.began, self.stood)}
        self._write("train", done, position, values)
        for name, value in values.items():
            self.board.add_scalar(f"{position.stage}/{name}", value, done)

    def evaluation(self, done: int, position: Position, values: dict[str, Any]) -> None:
        """What the evaluation hook returned, numbers or dicts of numbers."""
        self._write("evaluation", done, position, values)
        for name, value in values.items():
            for part, number in value.items() if isinstance(value, dict) else ((None, value),):
                self.board.add_scalar("/".join(filter(None, ("evaluation", name, part))), number, done)

    def _write(self, kind: str, done: int, position: Position, values: dict[str, Any]) -> None:
        where = {"round": position.round, "stage": position.stage, "stage_step": position.step + 1}
        self.lines.write(json.dumps({"kind": kind, "step": done, **where, **values}) + "\n")
        self.lines.flush()

    def close(self) -> None:
        """Flush and close both files."""
        self.lines.close()
        self.board.close()
