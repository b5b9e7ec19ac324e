"""Batches of packed sequences, mixed over domains, at random access through grain."""

# B batch (sequences), T sequence length

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import grain
import numpy as np

from readme_jax.data.packing import shard_files
from readme_jax.errors import ConfigError, DataError


def derived_seed(seed: int, *names: str) -> int:
    """A 32-bit seed for one named stream; streams and neighbouring seeds share no epochs."""
    return int.from_bytes(hashlib.sha256("/".join([str(seed), *names]).encode()).digest()[:4], "little")


def _sequences(records: Path, domain: int) -> grain.MapDataset:
    source = grain.sources.ArrayRecordDataSource(shard_files(records))
    index = np.int32(domain)
    return grain.MapDataset.source(source).map(
        lambda record: {"tokens": np.frombuffer(record, "<i4").astype(np.int32), "domain": index}
    )


class Batches:
    """`batches[i]` -> {"tokens": int32 [B, T], "domain": int32 [B]} for every i >= 0; the position is i alone.

    Each domain is shuffled anew every epoch and repeats for ever. Domains interleave by weight: equal ('even'), their
    numbers of sequences ('natural'), or weights of one's own, one a domain. The order depends on (seed, stream, index)
    and nothing else. Of several processes each gets its own contiguous rows [B / process_count, T] of the same batch.
    """

    def __init__(
        self,
        packed: Mapping[str, Path],
        batch: int,
        mixture: Literal["natural", "even"] | Sequence[float] = "even",
        seed: int = 0,
        stream: str = "train",
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """`packed` maps each domain, in the order its index counts, to its folder of packed tokens.

        Raises ConfigError when the batch does not divide over the processes.
        """
        if batch < 1 or batch % process_count:
            raise ConfigError(f"batch = {batch}: must be a positive multiple of the {process_count} processes")
        domains, weights = [], []
        for index, (name, records) in enumerate(packed.items()):
            sequences = _sequences(records, index)
            if isinstance(mixture, str):
                weights.append(float(len(sequences)) if mixture == "natural" else 1.0)
            else:
                weights.append(mixture[index])
            domains.append(sequences.shuffle(seed=derived_seed(seed, stream, name)).repeat())
        local = grain.MapDataset.mix(domains, weights).batch(batch // process_count, drop_remainder=True)
        self._local = local[process_index::process_count]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if index < 0:
            raise IndexError(f"batch {index}: the position counts from zero")
        return self._local[index]


def calibration_batches(
    records: Path, tokens: int, batch: int, seed: int, domain: str, name: str
) -> Iterator[np.ndarray]:
    """Shuffled sequences of one domain, each at most once, int32 [batch, T]: at least `tokens`, in whole batches.

    The order depends on (seed, domain) alone; `name` names the text in errors. Raises DataError when the domain has too
    few.
    """
    sequences = _sequences(records, 0).shuffle(seed=derived_seed(seed, "calibration", domain))
    length = len(sequences[0]["tokens"])
    steps = -(-tokens // (length * batch))
    if steps * batch > len(sequences):
        raise DataError(
            f"{name} has {len(sequences)} training sequences of {length} tokens, fewer than the {steps * batch} "
            "to calibrate on: add text or lower Slice.calibration_tokens"
        )
    batches = sequences.batch(batch, drop_remainder=True)
    return (batches[step]["tokens"] for step in range(steps))
