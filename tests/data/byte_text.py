"""A tokenizer of bytes and a little text, shared by the tests of this folder and the processes they start."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

EOS, BOS = 256, 257


class ByteTokenizer:
    """UTF-8 bytes as ids; counts the texts it was given."""

    document_end: int | None = EOS

    def __init__(self, bos: bool = False, fingerprint: str = "bytes") -> None:
        self.bos_id: int | None = BOS if bos else None
        self.fingerprint = fingerprint
        self.texts = 0

    def encode(self, text: str, special: bool = True) -> list[int]:
        self.texts += 1
        return [BOS] * (special and self.bos_id is not None) + list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]


TEXTS = {
    "maths": [f"Theorem {i}: {'x' * (i % 7)} plus é is {i * i}." for i in range(40)],
    "news": [f"Report {i}: it rained on day {i}.\nMore follows." for i in range(25)],
    "code": [f"def f{i}():\n    return {i}\n" for i in range(60)],
}
VALIDATION = {domain: [f"{domain} held out {i}: {'ab ' * 20}" for i in range(6)] for domain in TEXTS}


def write_rows(path: Path, texts: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t, "meta": 1}) + "\n" for t in texts), encoding="utf-8")
