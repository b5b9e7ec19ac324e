"""Preparing text: what comes out, that it is made once, and that nothing half-made is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from byte_text import BOS, EOS, TEXTS, VALIDATION, ByteTokenizer

from readme_jax.config import Data
from readme_jax.data.cache import make_once
from readme_jax.data.corpus import Corpus, open_corpus
from readme_jax.data.packing import num_sequences, pack, shard_files, validation_windows
from readme_jax.data.pipeline import Batches
from readme_jax.errors import DataError

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
SHARED = HERE.parents[2] / "shared" / "data" / "corpus"


def read_packed(path: Path) -> np.ndarray:
    records = (record for shard in shard_files(path) for record in ArrayRecordReader(shard).read_all())
    return np.stack([np.frombuffer(record, "<i4") for record in records])


def opened(folder: Path, tokenizer: ByteTokenizer | None = None, **settings: object) -> Corpus:
    config = Data(**{"folder": str(folder), "sequence_length": 64, "validation_tokens": 256, **settings})
    return open_corpus(config, tokenizer or ByteTokenizer(), folder.parent / "cache")


def files_below(path: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file() and not p.name.endswith(".lock")}


@pytest.mark.parametrize("bos", [False, True])
def test_packed_sequences_hold_the_documents_in_order_joined_by_eos(folder: Path, bos: bool) -> None:
    corpus = opened(folder, ByteTokenizer(bos))
    assert corpus.domains == ("code", "maths", "news")
    for domain in corpus.domains:
        stream = [token for text in TEXTS[domain] for token in [*[BOS] * bos, *text.encode(), EOS]]
        whole = len(stream) // 64
        np.testing.assert_array_equal(read_packed(corpus.packed[domain]).reshape(-1), stream[: whole * 64])
        assert corpus.train_tokens(domain) == whole * 64


def test_what_is_read_does_not_depend_on_where_it_lies(folder: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere" / "corpus")
    here, there = opened(folder), opened(elsewhere)
    for domain in here.domains:
        count = here.train_tokens(domain) // 64
        mine, theirs = (np.concatenate(list(c.calibration(domain, 64 * count, 1))) for c in (here, there))
        assert count > 1
        np.testing.assert_array_equal(mine, theirs)
    for i in range(3):
        np.testing.assert_array_equal(*(c.batches("router", 4, 0)[i]["tokens"] for c in (here, there)))


def test_documents_keep_file_order_and_characters(folder: Path) -> None:
    corpus = opened(folder)
    assert list(corpus.documents("maths", "train")) == TEXTS["maths"]
    assert list(corpus.documents("news")) == VALIDATION["news"]
    with pytest.raises(DataError, match="no domain 'poetry'"):
        corpus.documents("poetry")


def test_second_opening_writes_and_tokenises_nothing(folder: Path) -> None:
    first = dict(opened(folder).packed)
    before = files_below(folder.parent / "cache")
    tokenizer = ByteTokenizer()
    assert dict(opened(folder, tokenizer).packed) == first
    assert tokenizer.texts == 0
    assert files_below(folder.parent / "cache") == before


def test_cache_follows_text_tokenizer_and_length(folder: Path, rows: Callable[..., None]) -> None:
    base = opened(folder).packed
    assert set(base.values()).isdisjoint(opened(folder, ByteTokenizer(fingerprint="other")).packed.values())
    assert set(base.values()).isdisjoint(opened(folder, sequence_length=32).packed.values())
    rows(folder / "news" / "train.jsonl", [*TEXTS["news"], "one more report"])
    changed = opened(folder).packed
    assert changed["news"] != base["news"]
    assert changed["code"] == base["code"]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("window", [64, 100])
def test_validation_is_the_first_tokens_with_one_bos_a_window(folder: Path, bos: bool, window: int) -> None:
    windows = opened(folder, ByteTokenizer(bos)).validation("news", window)
    assert windows.shape == (256 // window, window)
    assert windows.dtype == np.int32
    text = [token for t in VALIDATION["news"] for token in [*t.encode(), EOS]]
    if bos:
        assert (windows[:, 0] == BOS).all()
        windows = windows[:, 1:]
    assert BOS not in windows
    np.testing.assert_array_equal(windows.reshape(-1), text[: windows.size])


def test_validation_reads_no_more_text_than_it_needs() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "word " * 10

    assert validation_windows(endless(), ByteTokenizer(), 128, 64, "x").shape == (2, 64)


def test_too_little_text_is_explained(folder: Path) -> None:
    with pytest.raises(DataError, match=r"code/train\.jsonl has \d+ tokens, fewer than one sequence of 4096") as error:
        opened(folder, sequence_length=4096).batches("train", 2, 0)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"news/validation\.jsonl has \d+ tokens, fewer than the 4096 to validate on"):
        opened(folder, validation_tokens=4096).validation("news")
    with pytest.raises(DataError, match="fewer than one window of 1024"):
        opened(folder).validation("news")
    assert not [p for p in (folder.parent / "cache").rglob("*") if p.name.endswith(".partial")]


@pytest.mark.parametrize("text", ["", '{"text": " "}\n'])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_empty_domain_is_named(folder: Path, text: str, split: str) -> None:
    (folder / "maths" / f"{split}.jsonl").write_text(text)
    with pytest.raises(DataError, match=rf"domain 'maths' is empty: .*{split}\.jsonl") as error:
        opened(folder)
    assert "\n" not in str(error.value)


def test_unreadable_text_is_named_and_leaves_nothing(folder: Path) -> None:
    (folder / "maths" / "validation.jsonl").write_text('{"text": "fine"}\nnot json\n')
    with pytest.raises(DataError, match=r"maths/validation\.jsonl, line 2: not JSON lines"):
        opened(folder, domains=("maths",))
    assert files_below(folder.parent / "cache") == {}


def test_no_folder_and_no_eos_are_explained(folder: Path) -> None:
    with pytest.raises(DataError, match="Data.folder is empty"):
        open_corpus(Data(), ByteTokenizer(), folder.parent / "cache")
    tokenizer = ByteTokenizer()
    tokenizer.document_end = None
    with pytest.raises(DataError, match="no end-of-text token"):
        opened(folder, tokenizer).batches("train", 2, 0)


def test_domain_names_need_not_be_identifiers(folder: Path) -> None:
    (folder / "news").rename(folder / "news, 1993 (c++)")
    corpus = opened(folder, domains=("news, 1993 (c++)",))
    assert list(corpus.documents(corpus.domains[0])) == VALIDATION["news"]


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    def full(scratch: Path) -> None:
        (scratch / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"cannot prepare .*made: No space left on device"):
        make_once(tmp_path / "made", full)
    assert files_below(tmp_path) == {}


def test_killed_preparation_is_redone_whole(folder: Path) -> None:
    cache = folder.parent / "cache"
    script = """
        import os, signal, sys
        from pathlib import Path
        from readme_jax.config import Data
        from readme_jax.data.corpus import open_corpus
        from readme_jax.data import packing
        from byte_text import ByteTokenizer
        packing.BATCH_CHARACTERS = 100
        class Dying(ByteTokenizer):
            def encode_batch(self, texts):
                if self.texts > 20:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().encode_batch(texts)
        data = Data(folder=sys.argv[1], sequence_length=64)
        open_corpus(data, Dying(), Path(sys.argv[2])).packed
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(folder), str(cache)]
    done = subprocess.run(command, env=ENVIRONMENT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(cache.glob("packed/.code-*.partial"))
    assert not list(cache.glob("packed/code-*"))
    corpus = opened(folder)
    stream = [token for text in TEXTS["code"] for token in [*text.encode(), EOS]]
    packed = read_packed(corpus.packed["code"]).reshape(-1)
    np.testing.assert_array_equal(packed, stream[: len(stream) // 64 * 64])
    assert not list(cache.glob("packed/.code-*.partial"))


def test_packing_does_not_depend_on_how_text_is_chunked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = shard_files(pack(tmp_path / "a", TEXTS["maths"], ByteTokenizer(), 16, "x"))
    monkeypatch.setattr("readme_jax.data.packing.BATCH_CHARACTERS", 1)
    (alike,) = shard_files(pack(tmp_path / "b", TEXTS["maths"], ByteTokenizer(), 16, "x"))
    assert Path(alike).read_bytes() == Path(whole).read_bytes()


def test_shards_hold_the_same_sequences_as_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pack(tmp_path / "a", TEXTS["maths"], ByteTokenizer(), 16, "x")
    monkeypatch.setattr("readme_jax.data.packing.SHARD_BYTES", 4 * 16 * 7)  # seven sequences
    parts = pack(tmp_path / "b", TEXTS["maths"], ByteTokenizer(), 16, "x")
    count = num_sequences(whole)
    assert num_sequences(parts) == count and len(shard_files(parts)) == -(-count // 7) > 2
    np.testing.assert_array_equal(read_packed(parts), read_packed(whole))
    for index in (0, 5, 10**6):
        one, many = (Batches({"x": folder}, 4, "even", 3)[index]["tokens"] for folder in (whole, parts))
        np.testing.assert_array_equal(one, many)


def test_no_tensorflow_is_imported(folder: Path) -> None:
    script = f"""
        import sys
        from pathlib import Path
        from readme_jax.config import Data
        from readme_jax.data.corpus import open_corpus
        from byte_text import ByteTokenizer
        data = Data(folder={str(folder)!r}, sequence_length=64, validation_tokens=64)
        corpus = open_corpus(data, ByteTokenizer(), Path({str(folder.parent / "cache")!r}))
        corpus.batches("train", 2, 0)[0], corpus.validation("news", 32)
        assert "tensorflow" not in sys.modules and "grain" in sys.modules and "tensorflow_datasets" in sys.modules
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "DomainTextConfig" not in done.stderr


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared corpus beside the checkout")
def test_opens_the_shared_corpus(tmp_path: Path) -> None:
    data = Data(folder=str(SHARED), domains=("wikipedia",), validation_tokens=4096)
    corpus = open_corpus(data, ByteTokenizer(), tmp_path)
    assert corpus.validation("wikipedia", 1024).shape == (4, 1024)
    assert sum(1 for _ in corpus.documents("wikipedia", "train")) == 1888
