"""Tokenise the documents of a domain and pack them into sequences of equal length, once, in an array_record cache."""

# T sequence length

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from readme_jax.data.cache import make_once
from readme_jax.errors import DataError

BATCH_CHARACTERS = 2**20  # text tokenised at once: enough to keep the tokenizer's threads busy
SHARD_BYTES = 1 << 28  # of packed tokens a file, at most
FORMAT = 3  # part of the cache key: raise it when the packing below changes


class TextTokenizer(Protocol):
    """What packing needs of `checkpoints.tokenizer.Tokenizer`."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def document_end(self) -> int | None: ...
    @property
    def fingerprint(self) -> str: ...
    def encode(self, text: str, special: bool = True) -> list[int]: ...
    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...


def packed_key(tokenizer: TextTokenizer, sequence_length: int, source: str) -> str:
    """The cache key of packed tokens: it changes with the tokenizer, the length and the text."""
    parts = json.dumps([FORMAT, tokenizer.fingerprint, sequence_length, source])
    return hashlib.sha256(parts.encode()).hexdigest()[:20]


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    characters = 0
    for text in documents:
        chunk.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _separator(tokenizer: TextTokenizer) -> int:
    if tokenizer.document_end is None:
        raise DataError("the tokenizer names no end-of-text token, which separates documents: set eos_token")
    return tokenizer.document_end


def token_stream(documents: Iterable[str], tokenizer: TextTokenizer) -> Iterator[np.ndarray]:
    """The tokens of the documents in order, [n] int32 a chunk; every document is closed by one end-of-text token."""
    end = _separator(tokenizer)
    for chunk in _chunks(documents):
        pieces: list[int] = []
        for ids in tokenizer.encode_batch(chunk):
            pieces.extend(ids)
            if ids[-1:] != [end]:
                pieces.append(end)
        yield np.asarray(pieces, np.int32)


def pack(folder: Path, documents: Iterable[str], tokenizer: TextTokenizer, sequence_length: int, name: str) -> Path:
    """Write the documents' tokens into `folder` as records of T int32 tokens (little-endian), unless it is there.

    Shards hold `SHARD_BYTES`. The tokens left over at the end, fewer than T, are dropped. `name` names the text in
    errors. Returns the folder. Raises DataError when there are fewer tokens than one sequence.
    """

    def write(scratch: Path) -> None:
        shards, rest, total = _Shards(scratch, max(1, SHARD_BYTES // (4 * sequence_length))), np.zeros(0, np.int32), 0
        for tokens in token_stream(documents, tokenizer):
            total += len(tokens)
            rest = np.concatenate([rest, tokens])
            whole = len(rest) // sequence_length * sequence_length
            for sequence in rest[:whole].reshape(-1, sequence_length):
                shards.write(sequence.astype("<i4").tobytes())
            rest = rest[whole:]
        shards.close()
        if total < sequence_length:
            raise DataError(
                f"{name} has {total} tokens, fewer than one sequence of {sequence_length}: "
                "add text or lower Data.sequence_length"
            )

    return make_once(folder, write)


class _Shards:
    """Records in files of `size` records each, numbered from 0."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size, self.written = folder, size, 0
        self.writer: ArrayRecordWriter | None = None

    def write(self, record: bytes) -> None:
        if self.written % self.size == 0:
            self.close()
            path = self.folder / f"tokens-{self.written // self.size:05d}.array_record"
            self.writer = ArrayRecordWriter(str(path), "group_size:1")
        assert self.writer is not None
        self.writer.write(record)
        self.written += 1

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def shard_files(packed: Path) -> list[str]:
    """The files of a folder of packed tokens, in order."""
    return [str(path) for path in sorted(packed.glob("tokens-*.array_record"))]


def num_sequences(packed: Path) -> int:
    """How many sequences a folder of packed tokens holds."""
    readers = [ArrayRecordReader(path) for path in shard_files(packed)]
    count = sum(reader.num_records() for reader in readers)
    for reader in readers:
        reader.close()
    return count


def validation_windows(
    documents: Iterable[str], tokenizer: TextTokenizer, tokens: int, window: int, name: str
) -> np.ndarray:
    """The first tokens of the documents as windows without overlap: int32 [tokens // window, window].

    Documents are joined by end-of-text. Where the tokenizer puts a BOS before text, each window starts with one, which
    counts among its tokens, and there is no other. Raises DataError when there is too little text.
    """
    end = _separator(tokenizer)
    bos = [tokenizer.bos_id] if tokenizer.bos_id is not None and tokenizer.bos_id in tokenizer.encode("", True) else []
    count, body = tokens // window, window - len(bos)
    if count < 1 or body < 1:
        raise DataError(f"{name}: {tokens} validation tokens are fewer than one window of {window}")
    stream: list[int] = []
    for text in documents:
        stream += [*tokenizer.encode(text, special=False), end]
        if len(stream) >= count * body:
            break
    if len(stream) < count * body:
        raise DataError(
            f"{name} has {len(stream)} tokens, fewer than the {count * body} to validate on: "
            "add text or lower Data.validation_tokens"
        )
    rows = np.asarray(stream[: count * body], np.int32).reshape(count, body)
    return np.concatenate([np.tile(np.asarray(bos, np.int32), (count, 1)), rows], axis=1)
