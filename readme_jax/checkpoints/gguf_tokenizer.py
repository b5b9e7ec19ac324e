"""Tokenizers from GGUF metadata: byte-level BPE (`gpt2`) and SentencePiece BPE with byte fallback (`llama`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from readme_jax.checkpoints.tokenizer import Tokenizer
from readme_jax.errors import CheckpointError

Meta = Callable[..., Any]


class Kind(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Split:
    """How text is cut before merging; `whole` keeps words found in the vocabulary, whatever the merges say."""

    steps: tuple[pre_tokenizers.PreTokenizer, ...]
    whole: bool = False
    add_bos: bool = False  # where the metadata does not say


def _pattern(regex: str) -> tuple[pre_tokenizers.PreTokenizer, ...]:
    isolated = pre_tokenizers.Split(Regex(regex), behavior="isolated")
    return (isolated, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))


_GPT2 = (pre_tokenizers.ByteLevel(add_prefix_space=False),)
_PUNCTUATION_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n%s]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = Split(
    _pattern(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _PUNCTUATION_AND_SPACE.replace("%s", "")
    ),
    whole=True,
    add_bos=True,
)
_TEKKEN = Split(
    _pattern(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}|" + _PUNCTUATION_AND_SPACE.replace("%s", "/")
    ),
    whole=True,
    add_bos=True,
)
# `tokenizer.ggml.pre` -> how it splits
SPLITS = {
    "smollm": Split((pre_tokenizers.Digits(individual_digits=True), *_GPT2)),
    "gpt-2": Split(_GPT2),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "tekken": _TEKKEN,
}


def tokenizer_from_metadata(path: Path, meta: Meta) -> Tokenizer:
    """The tokenizer that `tokenizer.*` metadata describe; `meta(key, default)` reads one value.

    Raises CheckpointError for a kind or a pre-tokenizer that is not known here.
    """
    kind = meta("tokenizer.ggml.model")
    build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(kind)
    if build is None:
        raise CheckpointError(f"{path}: unsupported tokenizer {kind!r}; supported are 'gpt2' and 'llama'")
    tokens = meta("tokenizer.ggml.tokens")
    if tokens is None:
        raise CheckpointError(f"{path}: metadata tokenizer.ggml.tokens is missing")
    kinds = meta("tokenizer.ggml.token_type") or [Kind.NORMAL] * len(tokens)
    backend, add_bos = build(path, meta, tokens, kinds)
    _add_special(backend, tokens, kinds)
    bos, eos = meta("tokenizer.ggml.bos_token_id"), meta("tokenizer.ggml.eos_token_id")
    _add_around(
        backend,
        bos if meta("tokenizer.ggml.add_bos_token", add_bos) else None,
        eos if meta("tokenizer.ggml.add_eos_token", False) else None,
    )
    ends = [eos, meta("tokenizer.ggml.eot_token_id")]
    return Tokenizer(
        backend,
        bos_id=bos,
        eos_ids=list(dict.fromkeys(e for e in ends if e is not None)),
        chat_template=meta("tokenizer.chat_template"),
    )


def _byte_level(
    path: Path, meta: Meta, tokens: Sequence[str], kinds: Sequence[int]
) -> tuple[tokenizers.Tokenizer, bool]:
    name, merges = meta("tokenizer.ggml.pre"), meta("tokenizer.ggml.merges")
    if name not in SPLITS:
        raise CheckpointError(f"{path}: unsupported pre-tokenizer {name!r}; supported are {', '.join(SPLITS)}")
    if merges is None:
        raise CheckpointError(f"{path}: metadata tokenizer.ggml.merges is missing")
    split = SPLITS[name]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [(a, b) for a, b in (merge.split(" ") for merge in merges)]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=split.whole))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(split.steps)) if len(split.steps) > 1 else split.steps[0]
    backend.decoder = decoders.ByteLevel()
    return backend, split.add_bos


def _sentencepiece(
    path: Path, meta: Meta, tokens: Sequence[str], kinds: Sequence[int]
) -> tuple[tokenizers.Tokenizer, bool]:
    scores = meta("tokenizer.ggml.scores")
    if scores is None:
        raise CheckpointError(f"{path}: metadata tokenizer.ggml.scores is missing")
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == Kind.UNKNOWN), None)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=_merges_by_score(tokens, scores, kinds),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=Kind.BYTE in kinds,
        )
    )
    prefix = [normalizers.Prepend("▁")] if meta("tokenizer.ggml.add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend, True


def _merges_by_score(tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]) -> list[tuple[str, str]]:
    """Merges in the order SentencePiece makes them: best score of the merged piece first.

    Every way to cut a piece into two pieces is a merge of its rank, for text may reach it by any of them.
    """
    pieces = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == Kind.NORMAL}
    merges: list[tuple[str, str]] = []
    for piece in sorted(pieces, key=lambda p: -scores[pieces[p]]):
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        found = [(a, b) for a, b in cuts if a in pieces and b in pieces]
        merges += sorted(found, key=lambda cut: (pieces[cut[0]], pieces[cut[1]]))
    return merges


def _add_special(backend: tokenizers.Tokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Control tokens are special, user-defined ones are not; text never cuts either."""
    pairs = list(zip(tokens, kinds, strict=True))
    special = (Kind.CONTROL, Kind.UNKNOWN)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in pairs if k in special])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t, k in pairs if k == Kind.USER_DEFINED])


def _add_around(backend: tokenizers.Tokenizer, bos: int | None, eos: int | None) -> None:
    """Put BOS before and EOS after every encoded text, where they are given."""
    ends = [(backend.id_to_token(i), i) for i in (bos, eos) if i is not None]
    if ends:
        before = "" if bos is None else f"{backend.id_to_token(bos)} "
        after = "" if eos is None else f" {backend.id_to_token(eos)}"
        around = processors.TemplateProcessing(
            single=f"{before}$A{after}", pair=f"{before}$A {before}$B{after}", special_tokens=ends
        )
        backend.post_processor = around
