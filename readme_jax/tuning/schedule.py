"""Where a run is: one integer, the steps done, gives round, stage, step and data position."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from readme_jax import config
from readme_jax.errors import ConfigError

Stage = Literal["router", "experts"]
STAGES: tuple[Stage, ...] = ("router", "experts")

# May change between an interrupted run and its resumption: they alter where things lie or what is looked at.
FREE = ("output", "mesh", "cluster", "tuning.checkpoint_every", "tuning.evaluate_every", "tuning.trace_steps")


@dataclass(frozen=True)
class Position:
    """A place in the alternating rounds. `step` steps of the stage are done; `data` is its stream's next batch."""

    round: int
    stage: Stage
    step: int
    data: int


@dataclass(frozen=True)
class Schedule:
    """Rounds of router tuning then expert tuning (Table 2); a stage of no steps is left out."""

    rounds: int
    router: int  # steps a round
    experts: int

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.rounds * (self.router + self.experts)

    def steps(self, stage: Stage) -> int:
        """Steps of a stage in a round."""
        return self.router if stage == "router" else self.experts

    def at(self, done: int) -> Position | None:
        """The position after `done` steps, at the start of the next stage where one has just ended; None at the end."""
        if not 0 <= done < self.total:
            return None
        round_, rest = divmod(done, self.router + self.experts)
        if rest < self.router:
            return Position(round_, "router", rest, round_ * self.router + rest)
        step = rest - self.router
        return Position(round_, "experts", step, round_ * self.experts + step)


def schedule_of(run: config.Run, num_experts: int) -> Schedule:
    """The schedule of a run; one expert has no router to tune."""
    router = run.router_stage.steps if num_experts > 1 else 0
    return Schedule(run.tuning.rounds, router, run.expert_stage.steps)


def check_same(saved: dict[str, Any], run: config.Run, folder: str) -> None:
    """Raises ConfigError, naming every field that differs, when a run is not the one saved in `folder`.

    `saved` is the saved run's config as plain dicts. The output folder, the mesh, the processes and how often to
    save or evaluate may differ.
    """
    before, now = (
        {k: list(v) if isinstance(v, tuple) else v for k, v in config.flat(tree).items()}
        for tree in (saved, asdict(run))
    )
    free = tuple(f"{name}." for name in FREE)
    differing = [
        f"{k} ({before.get(k)!r} -> {now.get(k)!r})"
        for k in sorted(before | now)
        if before.get(k) != now.get(k) and not f"{k}.".startswith(free)
    ]
    if differing:
        raise ConfigError(
            f"{folder} holds a run with other settings: {', '.join(differing)}; restore them or choose another output"
        )
