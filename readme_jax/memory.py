"""Giving freed memory back to the system between the phases of a run."""

from __future__ import annotations

import ctypes
import gc


def trim() -> None:
    """Hand the heap's free pages back (glibc; elsewhere only collect garbage).

    A phase frees gigabytes in arrays of a few megabytes, which glibc keeps for itself: after tuning the demo's model it
    held 7 GB of them.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
