"""What jobs of several processes start from."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_text import write_text

from readme_jax.checkpoints.hf import Dense, save_dense


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, tiny_tokenizer) -> Path:
    """A folder with a dense model, `dense`, and text, `text`."""
    folder = tmp_path_factory.mktemp("multihost")
    dense = tiny_model("dense", tiny_tokenizer)
    save_dense(folder / "dense", Dense(dense.config, jax.tree.map(np.asarray, dense.params), tiny_tokenizer))
    write_text(folder / "text", train=40)
    return folder
