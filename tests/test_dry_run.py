"""`--dry_run`, and bad input of a job: one clear line before anything is loaded or compiled."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from readme_jax import config, runner
from readme_jax.checks import check_run
from readme_jax.cli import main
from readme_jax.cli.settings import load_run, resolved
from readme_jax.config import ExpertStage, Mesh, Router, RouterStage, Run, Slice, Tuning
from readme_jax.errors import ConfigError
from readme_jax.tuning.estimate import estimate

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.gin"))
LLAMA = ROOT / "configs" / "recipes" / "readme_llama2_7b.gin"


@pytest.fixture(autouse=True)
def nothing_is_loaded_or_compiled(monkeypatch):
    def never(*_, **__):
        raise AssertionError("a dry run loads no weights and compiles nothing")

    monkeypatch.setattr(runner, "open_dense", never)
    monkeypatch.setattr(jax, "jit", never)


def told(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["refactor", *arguments])
    out, err = capsys.readouterr()
    return exit_.value.code, out, err


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_has_a_dry_run(recipe, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = told(capsys, "--gin_file", str(recipe), "--dry_run")
    assert (code, err) == (0, "")
    config_, _, rest = out.partition("\n}\n")
    assert json.loads(config_ + "}") == json.loads(resolved(load_run([recipe])))
    for words in ("active a token", "router stages", "expert stages", "tuning in all", "mesh on"):
        assert words in rest
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_train_py_takes_gin_flags_with_an_equals_sign(capsys, monkeypatch):
    """What a job script writes: `python train.py --gin_file=... --dry_run`."""
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")  # or it would start pytest again
    monkeypatch.setattr(sys, "argv", ["train.py", f"--gin_file={LLAMA}", "--dry_run", "--devices=64"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert exit_.value.code == 0 and "mesh on 64 devices: data 1 x fsdp 64 x expert 1 x tensor 1" in out


def test_paper_run_by_hand(capsys):
    """Llama-2-7B at half width: 26M + 105M tokens a round, 11.6B with 23% of F shared, and FLOPs by the 6 N rule."""
    run = load_run([LLAMA])
    shape = config.ModelConfig(32000, 4096, 32, 32, 32, 128, 11008)
    got = estimate(run, shape, 7)
    assert got.tokens == {"calibration": 7 * 65536, "router": 8 * 100 * 64 * 4096, "expert": 8 * 200 * 128 * 4096}
    assert got.parameters["dense"] == 6_738_415_616 and got.parameters["router"] == 17_965_063
    attention, channel = 32 * 4 * 4096**2, 3 * 4096 * 32
    embeddings, norms = 2 * 32000 * 4096, 65 * 4096
    assert got.parameters["active"] == attention + channel * 5504 + embeddings + norms
    assert got.parameters["total_most"] == attention + 7 * channel * 5504 + embeddings + norms
    assert got.parameters["total"] == pytest.approx(11.6e9, rel=0.005)
    router_forward = 2 * (17_965_063 - 32000 * 512) + 4 * 512 * 2048.5
    by_rule = 6 * (attention + channel * 5504 + 32000 * 4096) + 6 * 2 * 32 * 4096 * 2048.5
    assert got.flops["expert"] / got.tokens["expert"] == pytest.approx(by_rule + router_forward, rel=1e-4)
    dense_forward = 2 * (attention + channel * 11008) + 4 * 32 * 4096 * 2048.5
    assert got.flops["router"] / got.tokens["router"] == pytest.approx(dense_forward + 3 * router_forward, rel=1e-4)
    assert str(got.parameters["dense"]) == "6738415616"


def test_settings_move_the_estimate_as_they_should():
    shape = config.ModelConfig(32000, 4096, 32, 32, 32, 128, 11008)
    base = Run(slice=Slice(permanent=False), tuning=Tuning(rounds=1))
    plain = estimate(base, shape, 7)
    assert estimate(replace(base, slice=Slice(tied=True)), shape, 7).parameters["total"] == plain.parameters["dense"]
    wide = estimate(replace(base, slice=Slice(permanent=False, width=0.75)), shape, 7)
    assert wide.parameters["active"] > plain.parameters["active"] and wide.flops["expert"] > plain.flops["expert"]
    assert wide.flops["router"] == plain.flops["router"]
    both = estimate(replace(base, slice=Slice(permanent=False, width=0.25, top_k=2)), shape, 7)
    assert both.parameters["active"] == plain.parameters["active"]
    assert both.parameters["total"] < plain.parameters["total"]
    taught = estimate(replace(base, expert_stage=ExpertStage(distill=0.5)), shape, 7)
    assert taught.flops["expert"] > 1.3 * plain.flops["expert"]
    labels = estimate(replace(base, router_stage=RouterStage(objective="domain")), shape, 7)
    assert labels.flops["router"] < 0.1 * plain.flops["router"]
    gates = estimate(replace(base, router=Router(kind="layerwise")), shape, 7)
    assert gates.parameters["router"] == 32 * 7 * 4096
    one = estimate(replace(base, slice=Slice(experts="one")), shape, 7)
    assert one.tokens["router"] == one.parameters["router"] == 0 and one.experts == 1
    assert estimate(replace(base, slice=Slice(num_experts=14)), shape, 7).experts == 14


BAD = {
    "misspelt gin name": (["--gin_param", "Slice.widht = 0.5"], "widht"),
    "mesh and devices": (["--devices", "64", "--gin_param", "Mesh.fsdp = 32"], "does not match 64 devices"),
    "router batch": (["--devices", "256"], "RouterStage.batch = 64 does not divide over fsdp = 256 devices"),
    "expert batch": (
        ["--devices", "64", "--gin_param", "ExpertStage.accumulate = 4"],
        "ExpertStage.batch = 128 in 4 micro-batches of 32 does not divide over fsdp = 64 devices",
    ),
    "context": (["--gin_param", "Data.sequence_length = 8192"], "meta-llama/Llama-2-7b-chat-hf takes 4096"),
    "experts": (["--gin_param", "Slice.num_experts = 10"], "with 7 domains it must be at most 7 or a multiple"),
    "no folder": (["--gin_param", "Data.folder = 'nowhere'"], "no data folder nowhere"),
    "no model": (["--gin_param", "Model.checkpoint = 'nowhere'"], "no such model: 'nowhere'"),
    "unknown source": (["--gin_param", "Data.domains = ['poetry']", "--gin_param", "Data.folder = '.'"], "'poetry'"),
}


@pytest.mark.parametrize("arguments, said", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_line(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = told(capsys, "--gin_file", str(LLAMA), "--dry_run", *arguments)
    assert code == 2 and out == "" and said in err and len(err.splitlines()) == 1


def test_missing_redpajama_files_are_each_named(capsys, tmp_path):
    for name in ("arxiv", "c4", "github", "stackexchange", "wikipedia"):
        (tmp_path / f"{name}_sample.jsonl").write_text('{"text": "x"}\n')
    for flags in (["--dry_run"], ["--output", str(tmp_path / "run")]):  # the run itself says the same
        code, _, err = told(capsys, "--gin_file", str(LLAMA), "--gin_param", f"Data.folder = '{tmp_path}'",
                            "--gin_param", "ExpertStage.accumulate = 1", *flags)  # fmt: skip
        assert code == 2 and len(err.splitlines()) == 1
        assert "book/book.jsonl (or book_sample.jsonl), common_crawl/*/*.jsonl.zst (or cc_*_sample.jsonl);" in err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("folder, experts", [("", 7), ("starter", 6)])
def test_domains_that_are_not_named_are_found_or_assumed(folder, experts, capsys):
    recipe = ROOT / "configs" / "recipes" / "paper_small.gin"
    code, out, _ = told(capsys, "--gin_file", str(recipe), "--dry_run", "--gin_param", f"Data.folder = '{folder}'")
    assert code == 0 and f"mixture of {experts}, total" in out
    assert ("7 are assumed" in out) == ("Data.folder is not set" in out) == (not folder)


def test_devices_are_for_dry_runs_alone(capsys):
    code, _, err = told(capsys, "--gin_file", str(LLAMA), "--devices", "4")
    assert code == 2 and "--dry_run" in err


def test_batches_of_several_axes():
    run = Run(router_stage=RouterStage(batch=12), expert_stage=ExpertStage(batch=24, accumulate=2))
    for mesh in (Mesh(data=2, fsdp=3), Mesh(data=1, fsdp=3, expert=2), Mesh(data=1, fsdp=3, tensor=2)):
        check_run(replace(run, mesh=mesh), 6)
    check_run(replace(run, mesh=Mesh(data=3, fsdp=1, tensor=8)), 24)  # of eight processes, each three share rows
    with pytest.raises(ConfigError, match="RouterStage.batch = 12 does not divide over data x fsdp = 8 devices"):
        check_run(replace(run, mesh=Mesh(data=2, fsdp=4)), 8)
    unused = replace(run.router_stage, steps=0)
    with pytest.raises(ConfigError, match="ExpertStage.batch = 24 in 2 micro-batches of 12"):
        check_run(replace(run, router_stage=unused, mesh=Mesh(data=2, fsdp=4)), 8)


def test_job_script_exits_with_zero():
    command = [sys.executable, "train.py", f"--gin_file={LLAMA.relative_to(ROOT)}", "--dry_run"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1,048,576,000" in done.stdout, done.stderr
