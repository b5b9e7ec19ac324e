"""Files of prompts: answered once each, across interruptions, with errors that name the field."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_programs import FakeModel, fake_engine
from typer.testing import CliRunner

from readme_jax import config
from readme_jax.checkpoints.mixture import save_mixture
from readme_jax.cli.app import app
from readme_jax.errors import DataError
from readme_jax.serving.batch import done_ids, read_prompts, run_batch
from readme_jax.serving.engine import Draining

MODEL = FakeModel()


@pytest.fixture
def engine():
    engine = fake_engine(config.Serving(rows=2, length=64, chunk=8, queue=3))
    engine.start()
    yield engine
    engine.stop()


def write(path, lines) -> None:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))


def answers(path) -> dict:
    read = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({a["id"] for a in read}) == len(read)
    return {a["id"]: a for a in read}


def test_every_prompt_is_answered_once_though_the_queue_is_short(engine, tmp_path):
    lines = [{"prompt": [i + 1, 7], "max_tokens": 1 + i % 5, "id": f"a{i}"} for i in range(20)]
    write(tmp_path / "in.jsonl", lines)
    told = []
    items = read_prompts(tmp_path / "in.jsonl")
    assert run_batch(engine, items, tmp_path / "out.jsonl", told.append) == (20, 0)
    got = answers(tmp_path / "out.jsonl")
    for line in lines:
        assert got[line["id"]]["tokens"] == MODEL.generate(line["prompt"], line["max_tokens"])
    assert sum(told) == sum(2 + line["max_tokens"] for line in lines)
    assert run_batch(engine, items, tmp_path / "out.jsonl") == (0, 0)


def test_an_interrupted_run_goes_on_after_its_last_whole_line(engine, tmp_path):
    write(tmp_path / "in.jsonl", [{"prompt": [i + 1], "max_tokens": 3} for i in range(10)])
    items, out = read_prompts(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"

    class Interrupted(Exception):
        pass

    def interrupt(tokens):
        if len(out.read_text().splitlines()) == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_batch(engine, items, out, interrupt)
    with out.open("a") as f:
        f.write('{"id": "9", "te')  # as a crash leaves it
    assert run_batch(engine, items, out) == (6, 0)
    assert {i: a["tokens"] for i, a in answers(out).items()} == {
        str(i + 1): MODEL.generate([i + 1], 3) for i in range(10)
    }


def test_a_bad_request_is_answered_with_its_field(engine, tmp_path):
    lines = [
        {"prompt": []},
        {"prompt": [999]},
        {"prompt": [1], "temperature": -1},
        {"prompt": [1], "heat": 2},
        {},
        {"prompt": [1], "max_tokens": 2, "logprobs": 1},
    ]
    write(tmp_path / "in.jsonl", lines)
    assert run_batch(engine, read_prompts(tmp_path / "in.jsonl"), tmp_path / "out.jsonl") == (6, 5)
    got = answers(tmp_path / "out.jsonl")
    fields = [got[str(i + 1)].get("field") for i in range(6)]
    assert fields == ["prompt", "prompt", "temperature", "heat", "prompt", None]
    assert len(got["6"]["logprobs"]) == 2


def test_an_engine_that_takes_no_more_is_not_waited_for(engine, tmp_path):
    write(tmp_path / "in.jsonl", [{"prompt": [1]}])
    engine.stop()
    with pytest.raises(Draining):
        run_batch(engine, read_prompts(tmp_path / "in.jsonl"), tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == ""


@pytest.mark.parametrize(
    "lines, said",
    [(["{bad\n"], ":1: not JSON"), (["[1]\n"], ":1: expected"), ([{"id": 1, "prompt": "a"}] * 2, ":2: id '1'")],
)
def test_a_bad_file_is_named_with_its_line(lines, said, tmp_path):
    write(tmp_path / "in.jsonl", lines)
    with pytest.raises(DataError, match=said):
        read_prompts(tmp_path / "in.jsonl")


def test_a_file_that_is_no_output_is_not_written_to(engine, tmp_path):
    for text in ['{"prompt": [1], "id": 3}\n', "[1]\n", "notes without an end of line"]:
        write(tmp_path / "in.jsonl", [{"prompt": [1]}])
        write(tmp_path / "other", [text])
        with pytest.raises(DataError, match="give another --out"):
            run_batch(engine, read_prompts(tmp_path / "in.jsonl"), tmp_path / "other")
        assert (tmp_path / "other").read_text() == text
    with pytest.raises(DataError, match="no.jsonl"):
        read_prompts(tmp_path / "no.jsonl")


def test_the_command_says_how_to_use_it():
    said = CliRunner().invoke(app, ["batch", "--help"]).output
    assert "--out" in said and "--checkpoint" in said


# --- the command, over a checkpoint -----------------------------------------------------------------------------------

SETTINGS = ("rows=2", "length=64", "chunk=16", "slots=1", "staging=1", "scheduler='decode_first'")


@pytest.fixture
def command(tiny_model, tiny_tokenizer, tmp_path):
    """Starts `readme-jax batch` on an exported mixture, with a file of 150 prompts, towards a file of answers."""
    save_mixture(tmp_path / "export", tiny_model("top1", tiny_tokenizer, experts=2))
    drawn = {"temperature": 0.9, "top_p": 0.9}
    kinds = [{}, drawn, {"stop": ["e", "in"]}, {"logprobs": 99}]  # the last one cannot be served
    lines = [
        {"prompt": f"{i} of many" if i % 3 else [i, 7, 9], "max_tokens": 5 + i % 20, "seed": i, **kinds[i % 4]}
        for i in range(150)
    ]
    write(tmp_path / "in.jsonl", lines)
    root = Path(__file__).parents[2]
    start = [sys.executable, "-c", "from readme_jax.cli import start; start()", "batch", str(tmp_path / "in.jsonl")]
    settings = [f"--gin_param=Serving.{x}" for x in SETTINGS]
    environment = {
        "PYTHONPATH": str(root),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }

    def run(out: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*start, "--checkpoint", str(tmp_path / "export"), "--out", str(out), *settings],
            env={**os.environ, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def test_a_batch_that_was_killed_ends_with_the_same_answers(command, tmp_path):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    undisturbed = command(whole)
    _, said = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, said
    assert "150 answered (37 with an error), 0 were there before" in said and "programs compiled" in said
    killed = command(parts)
    while not parts.exists() or len(parts.read_bytes().splitlines()) < 30:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    killed.terminate()
    _, said = killed.communicate(timeout=60)
    assert killed.returncode and "Traceback" not in said
    held = len(done_ids(parts))
    assert 30 <= held < 150
    last = command(parts)
    _, said = last.communicate(timeout=300)
    assert last.returncode == 0 and f"{150 - held} answered" in said
    assert sorted(parts.read_text().splitlines()) == sorted(whole.read_text().splitlines())
