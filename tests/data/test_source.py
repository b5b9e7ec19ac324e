"""Reading the text folders of users, and the one line each mistake in them gets."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import zstandard

from readme_jax.data.source import content_key, find_domains, read_documents
from readme_jax.errors import DataError


def one_line(error: pytest.ExceptionInfo[DataError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_reads_compressed_rows_in_file_order(tmp_path: Path, suffix: str) -> None:
    texts = ["first", "naïve\u2028line", "  ", "third"]
    data = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts).encode() + b"\n"
    cut = len(data) // 2  # files joined by `cat` have several frames
    pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.ZstdCompressor().compress}[suffix]
    path = tmp_path / f"train.{suffix}"
    path.write_bytes(pack(data[:cut]) + pack(data[cut:]))
    assert list(read_documents(path)) == ["first", "naïve\u2028line", "third"]


@pytest.mark.parametrize(
    "line",
    [
        b"plain words",
        b'{"text": "cut',
        b"\xff\xfe\x00",
        b'["text"]',
        b'{"body": "x"}',
        b'{"text": 3}',
        b'{"text": null}',
    ],
)
def test_bad_row_names_file_and_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(DataError) as error:
        list(read_documents(path))
    assert f"{path}, line 3:" in one_line(error)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "not compressed"])
def test_damaged_file_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    data = "".join(json.dumps({"text": f"row {i * 7919}"}) + "\n" for i in range(5000)).encode()
    packed = gzip.compress(data) if suffix == "gz" else zstandard.ZstdCompressor().compress(data)
    path = tmp_path / f"train.jsonl.{suffix}"
    path.write_bytes(packed[: len(packed) // 2] if damage == "cut" else data)
    with pytest.raises(DataError) as error:
        list(read_documents(path))
    assert str(path) in one_line(error)


def test_finds_domains_sorted_or_as_asked(folder: Path) -> None:
    (folder / ".hidden").mkdir()
    assert find_domains(folder) == ("code", "maths", "news")
    assert find_domains(folder, ("news", "code")) == ("news", "code")


@pytest.mark.parametrize(
    ("spoil", "wanted", "message"),
    [
        ("", ("poetry",), r"no domain 'poetry' in .*: it has code, maths, news"),
        ("", ("news", "news"), r"names a domain twice"),
        ("rm news/train.jsonl", (), r"domain 'news' of .* has no train\.jsonl"),
        ("rm code/validation.jsonl", (), r"domain 'code' of .* has no validation\.jsonl"),
        ("cp news/train.jsonl news/train.jsonl.gz", (), r"both train\.jsonl and train\.jsonl\.gz"),
    ],
)
def test_wrong_folder_is_explained(folder: Path, spoil: str, wanted: tuple[str, ...], message: str) -> None:
    match spoil.split():
        case ["rm", name]:
            (folder / name).unlink()
        case ["cp", source, target]:
            (folder / target).write_bytes((folder / source).read_bytes())
    with pytest.raises(DataError) as error:
        find_domains(folder, wanted)
    assert re.search(message, one_line(error))


def test_missing_and_empty_folders_are_explained(tmp_path: Path) -> None:
    for path, message in [(tmp_path / "nowhere", "no data folder"), (tmp_path, "holds no domain")]:
        with pytest.raises(DataError) as error:
            find_domains(path)
        assert message in one_line(error)


def test_content_key_follows_bytes_not_names(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("one")
    b.write_text("one")
    assert content_key(a) == content_key(b)
    assert content_key(a, b) != content_key(a)
    b.write_text("two")
    assert content_key(a) != content_key(b)
