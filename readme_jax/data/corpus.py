"""`open_corpus`: the text of a run, prepared once and read by tuning, refactoring and evaluation."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow_datasets as tfds
from rich.console import Console
from rich.progress import track

from readme_jax.config import Data
from readme_jax.data.cache import default_cache, make_once
from readme_jax.data.packing import TextTokenizer, num_sequences, pack, packed_key, validation_windows
from readme_jax.data.pipeline import Batches, calibration_batches
from readme_jax.data.source import SPLITS
from readme_jax.data.starter import VERSION, build_starter
from readme_jax.data.text import open_text
from readme_jax.errors import ConfigError, DataError

Split = Literal["train", "validation"]


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """tfds prints about downloads and custom configs, neither of which is news here."""
    tfds.disable_progress_bar()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _progress(documents: Iterable[str], total: int, domain: str) -> Iterable[str]:
    console = Console(stderr=True)
    return track(
        documents, f"tokenising {domain}", total, console=console, transient=True, disable=not console.is_terminal
    )


class Corpus:
    """The domains of one text folder under one tokenizer. Text and packed tokens are made once in `cache`.

    Nothing is tokenised before it is asked for.
    """

    def __init__(self, folder: Path, config: Data, tokenizer: TextTokenizer, cache: Path) -> None:
        self.folder, self.config, self.tokenizer, self.cache = folder, config, tokenizer, cache
        self.source = open_text(config, folder)
        self.domains: tuple[str, ...] = self.source.domains
        if config.weights and len(config.weights) != len(self.domains):
            raise ConfigError(f"Data.weights: {len(config.weights)} weights for the domains {', '.join(self.domains)}")
        self._keys = {d: self.source.key(d) for d in self.domains}
        self._text: dict[tuple[str, str], Any] = {}
        for domain in self.domains:
            self._prepare(domain)

    def _prepare(self, domain: str) -> None:
        target = self.cache / "text" / f"{domain}-{self._keys[domain]}"
        with _quiet_tfds():
            make_once(target, lambda scratch: self.source.prepare(domain, scratch))
            builder = self.source.builder(domain, target)
            for split in SPLITS:
                self._text[domain, split] = builder.as_data_source(split=split)

    def _name(self, domain: str, split: str) -> str:
        return self.source.name(domain, split)

    def documents(self, domain: str, split: Split = "validation") -> Iterator[str]:
        """The texts of one split of one domain, in file order."""
        if domain not in self.domains:
            raise DataError(f"no domain {domain!r} in this run: it has {', '.join(self.domains)}")
        source = self._text[domain, split]
        return (bytes(source[i]["text"]).decode() for i in range(len(source)))

    @cached_property
    def packed(self) -> dict[str, Path]:
        """For each domain the folder of its packed training tokens; the first use tokenises all domains."""
        return {domain: self._pack(domain) for domain in self.domains}

    def _pack(self, domain: str) -> Path:
        length = self.config.sequence_length
        folder = self.cache / "packed" / f"{domain}-{packed_key(self.tokenizer, length, self._keys[domain])}"
        total = len(self._text[domain, "train"])
        documents = _progress(self.documents(domain, "train"), total, domain)
        return pack(folder, documents, self.tokenizer, length, self._name(domain, "train"))

    def train_tokens(self, domain: str) -> int:
        """Packed training tokens of a domain."""
        return num_sequences(self.packed[domain]) * self.config.sequence_length

    def batches(self, stream: str, batch: int, seed: int, process_index: int = 0, process_count: int = 1) -> Batches:
        """Training batches {"tokens": int32 [B, T], "domain": int32 [B]}; `domain` indexes `domains`."""
        mixture = self.config.weights or self.config.mixture
        return Batches(self.packed, batch, mixture, seed, stream, process_index, process_count)

    def calibration(self, domain: str, tokens: int, batch: int, seed: int = 0) -> Iterator[np.ndarray]:
        """Training sequences of one domain, int32 [batch, T], each at most once, `tokens` in all."""
        return calibration_batches(self.packed[domain], tokens, batch, seed, domain, self._name(domain, "train"))

    def validation(self, domain: str, window: int = 1024) -> np.ndarray:
        """The first `Data.validation_tokens` of a domain's validation text: int32 [n, window] without overlap."""
        name, tokens = self._name(domain, "validation"), self.config.validation_tokens
        return validation_windows(self.documents(domain), self.tokenizer, tokens, window, name)


def open_corpus(config: Data, tokenizer: TextTokenizer, cache: Path | None = None) -> Corpus:
    """Open the text folder of a run, or the starter corpus, and check that every document can be read.

    `cache` holds prepared text, packed tokens and the starter corpus (default: `default_cache()`). Tokens are made at
    the first use of `batches` or `calibration`. Raises DataError, one line, for text that cannot be used.
    """
    cache = default_cache() if cache is None else Path(cache)
    if not config.folder:
        raise DataError(f"Data.folder is empty: name a folder, or 'starter' for the corpus in {cache}")
    if config.folder == "starter":
        folder = build_starter(cache / f"starter-{VERSION}", config.domains)
    else:
        folder = Path(config.folder)
    return Corpus(folder, config, tokenizer, cache)
