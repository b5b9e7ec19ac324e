"""A small text folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from byte_text import TEXTS, VALIDATION, write_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "text"
    for domain in TEXTS:
        write_rows(root / domain / "train.jsonl", TEXTS[domain])
        write_rows(root / domain / "validation.jsonl", VALIDATION[domain])
    return root


@pytest.fixture
def rows() -> Callable[[Path, Sequence[str]], None]:
    return write_rows
