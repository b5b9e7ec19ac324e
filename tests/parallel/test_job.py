"""The record that a run leaves however it ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from readme_jax import config
from readme_jax.errors import CheckpointError, ConfigError, DataError
from readme_jax.parallel.job import Preempted, Record, agreed, config_hash, first_began, take_part


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def test_a_run_that_finishes(tmp_path):
    run = config.Run(output=str(tmp_path / "run"))
    with take_part(run):
        assert status(tmp_path / "run")["status"] == "running"
    record = status(tmp_path / "run")
    (attempt,) = record["attempts"]
    assert record["status"] == "finished" and record["why"] is None
    assert attempt["began"] <= attempt["ended"] and attempt["processes"] == 1
    assert attempt["config"] == config_hash(run) and first_began(tmp_path / "run") == attempt["began"]


@pytest.mark.parametrize(
    ("error", "ending", "why"),
    [
        (DataError("no text\nat all"), "crashed", "no text at all"),
        (ValueError("x"), "crashed", "ValueError: x"),
        (MemoryError(), "crashed", "MemoryError"),
        (Preempted("SIGTERM: saved"), "preempted", "SIGTERM: saved"),
        (KeyboardInterrupt(), "preempted", "KeyboardInterrupt"),
    ],
)
def test_a_run_that_does_not(tmp_path, error, ending, why):
    (tmp_path / "metrics.jsonl").touch()  # it has begun to save
    with pytest.raises(type(error)), take_part(config.Run(output=str(tmp_path))):
        raise error
    assert (status(tmp_path)["status"], status(tmp_path)["why"]) == (ending, why)


@pytest.mark.parametrize("error", [ConfigError("x"), DataError("x"), CheckpointError("x")])
def test_bad_input_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), take_part(config.Run(output=str(tmp_path / "run"))):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_settings_that_do_not_fit_a_run_leave_its_record_alone(tmp_path):
    with take_part(config.Run(output=str(tmp_path))):
        (tmp_path / "summary.json").touch()
    before = (tmp_path / "status.json").read_bytes()
    with pytest.raises(ConfigError), take_part(config.Run(output=str(tmp_path))):
        raise ConfigError("other settings")
    assert (tmp_path / "status.json").read_bytes() == before


def test_attempts_add_up_and_a_kill_without_a_word_shows(tmp_path):
    Record(tmp_path).began({"devices": 8})  # and is killed
    with take_part(config.Run(output=str(tmp_path))):
        pass
    record = status(tmp_path)
    assert [a["status"] for a in record["attempts"]] == ["crashed", "finished"] and record["status"] == "finished"
    assert "without a word" in record["attempts"][0]["why"]
    assert first_began(tmp_path) == record["attempts"][0]["began"]


def test_another_process_writes_down_the_death_of_the_first(tmp_path):
    Record(tmp_path).began({})
    Record(tmp_path).crashed("process 0 was killed")
    assert status(tmp_path)["status"] == "crashed" and len(status(tmp_path)["attempts"]) == 1


def test_what_processes_must_have_alike():
    run = config.Run()
    own = replace(run, cluster=config.Cluster(coordinator="a:1", processes=2, process=1))
    assert config_hash(own) == config_hash(run), "each process has its own number"
    other = replace(run, expert_stage=config.ExpertStage(lr=1e-4))
    assert config_hash(other) != config_hash(run)
    assert agreed(run)["expert_stage.lr"] == 5e-5 and "jax" in agreed(run)
