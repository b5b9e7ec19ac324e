"""The alternating rounds: router tuning, expert tuning, saved so that a run resumes exactly where it was.

Each stage of each round starts with fresh moments and ends at a learning rate of zero. A checkpoint holds everything
a run has: backbone, router, channels, the current stage's moments, random key, steps done and settings. Steps done give
round, stage, step and data position (schedule.py), so a resumed run takes the very steps it would have taken.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from readme_jax import config
from readme_jax.compiling import kept_if_loaded_quickly
from readme_jax.config import MixtureConfig, ModelConfig, RouterConfig
from readme_jax.errors import ReadMeError
from readme_jax.memory import trim
from readme_jax.models.layout import to_layout
from readme_jax.models.runtime import Runtime
from readme_jax.models.sizes import Channels
from readme_jax.parallel.job import Preempted
from readme_jax.parallel.mesh import put_batch, replicated
from readme_jax.parallel.placing import WHOLE, Share, put
from readme_jax.progress import meter
from readme_jax.tuning.distill import merged_dense
from readme_jax.tuning.journal import NoJournal
from readme_jax.tuning.routes import routes_of
from readme_jax.tuning.schedule import Position, Schedule, Stage, schedule_of
from readme_jax.tuning.speed import Speed, Trace
from readme_jax.tuning.stages import build_step
from readme_jax.tuning.step import (
    Step,
    TrainState,
    backbone_table,
    place,
    round_peak,
    shard_table,
)

Params = Mapping[str, Any]


class BatchSource(Protocol):
    """Batches at random access: {"tokens": int32 [B, T], "domain": int32 [B]}."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


class NonFinite(ReadMeError):
    """A loss or gradient that is not a number: the run stops, its last checkpoint intact."""


class Interrupted(Preempted):
    """SIGINT or SIGTERM arrived and the run saved itself. Uncaught, the process exits with code 128 + signal."""

    def __init__(self, number: int, done: int) -> None:
        super().__init__(128 + number)
        self.message = f"{signal.Signals(number).name}: saved after {done} steps; run it again to go on"

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Parts:
    """What tuning needs and never changes. Trees are in the runtime's layout."""

    model: ModelConfig
    mixture: MixtureConfig
    router: RouterConfig
    runtime: Runtime
    dense: Params
    channels: Params


def real_channels(parts: Parts) -> Channels:
    """Feed-forward channels of a mixture, mean over layers, padding left out."""
    layers = [jax.tree.map(np.asarray, layer) for layer in to_layout(parts.channels, "unrolled").values()]
    real = {k: np.mean([(layer[k] < parts.model.ffn_dim).sum() for layer in layers]) for k in ("permanent", "experts")}
    m = parts.mixture
    return Channels(m.num_experts, float(real["experts"]) / m.num_experts, float(real["permanent"]), m.top_k, m.tied)


@dataclass
class Progress:
    """What tuning changes, in place, after `done` steps. `moments` is None where a stage starts."""

    done: int
    backbone: Params
    router: Params
    key: jax.Array  # the run's random key
    moments: Any = None


class Signals:
    """SIGINT and SIGTERM noted instead of died of; a second one is obeyed at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.before: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.release()

    def catch(self) -> None:
        """Take over both signals; only the main thread may. Of several processes jax takes SIGTERM over: `asked`."""
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self.before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}

    def asked(self, done: int) -> int | None:
        """The signal that asks the run to end after `done` steps: of several processes in all of them or in none.

        There a SIGTERM to any one of them counts, and jax agrees on the step with all.
        """
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(done):
            self.number = signal.SIGTERM
        return self.number

    def release(self) -> None:
        """Give both signals back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


@dataclass
class Pace:
    """Seconds a step of each stage, without its first (which compiles), and from them the seconds left."""

    schedule: Schedule
    seconds: dict[Stage, float] = field(default_factory=dict)
    seen: set[Stage] = field(default_factory=set)

    def note(self, stage: Stage, seconds: float) -> None:
        """A step took so long."""
        if stage in self.seen:
            self.seconds[stage] = 0.9 * self.seconds.get(stage, seconds) + 0.1 * seconds
        self.seen.add(stage)

    def left(self, done: int) -> float:
        """Seconds until the end of the run, evaluation not counted; NaN while a stage ahead is unknown."""
        total, position = 0.0, self.schedule.at(done)
        while position is not None:
            steps = self.schedule.steps(position.stage) - position.step
            total += steps * self.seconds.get(position.stage, math.nan)
            done += steps
            position = self.schedule.at(done)
        return total


@dataclass
class Tuner:
    """The loop over stages. `save(progress)` writes a checkpoint; `evaluate(position, backbone, router)` may be None.

    `batches` has a source for each stage; `journal` records metrics. Runs under `jax.set_mesh(mesh)`.
    """

    run: config.Run
    parts: Parts
    batches: Mapping[Stage, BatchSource]
    mesh: Any
    journal: NoJournal
    save: Callable[[Progress], None]
    evaluate: Callable[[Position, Params, Params], dict[str, Any]] | None = None
    share: Mapping[Stage, Share] = field(default_factory=dict)  # of each batch, what this process's source holds

    def __post_init__(self) -> None:
        self.schedule = schedule_of(self.run, self.parts.mixture.num_experts)
        self.pace = Pace(self.schedule)
        self.signals = Signals()
        self.programs: dict[Stage, Any] = {}
        model, devices = self.parts.model, self.mesh.devices
        kind = devices.flat[0].device_kind
        self.speed = Speed(self.run, model, real_channels(self.parts), devices.size, kind)
        self.trace = Trace(self.run.output, self.run.tuning.trace_steps)

    def tune(self, progress: Progress) -> None:
        """Take every step that is left. Raises Interrupted after a signal, NonFinite when a loss is not a number."""
        steps: dict[Stage, Step] = {}  # compiled once for all rounds
        total, done = (self._tokens_after(n) for n in (self.schedule.total, progress.done))
        self.signals.catch()
        try:
            with meter("tune", total, done) as self.tick:
                while (position := self.schedule.at(progress.done)) is not None:
                    if position.stage not in steps:
                        steps[position.stage] = self._build(position.stage)
                    self._stage(steps[position.stage], position, progress)
        finally:
            self.signals.release()
            self.trace.close()

    def _build(self, stage: Stage) -> Step:
        return build_step(self.run, self.parts, stage, self.mesh)

    def _frozen(self, stage: Stage, progress: Progress) -> dict[str, Any]:
        """What the stage reads and does not train, on the mesh."""
        p, run = self.parts, self.run
        channels = jax.device_put(p.channels, replicated(self.mesh))
        if stage == "experts":
            frozen: dict[str, Any] = {"channels": channels}
            if p.mixture.num_experts > 1:
                frozen["routes"] = routes_of(progress.router, p.router, p.mixture.top_k)
            return frozen | ({"teacher": p.dense} if run.expert_stage.distill else {})
        if run.router_stage.objective == "domain" and p.router.kind != "layerwise":
            return {}
        if run.router_stage.objective == "expert_loss":
            return {"backbone": progress.backbone, "channels": channels}
        if run.router_stage.targets == "original":
            return {"backbone": p.dense, "channels": channels}
        trees = (to_layout(tree, "unrolled") for tree in (p.dense, progress.backbone, p.channels))
        merged = to_layout(merged_dense(*trees), p.runtime.layout)
        return {"backbone": place(merged, shard_table(self._dense_table(), self.mesh)), "channels": channels}

    def _dense_table(self) -> Any:
        return backbone_table(self.parts.model, None, self.parts.runtime.layout)

    def _start(self, step: Step, position: Position, progress: Progress) -> TrainState:
        mine = progress.router if position.stage == "router" else progress.backbone
        if progress.moments is None:
            return step.start(mine)
        at = put(np.int32(position.step), step.shardings.step)
        return TrainState(mine, progress.moments, at)

    def _stage(self, step: Step, position: Position, progress: Progress) -> None:
        """The rest of the stage that `position` is in."""
        stage, round_ = position.stage, position.round
        lr = self.run.router_stage.lr if stage == "router" else self.run.expert_stage.lr
        peak = np.float32(round_peak(lr, self.run.tuning, round_))
        frozen = self._frozen(stage, progress)
        state = self._start(step, position, progress)
        self._hold(stage, progress, state)  # lets go of what the state was copied from
        trim()
        following: Position | None = position
        while following is not None and (following.stage, following.round) == (stage, round_):
            position, began = following, time.monotonic()
            batch = put_batch(self.batches[stage][position.data], self.mesh, self.share.get(stage, WHOLE))
            if stage not in self.programs:
                self._compile(stage, step, state, batch, frozen, peak)
                began = time.monotonic()
            self.trace.before(stage)
            state, metrics = self.programs[stage](state, batch, frozen, peak)
            values = self._checked(metrics, position, progress.done)
            progress.done += 1
            following = self.schedule.at(progress.done)
            ended = following is None or following.step == 0
            progress.moments = None if ended else state.moments
            self._hold(stage, progress, state)
            self.trace.after(stage, ended)
            took = self.speed.of(stage, self._tokens(stage), time.monotonic() - began)
            self.journal.train(progress.done, position, values | took)
            self.pace.note(stage, took["seconds"])
            self._after(position, progress, ended)

    def _compile(self, stage: Stage, step: Step, *arguments: Any) -> None:
        """The stage's compiled step. What compiling has left behind is given back before the first step needs room."""
        p = self.parts
        with kept_if_loaded_quickly(p.model.num_layers if p.runtime.layout == "unrolled" else 1):
            self.programs[stage] = step.update.lower(*arguments).compile()
        trim()

    def _hold(self, stage: Stage, progress: Progress, state: TrainState) -> None:
        if stage == "router":
            progress.router = state.params
        else:
            progress.backbone = state.params

    def _after(self, position: Position, progress: Progress, ended: bool) -> None:
        """What follows a step: progress, evaluation, checkpoint, and leaving when asked to."""
        done, tuning = progress.done, self.run.tuning
        tokens, seconds = self._tokens(position.stage), self.pace.seconds.get(position.stage)
        note = f"round {position.round + 1} {position.stage} step {position.step + 1}"
        if seconds:
            rates = self.speed.of(position.stage, tokens, seconds)
            note += f" · {rates['tflops']:.3g} TFLOP/s a device" + (
                f" · MFU {rates['mfu']:.1%}" if "mfu" in rates else ""
            )
        self.tick(tokens, note, self.pace.left(done), seconds and tokens / seconds)
        due = tuning.evaluate_every and done % tuning.evaluate_every == 0
        if self.evaluate is not None and (ended or due):
            self.journal.evaluation(done, position, self.evaluate(position, progress.backbone, progress.router))
            trim()
        asked = self.signals.asked(done)
        if done == self.schedule.total or done % tuning.checkpoint_every == 0 or asked is not None:
            self.save(progress)
        if asked is not None:
            raise Interrupted(asked, done)

    def _checked(self, metrics: Mapping[str, jax.Array], position: Position, done: int) -> dict[str, float]:
        values = {name: float(value) for name, value in metrics.items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise NonFinite(
                f"{bad[0]} is {values[bad[0]]} at step {position.step + 1} of the {position.stage} stage in round "
                f"{position.round + 1} (step {done + 1} of the run): the last checkpoint is intact; lower the stage's "
                "lr or look at the data"
            )
        return values

    def _tokens(self, stage: Stage) -> int:
        batch = self.run.router_stage.batch if stage == "router" else self.run.expert_stage.batch
        return batch * self.run.data.sequence_length

    def _tokens_after(self, done: int) -> int:
        rounds, rest = divmod(done, max(self.schedule.router + self.schedule.experts, 1))
        router = rounds * self.schedule.router + min(rest, self.schedule.router)
        return router * self._tokens("router") + (done - router) * self._tokens("experts")
