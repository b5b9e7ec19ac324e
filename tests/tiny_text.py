"""Text of three domains whose words tell them apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

WORDS = {"code": "def return if else for in", "news": "rain sun wind on monday", "verse": "and lo the king spoke"}


def write_text(folder: Path, train: int, validation: int = 10) -> None:
    """So many documents of twenty words a domain and split, as <folder>/<domain>/<split>.jsonl."""
    rng = np.random.default_rng(0)
    for domain, words in WORDS.items():
        for split, documents in (("train", train), ("validation", validation)):
            path = folder / domain / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            texts = [" ".join(rng.choice(words.split(), 20)) for _ in range(documents)]
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
