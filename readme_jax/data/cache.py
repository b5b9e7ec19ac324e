"""Folders that are made once: written beside under a lock, then renamed. A killed run leaves nothing half-made."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from readme_jax.errors import DataError


def default_cache() -> Path:
    """Where prepared data lives: $READ_ME_CACHE, or the user's cache folder."""
    if chosen := os.environ.get("READ_ME_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "readme_jax"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # released by the kernel when the process dies
        yield


def make_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Return `folder`, calling `write(scratch)` to make it first when it is not there.

    One process makes it while others wait. What a killed process left behind is removed by the next. Raises DataError
    when the disk refuses.
    """
    if folder.is_dir():
        return folder
    scratch = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f".{folder.name}.lock")):
            if folder.is_dir():
                return folder
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                write(scratch)
                scratch.rename(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # array_record reports a disk that refuses as a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise DataError(f"cannot prepare {folder}: {reason}") from error
    return folder
