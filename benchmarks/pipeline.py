"""How fast text becomes batches on this machine, tokenising apart from reading what is tokenised.

    python benchmarks/pipeline.py [--data FOLDER] [--seconds 8]

Wanted: at least 100k tokens/s a process once tokenised. Tokenising: SmolLM2's tokenizer over each domain's training
text, with all threads of one process. Reading: batches of packed sequences of 4096 tokens (array_record, through the
same `Batches` that tuning reads), shuffled, mixed over the domains by their natural shares, from files that the page
cache holds; of two and four processes each reads its own rows of one global batch, at the same time, and the slowest
counts. What the processes read is put together and compared with what one reads.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _report
from rich.console import Console
from rich.table import Table

from readme_jax.checkpoints.gguf import GGUF
from readme_jax.checkpoints.hf import EMBEDDED, locate
from readme_jax.config import Data
from readme_jax.data.corpus import Corpus, open_corpus
from readme_jax.data.packing import token_stream

CORPUS = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "corpus"
WANTED = 100_000  # tokens a second and process, once tokenised
GLOBAL_TOKENS = 2**17  # a batch of all processes
LENGTH = 4096
PROCESSES = (1, 2, 4)
COMPARED = 3  # batches whose bytes are compared


def main() -> None:
    args = arguments()
    if args.read:
        process, processes = args.read
        read(opened(args.data, args.cache), process, processes, args.seconds)
        return
    with tempfile.TemporaryDirectory() as folder:
        corpus = opened(args.data, folder)
        tokenising = tokenise(corpus)
        corpus.packed  # noqa: B018 made once, here
        rows = [reading(args, folder, processes) for processes in PROCESSES]
    one = rows[0]["bytes"]
    for row in rows:
        row["same_bytes"] = row.pop("bytes") == one
    show(tokenising, rows)
    path = _report.write_results("pipeline", wanted={"tokens_per_s": WANTED}, tokenising=tokenising, rows=rows)
    print(path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(CORPUS), help="folder of domains, or `starter`")
    parser.add_argument("--seconds", type=float, default=8.0, help="of reading, each time")
    parser.add_argument("--cache", default="", help=argparse.SUPPRESS)
    parser.add_argument("--read", type=int, nargs=2, help=argparse.SUPPRESS)  # process, processes
    return parser.parse_args()


def opened(data: str, cache: str) -> Corpus:
    """The corpus in sequences of 4096 tokens."""
    settings = Data(folder=data, sequence_length=LENGTH, mixture="natural")
    tokenizer = GGUF(locate(EMBEDDED)).tokenizer()
    assert tokenizer is not None
    return open_corpus(settings, tokenizer, Path(cache))


def tokenise(corpus: Corpus) -> dict[str, Any]:
    """Characters and tokens a second over the training text of all domains, read from its array_record files."""
    tokens = characters = 0
    seconds = 0.0
    for domain in corpus.domains:
        texts = list(corpus.documents(domain, "train"))
        characters += sum(map(len, texts))
        began = time.perf_counter()
        tokens += sum(map(len, token_stream(texts, corpus.tokenizer)))
        seconds += time.perf_counter() - began
    return {"tokens": tokens, "characters": characters, "seconds": seconds, "tokens_per_s": tokens / seconds}


def read(corpus: Corpus, process: int, processes: int, seconds: float) -> None:
    """One process: once told to, read its rows of batch after batch; say tokens, seconds, and hash the first ones."""
    batches = corpus.batches("experts", GLOBAL_TOKENS // LENGTH, 0, process, processes)
    digests = [rows_digest(batches[index]["tokens"]) for index in range(COMPARED)]
    print("ready", flush=True)
    sys.stdin.readline()
    began, tokens, index = time.perf_counter(), 0, COMPARED
    while time.perf_counter() - began < seconds:
        tokens += batches[index]["tokens"].size
        index += 1
    print(tokens, time.perf_counter() - began, *digests, flush=True)


def rows_digest(tokens: Any) -> str:
    """Of each row by itself, so that digests of shards, put together, are those of the whole."""
    return "".join(hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in tokens)


def reading(args: argparse.Namespace, cache: str, processes: int) -> dict[str, Any]:
    """Tokens a second of the slowest of so many processes that read at once."""
    command = [sys.executable, __file__, "--data", args.data, "--cache", cache, "--seconds", str(args.seconds)]
    running = [
        subprocess.Popen(
            [*command, "--read", str(p), str(processes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for p in range(processes)
    ]  # fmt: skip
    for each in running:
        assert each.stdout is not None and each.stdout.readline() == "ready\n"
    for each in running:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    said = [each.communicate()[0].split() for each in running]
    rates = [int(tokens) / float(seconds) for tokens, seconds, *_ in said]
    whole = tuple("".join(parts) for parts in zip(*(digests for _, _, *digests in said), strict=True))
    return {
        "sequence_length": LENGTH,
        "processes": processes,
        "sequences": GLOBAL_TOKENS // LENGTH // processes,
        "tokens_per_s": min(rates),
        "together": sum(rates),
        "bytes": whole,
    }


def show(tokenising: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    table = Table(title="once tokenised", title_justify="left")
    for name in ("processes", "sequences a batch and process", "tokens/s of the slowest", "together", "same bytes"):
        table.add_column(name, justify="right")
    for row in rows:
        numbers = (row[k] for k in ("processes", "sequences", "tokens_per_s", "together"))
        table.add_row(*(f"{n:,.0f}" for n in numbers), str(row["same_bytes"]))
    console = Console()
    console.print(table)
    console.print(f"tokenising: {tokenising['tokens_per_s']:,.0f} tokens/s ({tokenising['tokens']:,} tokens)")


if __name__ == "__main__":
    main()
