"""The real engine and a tiny mixture: behind a server in this process, and `serve.py` as a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import httpx2
import jax
import openai
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from readme_jax import config
from readme_jax.checkpoints.hf import save_dense
from readme_jax.checkpoints.mixture import save_mixture
from readme_jax.cli import main
from readme_jax.generate import Generator
from readme_jax.serving.engine import Engine
from readme_jax.serving.http.server import bind
from readme_jax.serving.request import Request, SamplingParams

SETTINGS = config.Serving(rows=2, length=64, page_size=8, queue=4, chunk=16, budget=32, scheduler="decode_first")
SMALL = ("rows=1", "length=64", "chunk=16", "scheduler='decode_first'")  # few programs to compile
PAIRS = [
    ("The capital", " of France"),
    ("", "none"),
    ("5 €", " or 6 €"),
    ("The capital", " is it"),
    ("a" * 20, "b" * 9),
]


@pytest.fixture(scope="module")
def model(tiny_model, tiny_tokenizer):
    return tiny_model("top2", tiny_tokenizer)


@pytest.fixture(scope="module")
def real(model, serve):
    """A server's engine and address."""
    jax.config.update("jax_disable_most_optimizations", True)
    engine = Engine.build(model, SETTINGS)
    with serve(engine, model.tokenizer, ["news", "code", "law"]) as url:
        end = time.monotonic() + 120
        while httpx2.get(f"{url}/ready").status_code != 200:
            assert httpx2.get(f"{url}/health").status_code == 200 and time.monotonic() < end
            time.sleep(0.1)
        yield engine, url
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def client(real):
    with openai.OpenAI(base_url=f"{real[1]}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_the_clients_answers_are_the_models(real, client, model):
    prompts = [[5, 3, 8, 1], [7], list(range(20))]
    expected = Generator(model).generate(prompts, 9, stop=model.tokenizer.eos_ids).tokens
    done = client.completions.create(model="tiny", prompt=prompts, max_tokens=9, temperature=0, logprobs=1)
    assert [c.text for c in done.choices] == [model.tokenizer.decode(tokens) for tokens in expected]
    for choice in done.choices:
        found = choice.logprobs
        assert all(p == max(top.values()) for p, top in zip(found.token_logprobs, found.top_logprobs, strict=True))
    chunks = client.completions.create(model="tiny", prompt=prompts[2], max_tokens=9, temperature=0, stream=True)
    assert "".join(c.choices[0].text for c in chunks) == done.choices[2].text


def test_a_seed_fixes_the_answer(client):
    def answer(seed):
        asked = [{"role": "user", "content": "hi"}]
        done = client.chat.completions.create(model="tiny", messages=asked, max_tokens=12, temperature=1.5, seed=seed)
        return done.choices[0].message.content

    assert answer(1) == answer(1) != answer(2)


def test_lm_eval_over_http_equals_the_engine_in_process(real, model, tmp_path):
    engine, url = real
    model.tokenizer.save(tmp_path)
    evaluated = LocalCompletionsAPI(
        model="tiny", base_url=f"{url}/v1/completions", tokenizer=str(tmp_path), tokenizer_backend="huggingface"
    )
    found = evaluated.loglikelihood([Instance("loglikelihood", {}, p, i) for i, p in enumerate(PAIRS)], True)
    encode = partial(model.tokenizer.encode, special=False)
    for (context, continuation), (logprob, greedy) in zip(PAIRS, found, strict=True):
        start = encode(context) or list(model.tokenizer.eos_ids)
        params = SamplingParams(max_tokens=0, logprobs=1, echo=True)
        done = engine.submit(Request([*start, *encode(continuation)], params)).result()
        scored = done.prompt_logprobs[len(start) :]
        assert logprob == sum(p.logprob for p in scored)
        assert greedy == all(p.logprob == p.top[0][1] for p in scored)


@pytest.mark.parametrize(
    "body, param",
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a" * 64}, "prompt"),
        ({"prompt": "a" * 60, "max_tokens": 5}, "max_tokens"),
        ({"prompt": [260]}, "prompt"),
        ({"prompt": "a", "stop": list("abcde")}, "stop"),
        ({"prompt": "a", "stop_token_ids": [999]}, "stop_token_ids"),
    ],
)
def test_bad_input_is_named_and_the_engine_goes_on(client, body, param):
    extra = {"stop_token_ids": body.pop("stop_token_ids", [])}
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", **body, extra_body=extra)
    assert caught.value.param == param
    assert client.completions.create(model="tiny", prompt="go on", max_tokens=2).usage.completion_tokens


def test_a_temperature_that_is_no_number_is_named(real):
    for value in (float("nan"), float("inf"), "hot"):
        body = json.dumps({"prompt": "a", "temperature": value})  # NaN and Infinity, as some clients write them
        answer = httpx2.post(f"{real[1]}/v1/completions", content=body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "temperature"
    assert httpx2.post(f"{real[1]}/v1/completions", json={"prompt": "go on", "max_tokens": 2}).status_code == 200


def test_a_client_that_goes_frees_everything(real):
    engine, url = real
    with httpx2.stream("POST", f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 60, "stream": True}) as sent:
        next(sent.iter_lines())
    end = time.monotonic() + 20
    while engine.stats().running + engine.stats().waiting:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert engine.stats().free_rows == SETTINGS.rows


def test_route_before_generation(real):
    engine, url = real
    answer = httpx2.post(f"{url}/v1/route", json={"prompt": "hello"}).json()
    assert answer["routes"] == [list(route) for route in engine.route("hello").experts]
    assert sum(e["tokens"] for e in answer["experts"]) == 2 * 5 and answer["load_bytes"] == 0


# --- serve.py ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / "export"
    save_mixture(path, model)
    return path


def test_serve_py_drains_on_sigterm(tiny_model, tiny_tokenizer, tmp_path):
    root, folder = Path(__file__).parents[3], tmp_path / "model"
    save_dense(folder, tiny_model("dense", tiny_tokenizer))
    arguments = [
        "--checkpoint",
        str(folder),
        "--port",
        "0",
        "--name",
        "mine",
        *(f"--gin_param=Serving.{x}" for x in SMALL),
    ]
    settings = {"PYTHONPATH": str(root), "XDG_CACHE_HOME": str(tmp_path / "c"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(root / "serve.py"), *arguments],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = process.stdout.readline()
        assert said.startswith("mine: http://127.0.0.1:")
        with openai.OpenAI(base_url=said.split()[1], api_key="none", timeout=120) as client:
            stream = client.completions.create(model="mine", prompt="a", max_tokens=60, stream=True)
            pieces = [next(iter(stream))]  # waits for the warm-up
            process.send_signal(signal.SIGTERM)
            pieces += list(stream)
        assert pieces[-1].choices[0].finish_reason in ("length", "stop")
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "Traceback" not in err and "programs compiled" in err


def told(capsys, *arguments: str) -> str:
    """The one line that a failed start prints."""
    with pytest.raises(SystemExit) as exit_:
        main(["serve", *arguments])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def test_a_start_that_cannot_be_is_one_line(folder, capsys, tmp_path):
    assert "no such model" in told(capsys, "--checkpoint", str(tmp_path / "none"), "--port", "0")
    (tmp_path / "config.json").write_text("{")
    assert "not JSON" in told(capsys, "--checkpoint", str(tmp_path), "--port", "0")
    assert "Serving.rows = 0" in told(
        capsys, "--checkpoint", str(folder), "--port", "0", "--gin_param", "Serving.rows=0"
    )
    assert "no gin file" in told(capsys, "--checkpoint", str(folder), "--port", "0", "--gin_file", "none.gin")
    with bind("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port} (address already in use)" in told(capsys, "--checkpoint", str(folder), "--port", port)


def test_router_and_experts_that_disagree(folder, capsys, tmp_path):
    broken = tmp_path / "export"
    shutil.copytree(folder, broken)
    about = json.loads((broken / "config.json").read_text())
    about["router"]["num_experts"] += 1
    (broken / "config.json").write_text(json.dumps(about))
    assert "4 experts, but the mixture has 3" in told(capsys, "--checkpoint", str(broken), "--port", "0")
