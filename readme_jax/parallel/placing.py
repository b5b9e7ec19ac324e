"""Host arrays onto a mesh that several processes share, and back. One process needs no more than `jax.device_put`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from readme_jax.parallel.distributed import lead


class Share(NamedTuple):
    """Which rows of every global batch a process reads: the `part`th of `parts` equal, contiguous stretches."""

    part: int = 0
    parts: int = 1


WHOLE = Share()


def share_of(sharding: NamedSharding, rows: int) -> Share:
    """The rows of a batch that this process's devices hold.

    The whole batch where they are no one stretch that divides it: it then reads what it does not need.
    """
    where = sharding.addressable_devices_indices_map((rows,)).values()
    held = [index[0].indices(rows)[:2] for index in where if index is not None]
    start, stop = min(a for a, _ in held), max(b for _, b in held)
    size = stop - start
    covered = len({row for a, b in held for row in range(a, b)})
    if covered != size or rows % size or start % size:
        return WHOLE
    return Share(start // size, rows // size)


def put_rows(local: np.ndarray, sharding: NamedSharding, share: Share = WHOLE) -> jax.Array:
    """A global array of whose leading axis this process has `share`, `local`."""
    if sharding.is_fully_addressable:
        return jax.device_put(local, sharding)
    first, rows = share.part * len(local), share.parts * len(local)

    def piece(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(rows)
        return local[(slice(start - first, stop - first), *index[1:])]

    return jax.make_array_from_callback((rows, *local.shape[1:]), sharding, piece)


def put(x: Any, sharding: NamedSharding, dtype: Any = None) -> jax.Array:
    """A copy of an array on a mesh, in another type if asked; it shares no memory with `x`.

    `x` is whole in every process, or lies on the mesh already. No process copies more to its devices than they keep.
    """
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(lambda y: jnp.array(y, dtype, copy=True), out_shardings=sharding)(x)
    if isinstance(x, jax.Array) and sharding.is_fully_addressable:
        return jax.device_put(x.astype(dtype or x.dtype), sharding, may_alias=False)
    whole = np.asarray(x)
    return read_parts(whole, whole.shape, sharding, dtype or whole.dtype)


def read_parts(source: Any, shape: tuple[int, ...], sharding: NamedSharding, dtype: Any) -> jax.Array:
    """An array on a mesh from a source that gives parts of it by index: each process asks for what its devices keep.

    It shares no memory with the source.
    """
    return jax.make_array_from_callback(shape, sharding, lambda index: np.array(source[index], dtype))


def fetch(x: Any) -> np.ndarray:
    """An array on the host, whole, in the process that writes; the others help to gather it and get nothing.

    One array at a time: every process holds it for a moment.
    """
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    whole = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(whole) if lead() else np.zeros(0, x.dtype)


def wait_for_all(what: str) -> None:
    """Go on once every process is here. `what` names the place: all must wait at the same one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
