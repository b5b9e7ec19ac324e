"""Training speed against PyTorch: `python benchmarks/training.py`.

SmolLM2-135M, fp32, the same batch of real text, AdamW. `torch` trains the dense model as transformers does, at its
fair setting: eager with sdpa attention, its own loss, fused AdamW, a thread a core. `dense` is our step on the same
weights, `experts` our expert step on seven half-width experts, sorting tokens into segments included.

Each side runs in processes of its own, in turn: spinning threads of one library slow the next in the same process. All
ask for huge pages, as `readme-jax` does; `torch_small` is torch without, and torch counts as the faster of the two. A
ratio is that of one round's tokens a second; the result is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _arms import CORPUS
from _report import write_results
from rich.console import Console
from rich.table import Table

from readme_jax import config
from readme_jax.checkpoints.hf import EMBEDDED, load_dense, save_dense
from readme_jax.data.corpus import open_corpus
from readme_jax.memory import HUGE, TUNABLES
from readme_jax.models.runtime import runtime_for
from readme_jax.parallel.mesh import make_mesh, put_batch
from readme_jax.refactor.slice import lay_out, slice_layer
from readme_jax.tuning.routes import Choice
from readme_jax.tuning.step import build_expert_step

SIDES = ("torch", "torch_small", "dense", "experts")
EXPERTS, STAYS, AT_HOME = 7, 0.9, 0.5  # a token repeats its expert; else it goes to its text's own or to any
LEARNING_RATE = 2e-5
MODEL, BATCH = "model", "batch.npz"
CORES = len(os.sched_getaffinity(0))


# --- what all sides are given -------------------------------------------------------------------------------------


def tokens_of(data: Path, tokenizer: Any, batch: int, length: int, vocab_size: int) -> np.ndarray:
    """[B, T]: the beginning of a text of each of B domains, or random tokens where there is no corpus."""
    if not data.exists():
        return np.random.default_rng(0).integers(0, vocab_size, (batch, length), np.int32)
    settings = config.Data(folder=str(data), sequence_length=length, validation_tokens=length)
    corpus = open_corpus(settings, tokenizer)
    domains = [corpus.domains[i % len(corpus.domains)] for i in range(batch)]
    return np.concatenate([corpus.validation(domain, length)[:1] for domain in domains])


def runs(batch: int, length: int) -> np.ndarray:
    """Experts [B, T, 1] in runs as a router's are: row i mostly runs expert i, all experts have some tokens."""
    rng = np.random.default_rng(1)
    experts = np.zeros((batch, length, 1), np.int32)
    for row in range(batch):
        expert = row % EXPERTS
        for t in range(length):
            if rng.random() > STAYS:
                expert = row % EXPERTS if rng.random() < AT_HOME else int(rng.integers(EXPERTS))
            experts[row, t] = expert
    return experts


def prepare(folder: Path, data: Path, batch: int, length: int) -> None:
    """Write the dense model and the batch, with its routes, into `folder`."""
    dense = load_dense(EMBEDDED)
    save_dense(folder / MODEL, dense)
    tokens = tokens_of(data, dense.tokenizer, batch, length, dense.config.vocab_size)
    np.savez(folder / BATCH, tokens=tokens, experts=runs(batch, length))


# --- one side, in a process of its own ----------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GivenRoutes:
    """Routes known beforehand: experts [B, T, 1]."""

    experts: jax.Array

    def __call__(self, tokens: jax.Array, domain: jax.Array | None = None) -> Choice:
        return self.experts, jax.numpy.ones(self.experts.shape)


def torch_step(inputs: Path) -> Callable[[], float]:
    """One training step of transformers' dense model; returns its loss."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(CORES)
    model = LlamaForCausalLM.from_pretrained(inputs / MODEL, dtype=torch.float32, attn_implementation="sdpa").train()
    adamw = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    tokens = torch.from_numpy(np.load(inputs / BATCH)["tokens"]).long()

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def jax_step(inputs: Path, sliced: bool) -> Callable[[], float]:
    """One training step of ours, dense or of experts cut from the dense model; returns its loss."""
    dense, arrays = load_dense(inputs / MODEL), np.load(inputs / BATCH)
    params, mixture, frozen = dense.params, None, {}
    mesh = make_mesh(config.Mesh())
    jax.set_mesh(mesh)
    if sliced:
        masks = half_masks(dense.config.num_layers, dense.config.ffn_dim)
        mixture, channels = lay_out(masks, permanent=False, tied=False, top_k=1, align=1)
        params = {k: slice_layer(p, channels[k], mixture) if k in channels else p for k, p in params.items()}
        frozen = {"channels": channels, "routes": GivenRoutes(put_batch({"e": arrays["experts"]}, mesh)["e"])}
    stage, runtime = config.ExpertStage(steps=1000), runtime_for(config.Model())
    built = build_expert_step(dense.config, mixture, runtime, stage, config.Tuning(), mesh)
    state = built.start(params)
    batch = put_batch({"tokens": arrays["tokens"]}, mesh)

    def step() -> float:
        nonlocal state
        state, metrics = built.update(state, batch, frozen, np.float32(LEARNING_RATE))
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    return step


def half_masks(layers: int, width: int) -> np.ndarray:
    """Masks [L, E, F] of half of the channels, drawn: which ones does not change what a step costs."""
    order = np.random.default_rng(2).random((layers, EXPERTS, width)).argsort(axis=-1)
    return order < width // 2


def time_side(side: str, inputs: Path, warm: int, steps: int) -> dict[str, Any]:
    """Median seconds of a step, and the first step's loss."""
    step = torch_step(inputs) if side.startswith("torch") else jax_step(inputs, sliced=side == "experts")
    loss, seconds = [step() for _ in range(warm)][0], []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "loss": loss}


# --- all sides ----------------------------------------------------------------------------------------------------


def measure(side: str, inputs: Path, warm: int, steps: int) -> dict[str, Any]:
    """`time_side` in a new process."""
    options = ["--side", side, "--inputs", str(inputs), "--warm", str(warm), "--steps", str(steps)]
    environment = os.environ | {TUNABLES: "" if side == "torch_small" else HUGE}
    command = [sys.executable, __file__, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def ratio(rows: list[dict[str, Any]], side: str) -> float:
    """Median over rounds of a side's tokens a second over those of torch at its faster setting."""
    by_round: dict[int, dict[str, float]] = {}
    for row in rows:
        by_round.setdefault(row["round"], {})[row["side"]] = row["tokens_per_second"]
    return statistics.median(each[side] / max(each["torch"], each["torch_small"]) for each in by_round.values())


def show(rows: list[dict[str, Any]]) -> None:
    """Medians in the terminal."""
    table = Table("side", "tokens/s", "s/step", "over torch", title="Training SmolLM2-135M, fp32")
    for side in SIDES:
        mine = [row for row in rows if row["side"] == side]
        medians = [statistics.median(row[key] for row in mine) for key in ("tokens_per_second", "seconds")]
        table.add_row(side, f"{medians[0]:.0f}", f"{medians[1]:.2f}", f"{ratio(rows, side):.2f}")
    Console().print(table)


def main() -> None:
    """Measure all sides in turn and write results/training.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", type=int, default=2, help="steps before timing starts")
    parser.add_argument("--steps", type=int, default=4, help="timed steps a process")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--data", type=Path, default=CORPUS, help="folder of domains; random tokens without it")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--inputs", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(time_side(args.side, args.inputs, args.warm, args.steps)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args.data, args.batch, args.length)
        for round_ in range(args.rounds):
            for side in SIDES:
                took = measure(side, Path(folder), args.warm, args.steps)
                rows.append({"side": side, "round": round_, **took})
                rows[-1]["tokens_per_second"] = args.batch * args.length / took["seconds"]
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    show(rows)
    ratios = {f"{name}_step_ratio": ratio(rows, side) for name, side in (("expert", "experts"), ("dense", "dense"))}
    write_results("training", **ratios, batch=args.batch, length=args.length, rows=rows)


if __name__ == "__main__":
    main()
