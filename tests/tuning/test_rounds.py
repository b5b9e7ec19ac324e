from __future__ import annotations

import json
import signal
import struct
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_run
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event

from readme_jax import config
from readme_jax.checkpoints.store import Store
from readme_jax.errors import ConfigError
from readme_jax.tuning.journal import Journal, read_metrics
from readme_jax.tuning.rounds import Interrupted, NonFinite
from readme_jax.tuning.schedule import Position, Schedule, check_same, schedule_of


@given(st.integers(0, 3), st.integers(0, 4), st.integers(0, 4))
def test_every_step_has_one_position(rounds, router, experts):
    schedule = Schedule(rounds, router, experts)
    walked = [
        (r, stage, step)
        for r in range(rounds)
        for stage, steps in (("router", router), ("experts", experts))
        for step in range(steps)
    ]
    positions = [schedule.at(done) for done in range(schedule.total)]
    assert [(p.round, p.stage, p.step) for p in positions] == walked
    for stage in ("router", "experts"):
        assert [p.data for p in positions if p.stage == stage] == list(range(rounds * schedule.steps(stage)))
    assert schedule.at(schedule.total) is None


def test_one_expert_has_no_router_stage():
    assert schedule_of(config.Run(), 1) == Schedule(8, 0, 200)
    assert schedule_of(config.Run(), 7) == Schedule(8, 100, 200)


def test_a_run_with_other_settings_is_refused_by_name():
    run = config.Run(data=config.Data(domains=("a", "b")))
    saved = json.loads(json.dumps(config.to_dict(run)))
    free = replace(run, output="elsewhere", mesh=config.Mesh(data=2), tuning=config.Tuning(checkpoint_every=7))
    check_same(saved, free, "runs/x")
    other = replace(run, seed=3, expert_stage=config.ExpertStage(lr=1e-3))
    with pytest.raises(ConfigError) as error:
        check_same(saved, other, "runs/x")
    message = str(error.value)
    assert "runs/x" in message and "seed (0 -> 3)" in message and "expert_stage.lr (5e-05 -> 0.001)" in message
    assert "data.domains" not in message and "\n" not in message


def test_a_non_finite_loss_stops_and_the_last_checkpoint_is_good(tmp_path):
    experts = replace(tiny_run.RUN.expert_stage, lr=1e30)
    run = replace(tiny_run.RUN, expert_stage=experts, tuning=config.Tuning(rounds=2, checkpoint_every=4))
    with pytest.raises(NonFinite, match=r"step 2 of the experts stage in round 1 \(step 7 of the run\)"):
        tiny_run.run_in(tmp_path, run)
    assert Store(tmp_path / "checkpoints").latest() == 4
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 7))


def test_sigint_saves_and_a_second_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_run.Dying, "number", signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as stop:
        tiny_run.run_in(tmp_path, term_at=7)
    assert stop.value.code == 130 and "SIGINT: saved after 7 steps" in str(stop.value)
    assert signal.getsignal(signal.SIGINT) is before
    assert Store(tmp_path / "checkpoints").latest() == 7
    assert tiny_run.run_in(tmp_path).done == 20


def test_journal_drops_what_came_after_the_checkpoint(tmp_path):
    position = Position(0, "router", 0, 0)
    journal = Journal(tmp_path)
    for step in (1, 2, 3):
        journal.train(step, replace(position, step=step - 1), {"loss": 1 / step})
    journal.evaluation(2, position, {"perplexity": {"code": 3.0}, "geo_mean": 3.0})
    journal.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"kind": "train", "st')  # killed while writing
    Journal(tmp_path, 2).close()
    kept = read_metrics(tmp_path)
    assert [(line["kind"], line["step"]) for line in kept] == [("train", 1), ("train", 2), ("evaluation", 2)]
    assert kept[1] == {"kind": "train", "step": 2, "round": 0, "stage": "router", "stage_step": 2, "loss": 0.5}
    Journal(tmp_path).close()
    assert read_metrics(tmp_path) == []


def events(folder):
    """{(name, step): value} of the TensorBoard files of a folder: records of a length, two checksums and an Event."""
    found = {}
    for path in folder.glob("events.out.*"):
        held, at = path.read_bytes(), 0
        while at < len(held):
            size = struct.unpack_from("<Q", held, at)[0]
            event = Event.FromString(held[at + 12 : at + 12 + size])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            at += size + 16
    return found


def test_tensorboard_gets_what_the_lines_hold(tmp_path):
    journal = Journal(tmp_path)
    journal.train(1, Position(0, "router", 0, 0), {"loss": 0.5, "lr": 0.25})
    journal.train(2, Position(0, "experts", 0, 0), {"loss": 2.0})
    journal.evaluation(2, Position(0, "experts", 0, 0), {"perplexity": {"code": 3.0}, "geo_mean": 4.0})
    journal.close()
    assert events(tmp_path / "tensorboard") == {
        ("router/loss", 1): 0.5,
        ("router/lr", 1): 0.25,
        ("experts/loss", 2): 2.0,
        ("evaluation/perplexity/code", 2): 3.0,
        ("evaluation/geo_mean", 2): 4.0,
    }


def test_evaluation_is_recorded_at_the_end_of_every_stage(tmp_path, mesh):
    from readme_jax.tuning.rounds import Tuner

    run = replace(
        tiny_run.RUN,
        router_stage=replace(tiny_run.RUN.router_stage, objective="domain", steps=2),
        expert_stage=replace(tiny_run.RUN.expert_stage, steps=3),
        tuning=config.Tuning(rounds=2, evaluate_every=4),
    )
    parts, progress = tiny_run.begin(run, mesh)
    seen, saved, journal = [], [], Journal(tmp_path)

    def evaluate(position, backbone, router):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((backbone, router)))
        seen.append((position.round, position.stage, position.step))
        return {"geo_mean": 1.0}

    batches = {"router": tiny_run.Bytes(1), "experts": tiny_run.Bytes(2)}
    Tuner(run, parts, batches, mesh, journal, lambda p: saved.append(p.done), evaluate).tune(progress)
    journal.close()
    assert seen == [(0, "router", 1), (0, "experts", 1), (0, "experts", 2), (1, "router", 1), (1, "experts", 0),
                    (1, "experts", 2)]  # fmt: skip
    assert saved == [10] and progress.done == 10 and progress.moments is None
    rates = [line["lr"] for line in read_metrics(tmp_path) if line["kind"] == "train"]
    assert rates[0] == pytest.approx(3e-3) and rates[5] == pytest.approx(3e-3 * 0.8)
