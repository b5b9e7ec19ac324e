"""Memory of the process: huge pages from its start, and freed pages given back between the phases of a run."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from pathlib import Path

TUNABLES, HUGE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
OFFERED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Start the interpreter again, once, with glibc asking for huge pages, where Linux gives them on request.

    XLA on CPU allocates a step's temporaries anew each time: of 4 KiB pages a training step of SmolLM2 faults in a
    million, which is a tenth of its time. glibc reads the setting at the start of a process only. Call it first in a
    program, never in a library: nothing after it runs in the old process.
    """
    set_by_user = os.environ.get(TUNABLES, "")
    if platform.libc_ver()[0] != "glibc" or "glibc.malloc.hugetlb" in set_by_user or not OFFERED.exists():
        return
    if "[madvise]" not in OFFERED.read_text():
        return
    tunables = f"{set_by_user}:{HUGE}" if set_by_user else HUGE
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {TUNABLES: tunables})


def trim() -> None:
    """Hand the heap's free pages back (glibc; elsewhere only collect garbage).

    A phase frees gigabytes in arrays of a few megabytes, which glibc keeps for itself: after tuning the demo's model it
    held 7 GB of them.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def settle() -> None:
    """Keep the garbage collector from all that is alive now: for a process that goes on with it for as long as it runs.

    The programs of a large model are so many objects that a full collection, which stops all threads while it looks
    through them, would show between two tokens of everybody's answer.
    """
    gc.collect()
    gc.freeze()
