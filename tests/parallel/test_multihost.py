"""Two processes of four CPU devices each, as one job by jax.distributed, against one process of eight.

With test_multihost_failures.py, `make multihost`.
"""

from __future__ import annotations

import numpy as np
import pytest
from multihost import STEPS, Job, largest_difference

pytestmark = pytest.mark.multihost


def test_two_processes_equal_one(folder):
    two = Job(folder, "two").succeed()
    one = Job(folder, "one", processes=1, devices=8).succeed()
    assert sorted(two.losses) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(two.losses.values()), list(one.losses.values()), rtol=1e-5)
    assert largest_difference(two.exported, one.exported) < 1e-3, "AdamW's first steps enlarge rounding"
    assert two.status["status"] == "finished" and two.status["attempts"][0]["processes"] == 2
    assert two.committed[-1] == STEPS
    assert {p.name for p in two.output.iterdir()} == {p.name for p in one.output.iterdir()}


def test_processes_that_do_not_agree_end_before_anything_is_compiled(folder):
    job = Job(folder, "disagree", params={1: ["ExpertStage.lr = 2e-2"]})
    for code, said in job.end():
        assert code == 2
        (line,) = said.strip().splitlines()
        assert "process 1" in line and "expert_stage.lr is 0.02 there and 0.01 on process 0" in line
    assert not job.output.exists()
