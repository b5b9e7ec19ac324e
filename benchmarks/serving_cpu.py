"""Serving speed on CPU against transformers, llama.cpp and our own dense model: `python benchmarks/serving_cpu.py`.

SmolLM2 in float32, the same weights everywhere; ours with its feed-forward layers sliced into seven experts of half
width (weights do not matter for speed, so they are not calibrated or tuned). Peers run in processes of their own, in
turns: spinning threads of one library slow the next one, and the machine's speed swings over minutes. A figure is the
median over rounds of that round's ratio. Our own dense model runs in every size of batch, other peers in batches of 1
and 16. llama.cpp comes with `pip install -e .[benchmarks]` and is left out without it. Ours compile in the first round.

Writes results/serving_cpu.json: rows {case, experts_present, peer, ratio}, above 1: ours is faster; for `bandwidth` the
share reached of what memory and arithmetic allow.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from _report import write_results
from _serving_peers import BATCH, MIXED, PEERS, ROWS
from rich.console import Console
from rich.table import Table

from readme_jax.checkpoints.hf import EMBEDDED, Dense, load_dense, locate, save_dense
from readme_jax.checkpoints.mixture import Mixture, save_mixture
from readme_jax.config import RouterConfig
from readme_jax.memory import HUGE, TUNABLES
from readme_jax.models.router import start_router
from readme_jax.refactor.slice import lay_out, slice_layer

EXPERTS = 7
CASES = {  # our case -> the peers' case
    "decode_b1": "decode_b1",
    **{f"decode_b{n}_one": f"decode_b{n}" for n in ROWS if n > 1},
    **{f"decode_b{BATCH}_of_{n}": f"decode_b{BATCH}" for n in MIXED},
    f"decode_b{BATCH}_mixed": f"decode_b{BATCH}",
    "prefill_1024": "prefill_1024",
}


def sliced(dense: Dense) -> Mixture:
    """Experts of random channels, half of them each, that own all their rows; a router not trained."""
    import jax

    c, rng = dense.config, np.random.default_rng(0)
    masks = np.argsort(rng.random((c.num_layers, EXPERTS, c.ffn_dim)), axis=-1) < c.ffn_dim // 2
    mixture, channels = lay_out(masks, permanent=False, tied=False, top_k=1, align=1)
    params = {k: slice_layer(v, channels[k], mixture) if k in channels else v for k, v in dense.params.items()}
    shape = RouterConfig(c.vocab_size, EXPERTS, rope_theta=c.rope_theta)
    router = jax.tree.map(np.asarray, start_router(jax.random.key(0), shape, jax.numpy.asarray(dense.params["embed"])))
    return Mixture(c, mixture, jax.tree.map(np.asarray, params), channels, shape, router, dense.tokenizer)


def write_f32(target: Path) -> None:
    """The embedded GGUF with its tensors dequantised."""
    reader = gguf.GGUFReader(locate(EMBEDDED))
    writer = gguf.GGUFWriter(target, "llama")
    for key, held in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            sub = held.types[1] if len(held.types) > 1 else None
            writer.add_key_value(key, held.contents(), held.types[0], sub)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape(tuple(reversed(tensor.shape))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prepare(folder: Path) -> None:
    """Each peer's files: dense/ (Hugging Face), mixture/, f32.gguf."""
    import jax

    from readme_jax import config
    from readme_jax.parallel.mesh import make_mesh

    dense = load_dense(EMBEDDED)
    save_dense(folder / "dense", dense)
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        save_mixture(folder / "mixture", sliced(dense))
    write_f32(folder / "f32.gguf")


def run(peer: str, folder: Path) -> dict[str, Any]:
    script = Path(__file__).parent / "_serving_peers.py"
    environment = os.environ | {TUNABLES: HUGE, "JAX_COMPILATION_CACHE_DIR": str(folder / "programs")}  # as readme-jax
    done = subprocess.run([sys.executable, script, peer, folder], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{peer} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def share(ours: dict[str, Any], case: str) -> float:
    """Time that reading the weights or multiplying them takes at the machine's best, over the time taken."""
    needs, machine = ours["needs"][case], ours["machine"]
    return max(needs[kind] / machine[kind] for kind in ("bytes", "work")) / ours["seconds"][case]


def rows_of(rounds: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The ratios of every case to every peer."""
    rows = []
    mixed = rounds[0]["ours"]["mixed_present"]
    for case, theirs in CASES.items():
        present = int(case.rsplit("_", 1)[1]) if "_of_" in case else mixed if case.endswith("mixed") else 1
        name = "decode_b16_mixed" if "_of_" in case else case
        for peer in [p for p in rounds[0] if p != "ours" and theirs in rounds[0][p]["seconds"]]:
            ratios = [r[peer]["seconds"][theirs] / r["ours"]["seconds"][case] for r in rounds]
            rows.append({"case": name, "experts_present": present, "peer": peer, "ratio": float(np.median(ratios))})
        if case in rounds[0]["ours"]["needs"]:
            reached = float(np.median([share(r["ours"], case) for r in rounds]))
            rows.append({"case": name, "experts_present": present, "peer": "bandwidth", "ratio": reached})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="+", choices=[p for p in PEERS if p != "ours"], default=None)
    args = parser.parse_args()
    peers = args.peers or [p for p in PEERS if p != "ours"]
    if importlib.util.find_spec("xllamacpp") is None:
        peers = [p for p in peers if p != "llama_cpp"]
    console, began = Console(width=100), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        rounds = []
        for i in range(args.rounds):
            rounds.append({peer: run(peer, Path(folder)) for peer in ["ours", *peers]})
            console.print(f"round {i + 1} of {args.rounds} done, {time.perf_counter() - began:.0f} s since the start")
    rows = rows_of(rounds)
    table = Table("case", "experts present", "peer", "ratio", title="SmolLM2 on CPU, fp32; above 1: ours is faster")
    for row in rows:
        table.add_row(row["case"], f"{row['experts_present']:.1f}", row["peer"], f"{row['ratio']:.2f}")
    console.print(table)
    seconds = {peer: [r[peer]["seconds"] for r in rounds] for peer in rounds[0]}
    write_results("serving_cpu", rows=rows, seconds=seconds, machine_limits=[r["ours"]["machine"] for r in rounds])


if __name__ == "__main__":
    main()
