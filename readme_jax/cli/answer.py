"""An answer as it is generated: streamed, coloured by expert in a terminal, plain in a pipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from readme_jax.checkpoints.tokenizer import Tokenizer
from readme_jax.generate import Generator, Sampling
from readme_jax.palette import colour


class Piece(NamedTuple):
    """Text that one more token added, and the token's experts (empty: dense)."""

    text: str
    experts: tuple[int, ...]


def prompt_ids(tokenizer: Tokenizer, prompt: str, raw: bool = False) -> list[int]:
    """Token ids of a user's message in the model's chat template, or as it is: `raw`, or a model without template."""
    chat = None if raw else tokenizer.chat([{"role": "user", "content": prompt}])
    return tokenizer.encode(prompt) if chat is None else tokenizer.encode(chat, special=False)


def pieces(
    generator: Generator, tokenizer: Tokenizer, ids: list[int], max_tokens: int, sampling: Sampling
) -> Iterator[Piece]:
    """Text of each new token until the model ends; a character of several tokens comes with its last one."""
    tokens: list[int] = []
    shown = ""
    for new in generator.stream([ids], max_tokens, sampling, tokenizer.eos_ids):
        if not new.live[0]:
            return
        tokens.append(int(new.tokens[0]))
        experts = () if new.experts is None else tuple(int(e) for e in new.experts[0])
        text = tokenizer.decode(tokens)
        if text.endswith("\ufffd"):
            continue
        yield Piece(text[len(shown) :], experts)
        shown = text


def answer(generator: Generator, tokenizer: Tokenizer, prompt: str, max_tokens: int = 64) -> str:
    """The greedy answer to a prompt, as one string."""
    ids = prompt_ids(tokenizer, prompt)
    return "".join(p.text for p in pieces(generator, tokenizer, ids, max_tokens, Sampling())).strip()


def show(stream: Iterator[Piece], console: Console, names: list[str]) -> None:
    """Print pieces as they come; in a terminal coloured by their first expert, with a legend at the end."""
    if not console.is_terminal:
        for piece in stream:
            print(piece.text, end="", flush=True, file=console.file)
        print(file=console.file)
        return
    used: Counter[int] = Counter()
    for piece in stream:
        used.update(piece.experts[:1])
        console.print(Text(piece.text, colour(piece.experts[0]) if piece.experts else ""), end="", soft_wrap=True)
    console.print()
    if used:
        console.print(legend(used, names))


def legend(used: Counter[int], names: list[str]) -> Text:
    """The experts that were used, most used first, each in its colour with its share of tokens."""
    parts = [(f"■ {names[e]} {count / used.total():.0%}   ", colour(e)) for e, count in used.most_common()]
    return Text.assemble(*parts)
