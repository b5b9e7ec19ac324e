"""One process of a whole run on tiny files, which can be told to die: run as a script by test_multihost.

    python multihost_run.py [--die-at STEP] [--die-saving STEP] [--term-at STEP] [--hang-at STEP] [--masked]
        -- OPTIONS OF REFACTOR

A process dies by SIGKILL right after a step, or with an asynchronous save under way, or tells itself to stop. With
--masked experts are computed in a way that compiles in a fraction of the time.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any

from readme_jax import cli, runner
from readme_jax.models.runtime import Runtime
from readme_jax.tuning import resume
from readme_jax.tuning.rounds import Tuner


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--die-at", "--die-saving", "--term-at", "--hang-at"):
        parser.add_argument(name, type=int, default=-1)
    parser.add_argument("--masked", action="store_true")
    at, given = parser.parse_known_args()
    if at.masked:
        runner.runtime_for = lambda model: Runtime(segments="masked")
    after, save = Tuner._after, resume.save

    def then(self: Tuner, position: Any, progress: Any, ended: bool) -> None:
        for step, number in ((at.die_at, signal.SIGKILL), (at.term_at, signal.SIGTERM), (at.hang_at, signal.SIGSTOP)):
            if progress.done == step:
                os.kill(os.getpid(), number)
        after(self, position, progress, ended)

    def saving(store: Any, progress: Any, *rest: Any) -> None:
        save(store, progress, *rest)
        if progress.done == at.die_saving:
            os.kill(os.getpid(), signal.SIGKILL)

    Tuner._after = then  # type: ignore[method-assign]
    resume.save = saving
    cli.main(["refactor", *(a for a in given if a != "--")])


if __name__ == "__main__":
    sys.exit(main())
