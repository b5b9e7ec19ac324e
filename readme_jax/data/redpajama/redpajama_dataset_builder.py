"""A tensorflow-datasets builder for RedPajama's sources, one config a source, stored as array_record shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from readme_jax.data.redpajama.files import SOURCES, find_sources
from readme_jax.data.source import read_documents
from readme_jax.errors import DataError

# One document in so many is held out, chosen by a hash of its text: equal documents fall on one side. A book is long.
HELD_OUT = {name: 20 if name == "book" else 200 for name in SOURCES}


@dataclass
class RedPajamaConfig(tfds.core.BuilderConfig):
    """`name` is the source."""


def held_out(text: str, source: str) -> bool:
    """Whether a document belongs to the validation split."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little") % HELD_OUT[source] == 0


class Builder(tfds.core.GeneratorBasedBuilder):
    """Documents of one source, splits train and validation, in the order of its files; `text` arrives as bytes.

    `manual_dir` is the folder of the published files.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "RedPajama-1T and its sample; the publisher has no validation split."}
    BUILDER_CONFIGS = [RedPajamaConfig(name=name) for name in SOURCES]
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put the files of RedPajama-1T's urls.txt, or RedPajama-Data-1T-Sample, there."

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            disable_shuffling=True,  # training shuffles packed sequences
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        name = self.builder_config.name
        files = find_sources(Path(dl_manager.manual_dir), (name,))[name]
        return {split: self._generate_examples(files, split) for split in ("train", "validation")}

    def _generate_examples(self, files: list[Path], split: str) -> Iterator[tuple[int, dict[str, str]]]:
        source, number = self.builder_config.name, -1
        for path in files:
            for text in read_documents(path):
                if held_out(text, source) == (split == "validation"):
                    number += 1
                    yield number, {"text": text}
        if number < 0:
            raise DataError(f"RedPajama's {source}: no document for the {split} split in {len(files)} files: add files")
