"""Bytes of single tokens, for byte-level and SentencePiece-like vocabularies."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from readme_jax.checkpoints.tokenizer import Tokenizer
from readme_jax.serving.http.tokens import TokenTexts


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """Words with a leading space mark, and bytes for what is missing."""
    vocab = {"<unk>": 0} | {f"<0x{b:02X}>": b + 1 for b in range(256)} | {"\u2581": 257, "a": 258, "\u2581a": 259}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=[("\u2581", "a")], unk_token="<unk>", byte_fallback=True)
    )
    replaced = tokenizers.decoders.Replace("\u2581", " ")
    backend.decoder = tokenizers.decoders.Sequence(
        [replaced, tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    backend.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    return Tokenizer(backend)


@pytest.mark.parametrize("kind", ["tiny_tokenizer", "sentencepiece"])
@given(text=st.text(max_size=12))
def test_tokens_add_up_to_the_text(kind, text, request):
    tokenizer = request.getfixturevalue(kind)
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode(text)
    assert b"".join(texts.bytes(i) for i in ids) == text.encode()
    whole = [(texts.text(i), at) for i, at in zip(ids, texts.offsets(ids), strict=True)]
    for piece, at in whole:
        assert piece.startswith("bytes:") or text[at : at + len(piece)] == piece


def test_special_and_unknown_tokens(tiny_tokenizer, sentencepiece):
    texts = TokenTexts(tiny_tokenizer)
    assert texts.text(256) == "<|end|>"
    assert texts.text(259) == "token_id:259"  # the model's vocabulary is padded
    distinct = {texts.text(i) for i in range(260)}
    assert len(distinct) == 260
    assert TokenTexts(sentencepiece).text(259) == " a"
    assert TokenTexts(sentencepiece).text(0xE2 + 1) == "bytes:\\xe2"
