"""Batches: order, epochs, mixtures and processes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from byte_text import ByteTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from readme_jax.data.packing import num_sequences, pack
from readme_jax.data.pipeline import Batches, calibration_batches
from readme_jax.errors import ConfigError, DataError

LENGTH = 8
COUNTS = {"a": 5, "b": 12, "c": 30}  # sequences; each starts with its domain's letter and its number


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("packed")
    files = {}
    for name, count in COUNTS.items():
        texts = [f"{name}{i:06d}" for i in range(count)]  # 7 bytes and EOS: one sequence each
        files[name] = pack(root / name, texts, ByteTokenizer(), LENGTH, name)
        assert num_sequences(files[name]) == count
    return files


def labels(tokens: np.ndarray) -> list[str]:
    return [bytes(row[:-1].tolist()).decode() for row in tokens]


def first(batches: Batches, count: int) -> list[str]:
    return [label for i in range(count) for label in labels(batches[i]["tokens"])]


def test_shapes_types_and_domain_labels(packed: dict[str, Path]) -> None:
    batch = Batches(packed, 6, "even", 1)[3]
    assert batch["tokens"].shape == (6, LENGTH) and batch["tokens"].dtype == np.int32
    assert batch["domain"].shape == (6,) and batch["domain"].dtype == np.int32
    assert [label[0] for label in labels(batch["tokens"])] == ["abc"[d] for d in batch["domain"]]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    index=st.integers(0, 10**7),
    processes=st.sampled_from([1, 2, 3, 6]),
    mixture=st.sampled_from(["natural", "even"]),
)
def test_processes_together_hold_the_global_batch(
    packed: dict[str, Path], seed: int, index: int, processes: int, mixture: str
) -> None:
    whole = Batches(packed, 6, mixture, seed)[index]  # type: ignore[arg-type]
    parts = [Batches(packed, 6, mixture, seed, "train", p, processes)[index] for p in range(processes)]  # type: ignore[arg-type]
    for key in whole:
        assert np.concatenate([part[key] for part in parts]).tobytes() == whole[key].tobytes()


@pytest.mark.parametrize("mixture", ["natural", "even"])
def test_every_epoch_of_a_domain_has_each_sequence_once_in_a_new_order(packed: dict[str, Path], mixture: str) -> None:
    seen = first(Batches(packed, 4, mixture, 3), 200)  # type: ignore[arg-type]
    for name, count in COUNTS.items():
        mine = [label for label in seen if label[0] == name]
        epochs = [mine[i : i + count] for i in range(0, len(mine) - count + 1, count)]
        assert len(epochs) >= 3
        for epoch in epochs:
            assert sorted(epoch) == [f"{name}{i:06d}" for i in range(count)]
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_mixtures_have_their_weights(packed: dict[str, Path]) -> None:
    total = sum(COUNTS.values())
    natural = Counter(label[0] for label in first(Batches(packed, total, "natural", 0), 10))
    assert all(abs(natural[name] - 10 * count) <= 2 for name, count in COUNTS.items())
    even = Counter(label[0] for label in first(Batches(packed, 6, "even", 0), 50))
    assert even == {"a": 100, "b": 100, "c": 100}


def test_order_depends_on_seed_and_stream_only(packed: dict[str, Path]) -> None:
    base = first(Batches(packed, 6, "even", 0, "router"), 12)
    assert first(Batches(packed, 6, "even", 0, "router"), 12) == base
    assert first(Batches(packed, 3, "even", 0, "router"), 24) == base
    for other in (Batches(packed, 6, "even", 1, "router"), Batches(packed, 6, "even", 0, "expert")):
        assert first(other, 12) != base
    epochs = [[x for x in first(Batches(packed, 6, "even", seed), 12) if x[0] == "a"] for seed in (0, 1)]
    assert epochs[0][5:10] != epochs[1][:5]  # a seed is no shifted epoch of its neighbour


def test_random_access_needs_no_history(packed: dict[str, Path]) -> None:
    batches = Batches(packed, 4, "natural", 9)
    forward = [batches[i]["tokens"].tobytes() for i in range(20)]
    assert [batches[i]["tokens"].tobytes() for i in reversed(range(20))] == forward[::-1]
    with pytest.raises(IndexError):
        batches[-1]


def test_batch_must_divide_over_processes(packed: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="multiple of the 4 processes"):
        Batches(packed, 6, process_count=4)


def test_calibration_reads_each_sequence_at_most_once(packed: dict[str, Path]) -> None:
    batches = list(calibration_batches(packed["b"], 9 * LENGTH, 4, 0, "b", "b"))
    assert [b.shape for b in batches] == [(4, LENGTH)] * 3  # 9 sequences fill 3 batches
    seen = [label for b in batches for label in labels(b)]
    assert sorted(seen) == [f"b{i:06d}" for i in range(12)]
    assert seen != sorted(seen)
    with pytest.raises(DataError, match="b has 12 training sequences of 8 tokens, fewer than the 16"):
        calibration_batches(packed["b"], 13 * LENGTH, 4, 0, "b", "b")
