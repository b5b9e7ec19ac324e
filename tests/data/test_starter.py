"""The starter corpus: splitting, markup, and a part of it really built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from byte_text import ByteTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from readme_jax.config import Data
from readme_jax.data import starter
from readme_jax.data.corpus import open_corpus
from readme_jax.data.source import find_domains, read_documents
from readme_jax.data.starter import build_starter, split_documents
from readme_jax.data.starter_sources import Document
from readme_jax.data.wikitext import plain_text
from readme_jax.errors import DataError


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.randoms())
def test_split_is_disjoint_and_independent_of_order(numbers: list[int], random: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starter, "VALIDATION_CHARACTERS", 6000)
        patch.setattr(starter, "TRAIN_CHARACTERS", 12000)
        patch.setattr(starter, "EXCERPT_CHARACTERS", 300)
        documents = [Document(f"file {n}", f"line {n}\n" * 100) for n in numbers]
        splits = split_documents(documents)
        random.shuffle(documents)  # type: ignore[attr-defined]
        assert split_documents(documents) == splits
    names = [d.source for part in splits.values() for d in part]
    assert len(names) == len(set(names)), "a document is in both splits, or twice in one"
    assert {d.source for d in splits["validation"]} <= {f"file {n}" for n in numbers}
    assert all(len(d.text) <= 300 and d.text.endswith(d.source[5:]) for d in splits["validation"])


def test_short_documents_are_dropped() -> None:
    assert split_documents([Document("short", "x" * 499)]) == {"train": [], "validation": []}


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''Ohm''' is a [[unit (physics)|unit]] of [[resistance]]s.", "Ohm is a unit of resistances."),
        ("A{{cite|{{nested|x}}}} b<ref name=a>c {{d}}</ref> e<ref name=a /> f", "A b e f"),
        ("It is {{convert|5|km|mi}} to {{lang|fr|Paris}}.", "It is 5 km to Paris."),
        ("[[File:a.png|thumb|A [[cat]] here]]Text[[Category:Cats]]", "Text"),
        ("x\n{| class=w\n| a\n{|\n| b\n|}\n|}\ny", "x\n\ny"),
        ("== History ==\nIt began.\n\n== References ==\n{{reflist}}", "History\nIt began."),
        ("* one\n* [http://a.b two]\n<!-- no -->three&nbsp;four", "one\ntwo\nthree four"),
        ("1 < 2 and <b>bold</b>", "1 < 2 and bold"),
        ("good\nbroken {{ line\nalso good", "good\n\nalso good"),
    ],
)
def test_wiki_markup_becomes_prose(markup: str, text: str) -> None:
    assert plain_text(markup) == text


def test_unknown_domain_and_no_network_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no domain 'poetry': it has book, "):
        build_starter(tmp_path / "starter", ("poetry",))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DataError, match=r"cannot fetch the starter corpus with pip \(.*pythran.*\)") as error:
        build_starter(tmp_path / "starter", ("cpp",))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "starter").exists()


def test_builds_news_and_wikipedia_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ("news", "wikipedia")
    try:
        folder = build_starter(tmp_path / "starter", wanted)
    except DataError as error:
        if any(sign in str(error) for sign in ("No matching distribution", "Could not find", "onnection")):
            pytest.skip(f"no package index: {error}")
        raise
    assert find_domains(folder) == wanted
    for domain in wanted:
        train, validation = (set(read_documents(folder / domain / f"{s}.jsonl")) for s in ("train", "validation"))
        assert sum(map(len, train)) > 500_000
        assert sum(map(len, validation)) >= starter.VALIDATION_CHARACTERS
        assert not any(kept.startswith(held) for held in validation for kept in train)
        text = "".join(train)
        assert not any(mark in text for mark in ("[[", "{{", "<ref", "NNTP-Posting-Host"))
    row = json.loads((folder / "wikipedia" / "train.jsonl").read_text().splitlines()[0])
    assert row["meta"]["source"].startswith("gensim 4.4.0: ")

    def fetch(*_: object) -> None:
        raise AssertionError("the second call must fetch nothing")

    monkeypatch.setattr(starter, "_download", fetch)
    assert build_starter(folder, wanted) == folder


def test_open_corpus_builds_only_the_domains_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(wheels: object) -> list[Document]:
        return [Document(f"{i}", f"text {i} " * 1000) for i in range(40)]

    monkeypatch.setattr(starter, "_download", lambda packages, folder: {})
    monkeypatch.setattr(starter, "DOMAINS", {name: ((), read) for name in ("one", "two", "three")})
    data = Data(folder="starter", domains=("two", "one"), sequence_length=64, validation_tokens=256)
    corpus = open_corpus(data, ByteTokenizer(), tmp_path)
    assert corpus.domains == ("two", "one")
    assert corpus.validation("two", 64).shape == (4, 64)
    assert [p.name for p in tmp_path.glob("starter-*/three")] == []
