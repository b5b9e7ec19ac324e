"""Model folders written whole or not at all, and clear errors when the disk will not take them."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from readme_jax.errors import CheckpointError
from readme_jax.files import new_folder


@contextmanager
def model_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, put in the place of `path` once filled; an older checkpoint there is then removed.

    Raises CheckpointError, leaving `path` as it was, when it holds files that are not a checkpoint or when writing
    fails (for instance a full disk).
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: is a file; give a folder")
    older = path.is_dir() and any(path.iterdir())
    if older and not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: holds files that are not a checkpoint; give a new folder")
    try:
        if not older:
            with new_folder(path) as folder:
                yield folder
            return
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as beside:
            with new_folder(Path(beside) / "new") as folder:
                yield folder
            os.rename(path, Path(beside) / "old")
            os.rename(Path(beside) / "new", path)
    except (OSError, SafetensorError) as e:
        raise write_error(path, e) from e


def first_line(error: BaseException) -> str:
    """What an error of another library says, on one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def write_error(path: Path, error: BaseException) -> CheckpointError:
    """One clear line about a failed write."""
    full = (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error)
    if not full:
        return CheckpointError(f"{path}: cannot be written ({first_line(error)})")
    try:
        free = f" ({shutil.disk_usage(path.parent).free / 2**20:.0f} MiB free)"
    except OSError:
        free = ""
    return CheckpointError(f"{path}: disk full{free}: nothing was saved; free some space or give another folder")
