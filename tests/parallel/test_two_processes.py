"""Two processes of two CPU devices each, as one job by jax.distributed, take the steps of one process of four.

A short run from dense model to export; `make multihost` has longer ones, which are killed and started again.
"""

from __future__ import annotations

import numpy as np
from multihost import Job, largest_difference

SHORT = ["RouterStage.steps = 2", "ExpertStage.steps = 3", "Slice.refit = 'none'", "Slice.score = 'mean_abs'"]


def test_two_processes_take_the_steps_of_one(folder):
    params = {number: SHORT for number in range(2)}
    jobs = [Job(folder, "two", 2, 2, params=params), Job(folder, "one", 1, 4, params=params)]
    two, one = (job.succeed() for job in jobs)
    assert len(two.losses) == 5
    np.testing.assert_allclose(list(two.losses.values()), list(one.losses.values()), rtol=1e-5)
    assert largest_difference(two.exported, one.exported) < 1e-3, "AdamW's first steps enlarge rounding"
    assert two.status["status"] == "finished" and two.status["attempts"][0]["processes"] == 2
    assert two.committed[-1] == 5
