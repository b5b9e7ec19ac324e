"""The two kinds of folders that text comes from, behind one interface: which domains, and how each is prepared."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import tensorflow_datasets as tfds

from readme_jax.config import Data
from readme_jax.data.domain_text.domain_text_dataset_builder import Builder as DomainText
from readme_jax.data.domain_text.domain_text_dataset_builder import DomainTextConfig
from readme_jax.data.redpajama.files import find_sources
from readme_jax.data.redpajama.redpajama_dataset_builder import Builder as RedPajama
from readme_jax.data.source import SPLITS, content_key, find_domains, split_file

EDGE = 1 << 16  # bytes read at both ends of a file that is too large to be read for its name in the cache


class TextFolder(Protocol):
    """Text by domain."""

    domains: tuple[str, ...]

    def key(self, domain: str) -> str:
        """What names a domain's text in the cache: it changes with the text."""
        ...

    def name(self, domain: str, split: str) -> str:
        """A split's text in errors."""
        ...

    def builder(self, domain: str, data_dir: Path) -> Any:
        """The tfds builder of a domain, with splits train and validation, which keeps its files in `data_dir`."""
        ...

    def prepare(self, domain: str, data_dir: Path) -> None:
        """Write them."""
        ...


class Domains:
    """<domain>/{train,validation}.jsonl[.gz|.zst]."""

    def __init__(self, folder: Path, wanted: tuple[str, ...]) -> None:
        self.folder, self.domains = folder, find_domains(folder, wanted)

    def key(self, domain: str) -> str:
        return content_key(*(split_file(self.folder, domain, s) for s in SPLITS))

    def name(self, domain: str, split: str) -> str:
        return str(split_file(self.folder, domain, split))

    def builder(self, domain: str, data_dir: Path) -> Any:
        config = DomainTextConfig(name=domain, folder=str(self.folder))
        return DomainText(config=config, data_dir=data_dir, file_format="array_record")

    def prepare(self, domain: str, data_dir: Path) -> None:
        self.builder(domain, data_dir).download_and_prepare()


class RedPajamaFiles:
    """RedPajama's published files."""

    def __init__(self, folder: Path, wanted: tuple[str, ...]) -> None:
        self.folder, self.files = folder, find_sources(folder, wanted)
        self.domains = tuple(self.files)

    def key(self, domain: str) -> str:
        """Of the names, sizes and both ends of the files: reading terabytes at every start would take hours."""
        digest = hashlib.sha256()
        for path in self.files[domain]:
            size = path.stat().st_size
            digest.update(f"{path.relative_to(self.folder)} {size}\n".encode())
            with path.open("rb") as stream:
                digest.update(stream.read(EDGE))
                stream.seek(max(0, size - EDGE))
                digest.update(stream.read(EDGE))
        return digest.hexdigest()[:20]

    def name(self, domain: str, split: str) -> str:
        return f"RedPajama's {domain} ({split})"

    def builder(self, domain: str, data_dir: Path) -> Any:
        return RedPajama(config=domain, data_dir=data_dir, file_format="array_record")

    def prepare(self, domain: str, data_dir: Path) -> None:
        download = tfds.download.DownloadConfig(manual_dir=self.folder)
        self.builder(domain, data_dir).download_and_prepare(download_config=download)


def open_text(config: Data, folder: Path) -> TextFolder:
    """The text folder of a run. Raises DataError when files are missing, each named."""
    kind = RedPajamaFiles if config.source == "redpajama" else Domains
    return kind(folder, config.domains)
