"""Single tokens as text and bytes, as logprobs show them."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from readme_jax.checkpoints.tokenizer import Tokenizer

_KEPT = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))  # byte-level vocabularies keep these bytes


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level vocabularies: what does not print moves above U+0100, in order."""
    moved = [b for b in range(256) if b not in _KEPT]
    return {chr(b): b for b in _KEPT} | {chr(0x100 + i): b for i, b in enumerate(moved)}


class TokenTexts:
    """The bytes of every id. Distinct ids have distinct texts wherever their bytes differ."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.backend = tokenizer.backend
        self.added = {i: t.content.encode() for i, t in self.backend.get_added_tokens_decoder().items()}
        self.alphabet = _byte_alphabet() if _mentions(json.loads(self.backend.to_str())["decoder"]) else None
        self.bytes = lru_cache(maxsize=1 << 17)(self._bytes)

    def _bytes(self, token: int) -> bytes:
        """What a token stands for; a padding id of the model, unknown to the tokenizer, is `token_id:N`."""
        if token in self.added:
            return self.added[token]
        piece = self.backend.id_to_token(token)
        if piece is None:
            return f"token_id:{token}".encode()
        if self.alphabet is not None:
            return bytes(self.alphabet[c] for c in piece) if all(c in self.alphabet for c in piece) else piece.encode()
        if len(piece) == 6 and piece.startswith("<0x"):  # SentencePiece's single bytes
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    def text(self, token: int) -> str:
        """The token's text; where its bytes are no whole characters, `bytes:\\xe2\\x82`."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)

    def offsets(self, tokens: Iterable[int], start: int = 0) -> list[int]:
        """Where in the text each token begins, in characters; a character belongs to the token that completes it."""
        decoder, at, found = codecs.getincrementaldecoder("utf-8")("replace"), start, []
        for token in tokens:
            found.append(at)
            at += len(decoder.decode(self.bytes(token)))
        return found


def _mentions(decoder: Any) -> bool:
    """Whether a decoder's settings contain a ByteLevel one."""
    if isinstance(decoder, Sequence) and not isinstance(decoder, str):
        return any(_mentions(d) for d in decoder)
    if isinstance(decoder, dict):
        return decoder.get("type") == "ByteLevel" or any(_mentions(d) for d in decoder.values())
    return False
