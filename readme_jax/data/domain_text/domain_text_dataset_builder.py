"""A tensorflow-datasets builder for text, one config a domain, stored as array_record; TensorFlow is not imported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from readme_jax.data.source import SPLITS, read_documents, split_file
from readme_jax.errors import DataError


@dataclass
class DomainTextConfig(tfds.core.BuilderConfig):
    """`name` is the domain; `folder` holds <name>/train.jsonl and <name>/validation.jsonl, compressed or not."""

    folder: str = ""


class Builder(tfds.core.GeneratorBasedBuilder):
    """Documents of one domain, splits train and validation, in file order; feature `text` arrives as bytes."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Rows of a folder of JSON lines."}

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            disable_shuffling=True,  # validation reads the first tokens of the file; training shuffles packed sequences
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        folder, domain = Path(self.builder_config.folder), self.builder_config.name
        return {split: self._generate_examples(split_file(folder, domain, split)) for split in SPLITS}

    def _generate_examples(self, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
        number = -1
        for number, text in enumerate(read_documents(path)):
            yield number, {"text": text}
        if number < 0:
            raise DataError(f"domain {self.builder_config.name!r} is empty: {path} has no text")
