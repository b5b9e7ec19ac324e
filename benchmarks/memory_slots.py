"""Device memory and speed against slots: `python benchmarks/memory_slots.py --checkpoint runs/demo/export`.

Continues the beginnings of texts of all domains in ../shared/data (or READ_ME_DATA) with k of the mixture's experts on
the device, k from one to all, greedily in float32. The bytes are the most that any call took: all arrays alive in
device memory, its temporaries and new results. The bound is 1.05 x (all weights but the experts' own, k experts of
every layer, the ring that `staging` experts stream through, the caches of all rows).

Writes results/memory_slots.json: rows {slots, staging, device_bytes, bound, share, tokens_per_s, loads}, tokens those
that were sampled and loads copies of an expert of one layer; and memory_slots.png.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import jax
import matplotlib.pyplot as plt
from _report import RESULTS, write_results
from rich.console import Console
from rich.table import Table

from readme_jax import config
from readme_jax.cli.sources import open_model
from readme_jax.data.source import find_domains, read_documents, split_file
from readme_jax.serving.buckets import Limits
from readme_jax.serving.build import measure, residency_of
from readme_jax.serving.calls import Caller
from readme_jax.serving.engine import Engine
from readme_jax.serving.footprint import Metered, device_bytes, footprint
from readme_jax.serving.request import Request, SamplingParams
from readme_jax.serving.scheduler import make_scheduler
from readme_jax.serving.store import ExpertStore

ALLOWED = 1.05
LENGTH, CHUNK = 512, 64
SHARED = Path(os.environ.get("READ_ME_DATA", Path(__file__).parents[2] / "shared" / "data"))
DOCUMENTS, PROMPT = 5, 48  # of each domain's validation text, and how many tokens of each


def texts(tokenizer: Any) -> list[list[int]]:
    """Prompts that use many experts: beginnings of documents, the domains in turn."""
    folder = SHARED / "corpus"
    found = {d: read_documents(split_file(folder, d, "validation")) for d in find_domains(folder)}
    return [tokenizer.encode(next(found[d]))[:PROMPT] for _ in range(DOCUMENTS) for d in found]


def serve(engine: Engine, prompts: list[list[int]], tokens: int) -> float:
    """Seconds until every prompt has its answer."""
    began = time.perf_counter()
    for prompt in prompts:
        engine.submit(Request(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True)))
    while engine.step():
        pass
    jax.block_until_ready(engine._caller.state)
    return time.perf_counter() - began


def measured(model: Any, programs: Metered, settings: config.Serving, prompts: list[list[int]], tokens: int) -> dict:
    """A row for some slots: one pass that is metered, which compiles too, and one that is timed."""
    gc.collect()  # the engine before: its experts on the host are as large as the model
    store = ExpertStore(model, settings.slots, settings.staging)
    programs.store, programs.peak = store, 0
    programs.weights = programs.weights._replace(permanent=tuple(store.permanent))
    caller = Caller(programs, residency_of(store, settings))
    programs.metering = False
    costs = measure(caller)
    scheduler = make_scheduler(settings.scheduler, settings.budget, costs, store.num_experts)
    engine = Engine(caller, scheduler, settings, model.config.vocab_size, model.tokenizer)
    programs.metering = True
    serve(engine, prompts, tokens)
    programs.metering = False
    before = engine.stats()
    seconds = serve(engine, prompts, tokens)
    bound = int(ALLOWED * footprint(programs).total)
    return {
        "slots": store.slots,
        "staging": store.staging,
        "device_bytes": programs.peak,
        "bound": bound,
        "share": programs.peak / bound * ALLOWED,
        "tokens_per_s": (engine.stats().sampled - before.sampled) / seconds,
        "loads": engine.stats().loads - before.loads,
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bytes and the bound on the left, tokens a second on the right, over slots."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for staging, style in ((0, "o-"), (1, "s--")):
        same = [r for r in rows if r["staging"] == staging]
        slots, label = [r["slots"] for r in same], f"staging {staging}"
        left.plot(slots, [r["device_bytes"] / 2**20 for r in same], style, label=label)
        left.plot(slots, [r["bound"] / 2**20 for r in same], "_", color="black", label=f"bound, {label}")
        right.plot(slots, [r["tokens_per_s"] for r in same], style, label=label)
    left.set(xlabel="slots a layer", ylabel="MiB on the device, at most", ylim=(0, None))
    right.set(xlabel="slots a layer", ylabel="tokens a second", ylim=(0, None))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/demo/export", help="a mixture, as make demo leaves it")
    parser.add_argument("--rows", type=int, default=8, help="sequences at once")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    args = parser.parse_args()
    model = open_model(args.checkpoint)
    prompts = texts(model.tokenizer)
    before = device_bytes()
    limits = Limits(args.rows, LENGTH, chunks=(CHUNK,), decode=(1, args.rows))
    programs = Metered(model, ExpertStore(model, 1), limits)
    programs.before = before
    experts, rows = programs.store.num_experts, []
    for slots in range(1, experts + 1):
        for staging in (0, 1) if slots < experts else (0,):
            settings = config.Serving(
                rows=args.rows, length=LENGTH, chunk=CHUNK, budget=CHUNK, slots=slots, staging=staging
            )
            rows.append(measured(model, programs, settings, prompts, args.tokens))
            print(rows[-1], flush=True)
    table = Table(*rows[0], title=f"{len(prompts)} texts, {args.rows} at once, {args.tokens} tokens each")
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else f"{v:,}" for v in row.values()))
    Console(width=110).print(table)
    write_results("memory_slots", rows=rows)
    plot(rows, RESULTS / "memory_slots.png")


if __name__ == "__main__":
    main()
