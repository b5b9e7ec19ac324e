"""Checkpoints of a run: everything that resuming needs, saved by Orbax in the background, whole or not at all."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from readme_jax.checkpoints.folder import first_line, write_error
from readme_jax.errors import CheckpointError

STATE, META = "state", "meta"
PARTIAL = "*.orbax-checkpoint-tmp*"  # a step is renamed to its number once it is complete


class _ReportedElsewhere(logging.Filter):
    """Drops the tracebacks Orbax's threads log when they fail: `Store` raises the same failure as one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.levelno >= logging.ERROR and "orbax" in record.pathname)


_REPORTED_ELSEWHERE = _ReportedElsewhere()


class Store:
    """The run's checkpoints, one numbered folder a step; the newest `keep` of them stay.

    `state` is any tree of arrays and typed random keys (parameters, optimizer, data position); `meta` is a JSON
    object (config, stage, schedule position). A folder gets its number only once it is complete, so a save that was
    killed leaves the one before it as the latest. Nothing is compressed: weights do not compress, and the buffers for
    it would double the memory of a save.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder = Path(folder).resolve()
        self._keep = keep
        self._writer: ocp.CheckpointManager | None = None
        logging.getLogger("absl").addFilter(_REPORTED_ELSEWHERE)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Save in the background, after the save before has ended; the caller may donate `state` at once.

        Does nothing where `step` is saved already: a step of a run has one state. Raises CheckpointError when this
        or the last save fails, for instance on a full disk; earlier checkpoints stay as they were.
        """
        self.wait()
        try:
            if self._writer is None:
                self._discard_partial()
                self._writer = self._open()
            if step in self._writer.all_steps():
                return
            about = {"meta": meta, "leaves": _describe(state)}
            items = {STATE: ocp.args.PyTreeSave(jax.tree.map(_filled, state)), META: ocp.args.JsonSave(about)}
            self._writer.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as e:  # whatever the file system or its client raises
            raise self._failed(e) from e

    def wait(self) -> None:
        """Wait for the save under way, if any. Raises CheckpointError when it failed."""
        if self._writer is None:
            return
        try:
            self._writer.wait_until_finished()
        except Exception as e:  # as above, from the thread that saves
            raise self._failed(e) from e

    def close(self) -> None:
        """Wait for the save under way and let go of the folder. Raises CheckpointError when that save failed."""
        self.wait()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def latest(self) -> int | None:
        """The newest complete step, None without one."""
        self.wait()
        if not self.folder.is_dir():
            return None
        with self._open() as manager:
            return manager.latest_step()

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON object saved with a step. Raises CheckpointError when there is no such step."""
        return self._restore(step, {META: ocp.args.JsonRestore()})[META]["meta"]

    def load(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """State and meta of a step; `like` is a tree of arrays or of ShapeDtypeStructs with shardings.

        The devices may differ from those that saved. Raises CheckpointError when there is no such step, when it cannot
        be read, or when it does not have the structure, shapes and types of `like`.
        """
        like = jax.tree.map(_abstract, like)
        about = self._restore(step, {META: ocp.args.JsonRestore()})[META]
        _check_same(self.folder / str(step), about["leaves"], _describe(like))
        stored = jax.tree.map(_filled, like)
        how = ocp.checkpoint_utils.construct_restore_args(stored)
        state = self._restore(step, {STATE: ocp.args.PyTreeRestore(stored, restore_args=how)})[STATE]
        state = jax.tree.map(lambda leaf, want: _zeros(want) if _empty(want) else leaf, state, like)
        return state, about["meta"]

    def _restore(self, step: int, items: dict[str, Any]) -> Any:
        self.wait()
        where = self.folder / str(step)
        if not where.is_dir():
            raise CheckpointError(f"{self.folder}: no checkpoint of step {step}")
        try:
            with self._open() as manager:
                return manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as e:  # missing or broken files fail deep inside, with any type
            raise CheckpointError(f"{where}: cannot be restored ({first_line(e)})") from e

    def _open(self) -> ocp.CheckpointManager:
        handlers = {STATE: ocp.PyTreeCheckpointHandler(use_compression=False), META: ocp.JsonCheckpointHandler()}
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep)
        return ocp.CheckpointManager(self.folder, item_handlers=handlers, options=options)

    def _discard_partial(self) -> None:
        """Remove what killed or failed saves left. Only a writer may: another run's save may be under way."""
        if jax.process_index() == 0:
            for partial in self.folder.glob(PARTIAL):
                shutil.rmtree(partial, ignore_errors=True)

    def _failed(self, error: Exception) -> CheckpointError:
        """Give up the save under way, remove its remains, and say why."""
        self._writer = None
        self._discard_partial()
        return write_error(self.folder, error)


def _empty(leaf: Any) -> bool:
    return 0 in leaf.shape


def _zeros(want: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(want.shape, want.dtype, device=want.sharding)


def _filled(leaf: Any) -> Any:
    """One zero in the place of a leaf without entries, which Orbax refuses to save."""
    return np.zeros(1, leaf.dtype) if _empty(leaf) else leaf


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _describe(state: Any) -> dict[str, str]:
    """Path -> type and shape of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(np.shape(leaf))}" for path, leaf in leaves}


def _check_same(where: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    for path in [*saved, *wanted]:
        if saved.get(path) != wanted.get(path):
            has, needs = saved.get(path, "nothing"), wanted.get(path, "nothing")
            raise CheckpointError(f"{where}: state{path} is {has}, this run needs {needs}; resume with the same config")
