"""The command line end to end on a tiny model, and its words about bad input: one line, exit code 2, nothing left."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import runpy
import shutil
import signal
import struct
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from readme_jax.checkpoints.hf import load_dense, save_dense
from readme_jax.checkpoints.mixture import load_mixture, save_mixture
from readme_jax.cli import main, settings
from readme_jax.cli.answer import Piece, pieces, prompt_ids, show
from readme_jax.cli.guard import explain, guarded
from readme_jax.errors import DataError
from readme_jax.generate import Emitted, Generator, Sampling
from readme_jax.report import write_report
from readme_jax.tuning.rounds import Interrupted

SMALL = [
    "Data.sequence_length = 32",
    "Data.validation_tokens = 128",
    "Slice.calibration_tokens = 256",
    "Router.dim = 16",
    "Router.num_heads = 2",
    "Router.head_dim = 8",
    "Router.mlp_dim = 16",
    "RouterStage.steps = 2",
    "RouterStage.batch = 2",
    "ExpertStage.steps = 2",
    "ExpertStage.batch = 2",
    "Tuning.rounds = 1",
]
WORDS = {
    "news": "rain falls on the town and the river rises ",
    "code": "def f(x): return x + 1\nfor i in range(9): f(i)\n",
}


def write_domain(folder: Path, name: str, text: str, rows: int = 40) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    for split, count in (("train", rows), ("validation", rows)):
        lines = (json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(count))
        (folder / name / f"{split}.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name, text in WORDS.items():
        write_domain(folder, name, text)
    return folder


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory, tiny_model, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model") / "dense"
    save_dense(folder, tiny_model("dense", tiny_tokenizer))
    return folder


@pytest.fixture(scope="module")
def mixture_folder(tmp_path_factory, tiny_model, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model") / "mixture"
    save_mixture(folder, tiny_model("top1", tiny_tokenizer))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def refactoring(recipe: Path, model: Path, data: Path, output: Path, *more: str) -> list[str]:
    recipe.write_text("\n".join([*SMALL, f"Model.checkpoint = '{model}'", f"Data.folder = '{data}'"]) + "\n")
    return ["refactor", "--gin_file", str(recipe), "--output", str(output), *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, dense_folder, corpus):
    """The folder of one whole run, with everything a run can be asked for, and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    arguments = refactoring(folder / "r.gin", dense_folder, corpus, folder / "run", "--compare", "--prompt", "hello")
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
    jax.config.update("jax_disable_most_optimizations", False)
    assert exit_.value.code == 0
    return folder / "run", arguments


def called(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    out, err = capsys.readouterr()
    return exit_.value.code, out, err


def test_run_leaves_summary_report_and_settings(finished):
    run, _ = finished
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["domains"]) == set(WORDS)
    for row in (*summary["domains"].values(), summary["geo_mean"]):
        assert set(row) == {"dense", "sliced", "tuned", "dense_slice"}
        assert all(1 < value < 1e6 for value in row.values())
    assert summary["prompt"] == "hello" and {"answer", "dense_answer"} <= set(summary)
    page = (run / "report.html").read_text()
    assert f"{summary['geo_mean']['dense_slice']:.0f}" in page and "Dense slice, tuned" in page
    resolved = settings.from_json((run / "config.json").read_text())
    assert settings.load_run([run / "config.gin"], [f"Run.output = '{run}'"]) == resolved
    assert settings.load_run([run / "operative_config.gin"], [f"Run.output = '{run}'"]) == resolved
    assert "Slice.ridge" in (run / "operative_config.gin").read_text()


def test_finished_run_can_be_run_again_and_says_the_same(finished, capsys):
    run, arguments = finished
    before = json.loads((run / "summary.json").read_text())
    code, out, _ = called(capsys, *arguments[:-3])
    after = json.loads((run / "summary.json").read_text())
    assert code == 0 and "report.html" in out and "geometric mean" in out
    assert after["geo_mean"]["tuned"] == pytest.approx(before["geo_mean"]["tuned"], rel=1e-3)


def test_export_of_a_run_is_exact(finished, capsys, tmp_path):
    run, _ = finished
    code, out, _ = called(capsys, "export", "--run", str(run), "--out", str(tmp_path / "out"))
    assert code == 0 and out.strip() == str(tmp_path / "out")
    ours, theirs = load_mixture(tmp_path / "out"), load_mixture(run / "export")
    for tree in ("params", "channels", "router"):
        jax.tree.map(np.testing.assert_array_equal, getattr(ours, tree), getattr(theirs, tree))
    assert (ours.config, ours.mixture, ours.router_config) == (theirs.config, theirs.mixture, theirs.router_config)


def test_export_of_a_checkpoint_is_exact(dense_folder, capsys, tmp_path):
    code, _, _ = called(capsys, "export", "--checkpoint", str(dense_folder), "--out", str(tmp_path / "out"))
    ours, theirs = load_dense(tmp_path / "out"), load_dense(dense_folder)
    assert code == 0 and ours.config == theirs.config
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_generate_prints_the_answer_alone_when_piped(kind, dense_folder, mixture_folder, capsys, tiny_tokenizer):
    folder = {"dense": dense_folder, "mixture": mixture_folder}[kind]
    code, out, err = called(capsys, "generate", "--checkpoint", str(folder), "hi", "--max-tokens", "9")
    model = load_dense(folder) if kind == "dense" else load_mixture(folder)
    ids = tiny_tokenizer.encode("user: hi\nassistant:", special=False)
    tokens = Generator(model).generate([ids], 9, stop=tiny_tokenizer.eos_ids).tokens[0]
    assert (code, err) == (0, "")
    wanted = tiny_tokenizer.decode(tokens)
    assert out.startswith(wanted.rstrip("\ufffd")) and "\x1b" not in out


def test_raw_prompt_goes_in_as_it_is(tiny_tokenizer):
    assert prompt_ids(tiny_tokenizer, "hi", raw=True) == tiny_tokenizer.encode("hi")
    assert prompt_ids(tiny_tokenizer, "hi") == tiny_tokenizer.encode("user: hi\nassistant:")


def test_pieces_join_to_the_whole_text_and_stop_at_the_end(tiny_model, tiny_tokenizer):
    class Scripted:
        """Emits the bytes of a text, two of them one character, then an end."""

        def stream(self, prompts, max_tokens, sampling, stop):
            for i, token in enumerate(tiny_tokenizer.encode("aé\n z") + [stop[0]]):
                yield Emitted(np.asarray([token]), np.asarray([[i % 3]]), np.asarray([token != stop[0]]))

    out = list(pieces(Scripted(), tiny_tokenizer, [1], 99, Sampling()))
    assert [p.text for p in out] == ["a", "é", "\n", " ", "z"]
    assert [p.experts for p in out] == [(0,), (2,), (0,), (1,), (2,)]


def test_terminal_gets_colours_and_a_legend(tiny_model, tiny_tokenizer):
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=60)
    show(iter([Piece("one", (0,)), Piece(" [b]", (2,)), Piece(" two", (0,))]), console, ["arxiv", "book", "code"])
    text = console.file.getvalue()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert plain.startswith("one [b] two\n")
    assert "arxiv 67%" in plain and "code 33%" in plain and "book" not in plain
    assert text.count("\x1b[38;2;0;114;178m") >= 3  # two tokens of the first expert, and its legend


@pytest.mark.usefixtures("quickly_compiled")
def test_perplexity_prints_every_domain(mixture_folder, corpus, capsys):
    code, out, _ = called(
        capsys, "perplexity", "--checkpoint", str(mixture_folder), "--data", str(corpus),
        "--tokens", "128", "--window", "32",
    )  # fmt: skip
    assert code == 0
    for said in (*WORDS, "geometric mean", "most used expert", "domain_"):
        assert said in out


# --- bad input ----------------------------------------------------------------------------------------------------


def broken_model(kind: str, good: Path, folder: Path) -> str:
    """A source of a model that is wrong in one way."""
    if kind == "missing":
        return str(folder / "nope")
    shutil.copytree(good, folder / "model")
    config = folder / "model" / "config.json"
    if kind == "no config":
        config.unlink()
    elif kind == "cut short":
        weights = folder / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "cut in the header":
        weights = folder / "model" / "model.safetensors"
        weights.write_bytes(struct.pack("<Q", 1 << 20) + b"{}")
    else:
        values = json.loads(config.read_text()) | {"architectures": ["GPT2LMHeadModel"]}
        config.write_text(json.dumps(values))
    return str(folder / "model")


def one_line(error: str, *said: str) -> None:
    assert error.startswith("error: ") and error.count("\n") == 1, error
    for each in said:
        assert each in error


BROKEN = {
    "missing": "no such model",
    "no config": "config.json",
    "cut short": "model.safetensors",
    "cut in the header": "model.safetensors",
    "architecture": "GPT2LMHeadModel",
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("command", ["generate", "perplexity", "refactor", "export"])
def test_broken_models(kind, command, dense_folder, corpus, capsys, tmp_path):
    source = broken_model(kind, dense_folder, tmp_path)
    arguments = {
        "generate": ["generate", "--checkpoint", source, "hi"],
        "perplexity": ["perplexity", "--checkpoint", source, "--data", str(corpus)],
        "refactor": refactoring(tmp_path / "r.gin", Path(source), corpus, tmp_path / "run"),
        "export": ["export", "--checkpoint", source, "--out", str(tmp_path / "run")],
    }[command]
    code, _, err = called(capsys, *arguments)
    assert code == 2
    one_line(err, BROKEN[kind])
    assert not (tmp_path / "run").exists()


def bad_text(kind: str, folder: Path) -> None:
    for name, text in WORDS.items():
        write_domain(folder, name, text)
    train = folder / "code" / "train.jsonl"
    if kind == "empty domain":
        train.write_text("")
    elif kind == "not JSON lines":
        train.write_text('{"text": "fine"}\nnot json\n')
    elif kind == "no text field":
        train.write_text('{"text": "fine"}\n{"body": "x"}\n')
    elif kind == "too few tokens":
        train.write_text('{"text": "short"}\n')
    elif kind == "too little validation":
        (folder / "code" / "validation.jsonl").write_text('{"text": "short"}\n')
    else:
        shutil.rmtree(folder)


BAD_TEXT = {
    "empty domain": ("code", "empty"),
    "not JSON lines": ("train.jsonl", "2"),
    "no text field": ("train.jsonl", "2"),
    "too few tokens": ("code", "sequence"),
    "too little validation": ("code", "validation"),
    "no folder": ("text",),
}


@pytest.mark.parametrize("kind", BAD_TEXT)
def test_bad_text(kind, dense_folder, capsys, tmp_path):
    bad_text(kind, tmp_path / "text")
    code, _, err = called(capsys, *refactoring(tmp_path / "r.gin", dense_folder, tmp_path / "text", tmp_path / "run"))
    assert code == 2
    one_line(err.splitlines(keepends=True)[-1], *BAD_TEXT[kind])
    assert not (tmp_path / "run").exists()


BAD_MEASURES = {
    "no such folder": ("--data nope", "nope"),
    "no such domain": ("--domain poetry", "poetry"),
    "no tokens": ("--tokens 0", "above zero"),
    "a window of one": ("--window 1", "--window 1"),
    "no windows a step": ("--batch 0", "--batch 0"),
    "a window longer than its text": ("--tokens 64 --window 128", "128"),
}


@pytest.mark.parametrize("options, said", BAD_MEASURES.values(), ids=BAD_MEASURES.keys())
def test_bad_perplexity(options, said, mixture_folder, corpus, capsys):
    arguments = ["perplexity", "--checkpoint", str(mixture_folder), "--data", str(corpus), "--window", "32"]
    code, _, err = called(capsys, *arguments, *options.split())
    assert code == 2
    one_line(err, said)


BAD_ANSWERS = {
    "no tokens": ("--max-tokens 0", "max_tokens"),
    "below zero": ("--temperature -1", "temperature"),
    "no nucleus": ("--top-p 0", "top_p"),
    "longer than the context": ("--max-tokens 100000", "100000"),
    "a seed of 70 bits": ("--temperature 1 --seed 999999999999999999999", "seed"),
}


@pytest.mark.parametrize("options, said", BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
def test_bad_generate(options, said, mixture_folder, capsys):
    code, out, err = called(capsys, "generate", "--checkpoint", str(mixture_folder), "hi", *options.split())
    assert (code, out) == (2, "")
    one_line(err, said)


BAD_SETTINGS = {
    "width above one": ("Slice.width = 1.5", "(0, 1]"),
    "width zero": ("Slice.width = 0.0", "(0, 1]"),
    "misspelt": ("Slice.widht = 0.5", "widht"),
    "wrong type": ("ExpertStage.lr = 'fast'", "expected float"),
    "seed below zero": ("Run.seed = -1", "zero or more"),
}


@pytest.mark.parametrize("line, said", BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_bad_settings(line, said, dense_folder, corpus, capsys, tmp_path):
    arguments = refactoring(tmp_path / "r.gin", dense_folder, corpus, tmp_path / "run")
    with (tmp_path / "r.gin").open("a") as f:
        f.write(line + "\n")
    code, _, err = called(capsys, *arguments)
    assert code == 2
    one_line(err, f"r.gin:{len(SMALL) + 3}", said)
    assert not (tmp_path / "run").exists()


def test_settings_that_are_no_text(dense_folder, capsys, tmp_path):
    code, _, err = called(capsys, "refactor", "--gin_file", str(dense_folder / "model.safetensors"))
    assert code == 2
    one_line(err, "model.safetensors: not a gin file")


@pytest.mark.parametrize("below", ["", "run"])
def test_output_that_is_a_file(below, dense_folder, corpus, capsys, tmp_path):
    (tmp_path / "notes").write_text("years of work")
    code, _, err = called(capsys, *refactoring(tmp_path / "r.gin", dense_folder, corpus, tmp_path / "notes" / below))
    assert code == 2
    one_line(err, "notes is a file")
    assert (tmp_path / "notes").read_text() == "years of work"


def test_resuming_with_other_settings(finished, capsys):
    run, arguments = finished
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    code, _, err = called(capsys, *arguments[:-3], "--gin_param", "ExpertStage.lr = 0.5")
    assert code == 2
    one_line(err, "expert_stage.lr", "0.5")
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_disk_full_while_exporting(dense_folder, capsys, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("readme_jax.checkpoints.hf.save_file", full)
    code, _, err = called(capsys, "export", "--checkpoint", str(dense_folder), "--out", str(tmp_path / "out"))
    assert code == 2
    one_line(err, "disk full")
    assert list(tmp_path.iterdir()) == []


def test_disk_full_while_writing_a_report(finished, capsys, tmp_path, monkeypatch):
    for name in ("summary.json", "facts.json"):
        shutil.copy(finished[0] / name, tmp_path)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("readme_jax.files.os.replace", full)
    assert guarded(lambda: write_report(tmp_path)) == 2
    one_line(capsys.readouterr().err, "disk full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["facts.json", "summary.json"]


def test_usage_errors_are_one_line(capsys):
    for line in ("generate", "refactor --nope", "perplexity --tokens many", "fly", "export --out x"):
        code, _, err = called(capsys, *line.split())
        assert code == 2
        one_line(err)


def test_interrupted_run_says_what_was_saved(capsys):
    def interrupted():
        raise Interrupted(signal.SIGTERM, 12)

    assert guarded(interrupted) == 128 + signal.SIGTERM
    err = capsys.readouterr().err
    assert "saved after 12 steps" in err and err.count("\n") == 1


def test_our_own_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 / 0)


def test_causes_are_explained_through_other_exceptions():
    try:
        try:
            raise DataError("no text")
        except DataError as e:
            raise RuntimeError("a thread failed\nbadly") from e
    except RuntimeError as e:
        assert explain(e) == "no text"
    assert "disk full" in explain(ValueError("kv store: No space left on device [fd=3]"))
    assert "cannot write" in explain(PermissionError(errno.EACCES, "Permission denied", "/x"))


def test_train_py_is_refactor(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")  # or it would start pytest again
    monkeypatch.setattr(sys, "argv", ["train.py", f"--gin_file={tmp_path / 'nope.gin'}"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(Path(__file__).parent.parent / "train.py"), run_name="__main__")
    assert exit_.value.code == 2
    one_line(capsys.readouterr().err, "no gin file")
