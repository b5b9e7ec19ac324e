"""The command line: `readme-jax refactor | generate | perplexity | export | serve | batch`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from readme_jax.data.cache import default_cache
from readme_jax.memory import use_huge_pages


def start(command: Sequence[str] = ()) -> None:
    """What programs call (`readme-jax`, train.py): `main` on the command line, after `command`, with huge pages."""
    use_huge_pages()
    main([*command, *sys.argv[1:]])


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `readme-jax`: exits with 0, with 2 after one line about bad input, with 130 when interrupted."""
    # Compiled programs are kept: a second start, or a second model of the same shape, compiles nothing anew.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(default_cache() / "compiled"))

    from readme_jax.cli.app import app
    from readme_jax.cli.guard import guarded

    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = guarded(lambda: app(args=given, standalone_mode=False))
    except BaseException:
        leave_job(1)
        raise
    leave_job(code)
    sys.exit(code)


def leave_job(code: int) -> None:
    """Of a job of several processes that failed, end this one at once (parallel/job.py); else return."""
    if "readme_jax.parallel.job" in sys.modules:  # only a command that joins one has imported it
        from readme_jax.parallel.job import leave

        leave(code)
