"""The command line: `readme-jax generate | perplexity | refactor | export`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `readme-jax`: exits with 0, with 2 after one line about bad input, with 130 when interrupted."""
    from readme_jax.cli.app import app
    from readme_jax.cli.guard import guarded

    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    sys.exit(guarded(lambda: app(args=given, standalone_mode=False)))
