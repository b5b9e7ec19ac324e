"""Memory of the process: `use_huge_pages` starts the interpreter again at most once, with the same arguments."""

import gc
import os
import subprocess
import sys

import pytest

from readme_jax import memory

PROGRAM = """
import os, sys
from readme_jax.memory import use_huge_pages
print("begun", flush=True)
use_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:])
"""


def run(**environment: str) -> list[str]:
    inherited = {k: v for k, v in os.environ.items() if k != memory.TUNABLES}
    command = [sys.executable, "-c", PROGRAM, "--flag", "two words"]
    return subprocess.run(
        command, env=inherited | environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()


offered = memory.OFFERED.exists() and "[madvise]" in memory.OFFERED.read_text()


@pytest.mark.skipif(not offered, reason="this system gives no huge pages on request")
def test_starts_again_once_with_its_arguments_and_tunables():
    assert run() == ["begun", "begun", "glibc.malloc.hugetlb=1 --flag two words"]
    assert run(GLIBC_TUNABLES="glibc.malloc.check=0")[-1].startswith("glibc.malloc.check=0:glibc.malloc.hugetlb=1")


def test_leaves_a_choice_of_the_user_alone():
    assert run(GLIBC_TUNABLES="glibc.malloc.hugetlb=0") == ["begun", "glibc.malloc.hugetlb=0 --flag two words"]


def test_trim_is_harmless():
    memory.trim()


def test_a_collection_leaves_alone_what_has_settled():
    class Kept(list):
        pass

    kept = [Kept() for _ in range(1000)]
    memory.settle()
    try:
        assert not any(type(each) is Kept for each in gc.get_objects())  # those that a collection looks at
    finally:
        gc.unfreeze()
    assert sum(type(each) is Kept for each in gc.get_objects()) == len(kept)
