"""A folder of text as users bring it: <domain>/train.jsonl[.gz|.zst] and <domain>/validation.jsonl[.gz|.zst]."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import zstandard

from readme_jax.errors import DataError

SPLITS = ("train", "validation")
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
LAYOUT = "<domain>/train.jsonl[.gz|.zst] and <domain>/validation.jsonl[.gz|.zst]"


def split_file(folder: Path, domain: str, split: str) -> Path:
    """The one file of a split. Raises DataError when there is none, or more than one."""
    found = [path for suffix in SUFFIXES if (path := folder / domain / f"{split}{suffix}").is_file()]
    if not found:
        raise DataError(f"domain {domain!r} of {folder} has no {split}.jsonl[.gz|.zst]: add that file")
    if len(found) > 1:
        raise DataError(f"domain {domain!r} of {folder} has both {found[0].name} and {found[1].name}: keep one")
    return found[0]


def find_domains(folder: Path, wanted: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The wanted domains in their order, or every domain of the folder, sorted. Raises DataError."""
    if not folder.is_dir():
        raise DataError(f"no data folder {folder}: Data.folder must hold {LAYOUT}, or be 'starter'")
    present = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not present:
        raise DataError(f"{folder} holds no domain: expected {LAYOUT}")
    for domain in wanted:
        if domain not in present:
            raise DataError(f"no domain {domain!r} in {folder}: it has {', '.join(present)}")
    if len(set(wanted)) < len(wanted):
        raise DataError(f"Data.domains names a domain twice: {', '.join(wanted)}")
    domains = wanted or tuple(present)
    for domain in domains:
        for split in SPLITS:
            split_file(folder, domain, split)
    return domains


def _zstd_lines(path: Path) -> Iterator[bytes]:
    """Lines of a file of zstd frames. (zstandard's own reader takes a file that is cut short for a whole one.)"""
    decoder, rest = zstandard.ZstdDecompressor().decompressobj(), b""
    with path.open("rb") as stream:
        while chunk := stream.read(2**20):
            while chunk:
                if decoder.eof:
                    decoder = zstandard.ZstdDecompressor().decompressobj()
                *lines, rest = (rest + decoder.decompress(chunk)).split(b"\n")
                yield from lines
                chunk = decoder.unused_data
    if not decoder.eof:
        raise EOFError("the last frame does not end")
    if rest:
        yield rest


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        if path.suffix == ".zst":
            yield from enumerate(_zstd_lines(path), start=1)
            return
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            yield from enumerate(stream, start=1)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path} is damaged or cut short ({error}): copy it again") from None


def read_documents(path: Path) -> Iterator[str]:
    """The `text` of each row, in file order; rows whose text is blank are passed over.

    Raises DataError naming the file and line of a row that is not a JSON object with a string `text`.
    """
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:  # also bytes that are not UTF-8
            raise DataError(f"{path}, line {number}: not JSON lines (one object with a text field a line)") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DataError(f"{path}, line {number}: the row has no string field 'text'")
        if row["text"].strip():
            yield row["text"]


def content_key(*paths: Path) -> str:
    """A hash of the bytes of the files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:20]
