"""The tables of the README and of docs/performance.md show what the committed results hold."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TABLE5 = ("dense", "sliced", "tuned", "paper", "dense_slice", "dense_slice_refit")


def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def table(heading: str, document: str = "README.md") -> list[list[str]]:
    """The rows of the table whose first line begins so, without emphasis."""
    text = (ROOT / document).read_text()
    lines = text[text.index(f"\n| {heading}") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines]


def demo() -> list[list[str]]:
    columns = ("dense", "sliced", "tuned", "dense_slice")
    return [[row["domain"], *(f"{row[c]:.2f}" for c in columns)] for row in results("demo")["rows"]]


def table5() -> list[list[str]]:
    held = results("table5")
    rows = [*held["domains"].items(), ("geometric mean", held["geo_mean"])]
    return [[name, *(f"{row[c]:.2f}" for c in TABLE5)] for name, row in rows]


@pytest.mark.parametrize("heading, rows", [("validation perplexity", demo), ("SmolLM2-135M, validation", table5)])
def test_tables_of_perplexity(heading, rows):
    assert table(heading) == rows()


ROUTES = {
    "its label router": "router",
    "the text's own domain": "domain",
    "best expert of each window (oracle)": "oracle",
    "mean overlap by token id, smoothed": "table",
    "the most common expert": "common",
    "random": "random",
}


def test_routes():
    rows = {row["routes"]: row for row in results("router")["rows"] if row["run"] == "best"}
    shown = {ROUTES[name]: row for name, *row in table("routes of")}
    assert set(shown) == set(rows)
    for name, (agrees, repeats, perplexity) in shown.items():
        held = rows[name]
        assert perplexity == f"{held['geo_mean']:.2f}", name
        assert float(agrees.rstrip("%")) == pytest.approx(100 * held["agrees_with_overlap"], abs=0.051), name
        assert float(repeats.rstrip("%")) == pytest.approx(100 * held["repeats"], abs=0.051), name


def test_training_and_segments():
    held = results("training")
    rounds = [{r["side"]: r["tokens_per_second"] for r in held["rows"] if r["round"] == i} for i in range(3)]
    torch = statistics.median(max(each["torch"], each["torch_small"]) for each in rounds)
    speeds = [torch, *(statistics.median(each[side] for each in rounds) for side in ("dense", "experts"))]
    assert [row[1] for row in table("SmolLM2-135M, fp32")] == [f"{speed:.0f}" for speed in speeds]
    assert [row[2] for row in table("SmolLM2-135M, fp32")] == [
        "1.00", f"{held['dense_step_ratio']:.2f}", f"{held['expert_step_ratio']:.2f}"
    ]  # fmt: skip
    known = {(r["case"], r["pass"], r["backend"]): r["ratio"] for r in results("segments")["rows"]}
    backends = {"ours": "segments", "`jax.lax.ragged_dot`": "ragged_dot", "all experts, masked": "masked"}
    for name, *ratios in table("grouped feed-forward on CPU"):
        who, case = re.fullmatch(r"(.*), (even|skewed|one)(?: expert)?", name).groups()
        wanted = [known[case, each, backends[who]] for each in ("forward", "forward_backward")]
        assert [float(ratio) for ratio in ratios] == pytest.approx(wanted, abs=0.0051), name


def test_decode_on_a_gpu():
    rows = {(r["experts"], r["experts_present"], r["batch"], r["peer"]): r for r in results("gpu_decode")["rows"]}
    kinds = {"one expert": ("one", 1), "seven experts": ("mixed", 7)}
    for name, ms, *ratios in table("decode, Llama-2-7B"):
        kind, batch = re.fullmatch(r"(.*), batch (\d+)", name).groups()
        dense, limit = (rows[*kinds[kind], int(batch), peer] for peer in ("own_dense", "limit"))
        assert float(ms) == pytest.approx(dense["ms"], rel=0.005), name
        assert [float(ratio) for ratio in ratios] == pytest.approx([dense["ratio"], limit["ratio"]], abs=0.0051), name


PERFORMANCE = "docs/performance.md"
MIXED = "real routes, ms (experts present)"


def test_decode_in_the_docs():
    rows = {(r["experts"], r["batch"], r["peer"]): r for r in results("gpu_decode")["rows"]}
    peers = {"dense": "own_dense", "transformers, eager": "transformers_eager"}
    peers |= {"transformers, compiled": "transformers_compiled", "its limit": "limit", "their limit": "limit"}
    case = "dense"
    for name, *cells in table("| batch 1 | 8 | 32 |", PERFORMANCE):
        case = {"one expert, ms": "one", MIXED: "mixed"}.get(name, case)
        for cell, batch in zip(cells, (1, 8, 32, 128, 256), strict=True):
            if not cell:
                continue
            peer = "own_dense" if ", ms" in name else peers[name.split("over ")[1]]
            held = rows[case, batch, peer]
            if ", ms" in name:
                assert float(cell.split(" ")[0]) == pytest.approx(held["ms"], rel=0.005), (name, batch)
                assert name != MIXED or cell.endswith(f"({held['experts_present']})"), batch
            else:
                assert float(cell) == pytest.approx(held["ratio"], abs=0.0051), (name, batch)


def test_grouped_kernels_in_the_docs():
    timed = [r for r in results("gpu_grouped")["rows"] if "rows" in r]
    held = {(r["rows"], r["pass"], r["experts"], r["backend"]): r for r in timed}
    columns = ((1, "kernel"), (4, "kernel"), (4, "static"), (7, "kernel"), (7, "static"), (7, "ragged"))
    for rows, name, *cells in table("rows | pass | one expert", PERFORMANCE):
        for cell, column in zip(cells, columns, strict=True):
            row = held.get((int(rows), name.replace("forward and backward", "forward_backward"), *column))
            assert cell == (f"{row['ratio']:.2f}" if row else ""), (rows, name, column)
    for rows, *cells in table("rows of a decode step", PERFORMANCE):
        found = [held[int(rows), "forward", experts, "decode"]["over_bytes"] for experts in (1, 4, 7)]
        assert cells == [f"{each:.2f}" for each in found], rows


def test_gpu_training_and_slots_in_the_docs():
    held = {(r["case"], r["layout"]): r for r in results("gpu_training")["rows"] if "peer" not in r}
    shown = table("| tokens/s | MFU |", PERFORMANCE)
    for case, (name, *cells) in zip(("dense_slice", "seven", "dense"), shown, strict=True):
        for layout, (speed, mfu, ratio) in (("unrolled", cells[:3]), ("scanned", cells[3:])):
            row = held[case, layout]
            assert speed == f"{row['tokens_per_s'] / 1e3:.0f}k", name
            assert [float(mfu), float(ratio)] == pytest.approx([row["mfu"], row["ratio"]], abs=0.0051), name
    slots = {(r["slots"], r["staging"]): r for r in results("gpu_decode_slots")["rows"]}
    for k, *cells in table("k | no buffer", PERFORMANCE):
        for staging, each in enumerate((cells[:3], cells[3:])):
            row = slots.get((int(k), staging))
            values = (f"{row['held_bytes'] / 1e9:.1f}", f"{row['tokens_per_s']:.0f}", f"{row['loads']}") if row else ()
            assert each == [*values] or not any([*values, *each]), k


def test_quality_against_tokens_in_the_docs():
    rows = [r for r in results("gpu_quality")["rows"] if not r.get("share") and not r.get("distill")]
    held: dict[tuple[str, int], float] = {}
    for row in rows:  # one seed; the best of the rates
        key = (row["recipe"], row["tokens"])
        held[key] = min(held.get(key, row["geo_mean"]), row["geo_mean"])
    tokens = (0, 100_000, 1_000_000, 4_000_000, 16_000_000, 64_000_000)
    recipes = ("best", "dense_slice_refit", "dense_slice", "paper", "dense")
    known = {recipe: [held.get((recipe, n)) for n in tokens] for recipe in recipes}
    best, slice_, ratio, *others = (cells for _, *cells in table("tuning tokens", PERFORMANCE))
    for shown, recipe in zip((best, slice_, *others), recipes, strict=True):
        assert shown == [f"{found:.2f}" if found else "" for found in known[recipe]], recipe
    assert ratio == [f"{a / b:.3f}" for a, b in zip(known["best"], known["dense_slice_refit"], strict=True)]


def test_simulated_serving():
    held = results("batching")["ratios"]
    rows = {(r["resident"], r["trace"], r["load"]): r for r in held if r["router"] == "label"}
    for name, *cells in table("`lookahead` over"):
        resident, trace = re.match(r"(3 slots|all resident), (conversation|code)", name).groups()
        where = ("slots" if resident == "3 slots" else "all", {"conversation": "conv"}.get(trace, trace))
        ratios = [rows[*where, load] for load in (0.3, 0.7, 1.2)]
        assert cells == [f"{r['mean']:.2f} / {r['p95']:.2f}" for r in ratios], name


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda p: p.stem)
def test_every_result_says_where_it_is_from(path):
    held = json.loads(path.read_text())
    assert held["command"].startswith("python benchmarks/") and re.match("[0-9a-f]{7}", held["commit"])
    assert held["machine"]["devices"] and (path.stem == "table5" or held["rows"])


def test_hit_ratios():
    held = {
        (r["scheduler"], r["trace"]): r
        for r in results("cache")["summary"]
        if (r["router"], r["capacity"], r["load"]) == ("label", 3, 1.2)
    }
    for name, removed, regret in table("Belady with roll-out"):
        scheduler, trace = re.fullmatch(r"(.*), (conv|code)(?:ersation)?", name).groups()
        row = held[{"Algorithm 1": "algorithm1", "decode-first": "decode_first"}[scheduler], trace]
        assert (removed, regret) == (f"{row['removed']:.0%}", f"{row['regret_points']:.1f}"), name
    assert all(abs(r["hit_ratio"] - r["paper"]) < 0.03 for r in results("cache")["table4"])


def test_replay_in_the_docs():
    held = results("gpu_replay")["rows"]
    rows = {
        (r["trace"], r["scheduler"], r["requests"]): r
        for r in held
        if r["resident"] == "all" and r["router"] == "label"
    }
    names = {"Algorithm 1": "algorithm1"}
    shown = [("conv", name, "156", *cells) for name, *cells in table("scheduler | mean, ms a token", PERFORMANCE)]
    shown += [("code", *cells) for cells in table("scheduler | requests", PERFORMANCE)]
    assert len(shown) == len(rows) == 10
    for trace, name, requests, mean, p95, first, experts in shown:
        row = rows[trace, names.get(name, name.replace("-", "_")), int(requests)]
        assert (mean, p95) == (f"{1e3 * row['mean']:.1f}", f"{1e3 * row['p95']:.1f}"), name
        assert (first, experts) == (f"{row['p99_ttft']:.2f}", f"{row['unique_experts']:.1f}"), name


def test_replay_of_few_experts_in_the_docs():
    rows = {
        (r["capacity"], r["scheduler"], r["prefetch"]): r
        for r in results("gpu_replay")["rows"]
        if r["resident"] == "slots"
    }
    runs = (("lookahead", True), ("decode_first", True), ("decode_first", False))
    shown = table("experts held | lookahead", PERFORMANCE)
    assert [int(k) for k, *_ in shown] == sorted({k for k, _, _ in rows})
    for k, *cells, ratio in shown:
        held = [rows[int(k), *run] for run in runs]
        for row, times, loads in zip(held, cells[::2], cells[1::2], strict=True):
            wanted = [pytest.approx(1e3 * row[name], rel=0.006) for name in ("mean", "p95")]
            assert ([float(x) for x in times.split(" / ")], loads) == (wanted, str(row["loads"])), k
        assert ratio == f"{held[0]['mean'] / held[2]['mean']:.2f}", k
