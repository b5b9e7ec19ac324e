"""One of two processes that load a model onto a mesh of both: run by test_loading.py.

    python load_on_mesh.py FOLDER PORT PROCESS

Prints one JSON object, all in bytes: by how much the process grew at most, what each of its devices keeps, the model.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from collections import Counter
from pathlib import Path

import jax

from readme_jax import config
from readme_jax.checkpoints.hf import open_dense
from readme_jax.loading import dense_on_mesh
from readme_jax.parallel.mesh import make_mesh


def anonymous() -> int:
    """Memory of this process that is no file's: pages of the checkpoint do not count."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


class Peak(threading.Thread):
    """The most memory that was seen, looked at every two milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.over = 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.002):
            self.most = max(self.most, anonymous())


def main(folder: str, port: str, process: str) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    mesh = make_mesh(config.Mesh())
    opened, before, peak = open_dense(folder), anonymous(), Peak()
    peak.start()
    dense = dense_on_mesh(opened, "scanned", mesh)
    jax.block_until_ready(dense.params)
    peak.over.set()
    kept: Counter[int] = Counter()
    for leaf in jax.tree.leaves(dense.params):
        for shard in leaf.addressable_shards:
            kept[shard.device.id] += shard.data.nbytes
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(dense.params))
    print(json.dumps({"grown": peak.most - before, "devices": list(kept.values()), "whole": whole}))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
