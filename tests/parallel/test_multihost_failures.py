"""What becomes of a job of two processes when one of them dies, hangs, or is told to stop: `make multihost`."""

from __future__ import annotations

import shutil
import signal
import time

import numpy as np
import pytest
from multihost import STEPS, Job, largest_difference

pytestmark = pytest.mark.multihost
STOPPED = 128 + signal.SIGTERM


@pytest.fixture(scope="module")
def whole(folder) -> Job:
    """A run that nothing disturbs."""
    return Job(folder, "whole").succeed()


def same(job: Job, whole: Job) -> None:
    assert job.losses == whole.losses
    assert largest_difference(job.exported, whole.exported) == 0


def codes(job: Job) -> list[int]:
    return [code for code, _ in job.end()]


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_and_restarted_ends_as_if_never_disturbed(folder, whole, victim):
    name = f"killed{victim}"
    job = Job(folder, name, options={victim: ["--die-at=7"]})
    began = time.monotonic()
    ended = job.end()
    assert ended[victim][0] == -signal.SIGKILL
    code, said = ended[1 - victim]
    assert code == 1 and f"process {victim} (" in said and "was killed" in said
    assert job.status["status"] == "crashed" and f"process {victim}" in job.status["why"]
    assert job.committed[-1] in (3, 6), "the save of step 6 may not have ended"
    print("ended after", time.monotonic() - began)

    again = Job(folder, name).succeed()
    same(again, whole)
    assert [a["status"] for a in again.status["attempts"]] == ["crashed", "finished"]


def test_killed_while_an_asynchronous_save_commits(folder, whole):
    job = Job(folder, "saving", options={1: ["--die-saving=9"]})
    assert sorted(codes(job)) == [-signal.SIGKILL, 1]
    last = job.committed[-1]
    assert last in (6, 9)
    again = Job(folder, "saving").succeed()
    same(again, whole)
    assert not list((again.output / "checkpoints").glob("*tmp*")), "what the killed save left is gone"


def test_a_notice_to_one_process_saves_all_first(folder, whole):
    job = Job(folder, "told", options={1: ["--term-at=5"]})
    assert codes(job) == [STOPPED, STOPPED]
    assert job.status["status"] == "preempted" and "SIGTERM" in job.status["why"]
    saved = job.committed[-1]
    assert 5 <= saved < STEPS and len(job.losses) == saved, "saved at the step where it stopped"
    same(Job(folder, "told").succeed(), whole)


def test_a_process_that_hangs_is_given_up(folder):
    job = Job(folder, "hangs", options={1: ["--hang-at=2"]})
    began = time.monotonic()
    assert job.processes[0].wait(240) == 1
    job.processes[1].kill()
    (_, said), _ = job.end()
    assert "no sign of life for 20 s (Cluster.heartbeat_timeout)" in said
    assert job.status["status"] == "crashed" and time.monotonic() - began < 240


@pytest.mark.parametrize("devices", [4, 1])
def test_a_checkpoint_of_eight_devices_goes_on_with_fewer_in_one_process(folder, whole, devices):
    job = Job(folder, f"fewer{devices}", options={1: ["--term-at=5"]})
    assert codes(job) == [STOPPED, STOPPED]
    fewer = Job(folder, f"fewer{devices}", processes=1, devices=devices).succeed()
    np.testing.assert_allclose(list(fewer.losses.values()), list(whole.losses.values()), rtol=1e-5)
    assert [a["devices"] for a in fewer.status["attempts"]] == [8, devices]


def test_a_missing_host_is_named_within_the_time_out(folder):
    job = Job(folder, "missing", params={0: ["Cluster.start_timeout = 5"], 1: ["Cluster.start_timeout = 5"]})
    job.processes[1].kill()
    (code, said), _ = job.end()
    assert code == 2 and "1 of 2 processes did not report" in said and said.strip().endswith("process 1")
    shutil.rmtree(job.output, ignore_errors=True)
