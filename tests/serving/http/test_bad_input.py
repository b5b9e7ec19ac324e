"""Bad input: a 4xx in OpenAI's shape that names the parameter, and the server goes on."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TEXT = {"prompt": "hi"}
HALF = "\ud83d"  # of a surrogate pair
# name -> (body, the parameter that is wrong)
COMPLETIONS = {
    "no prompt": ({}, "prompt"),
    "null prompt": ({"prompt": None}, "prompt"),
    "empty text": ({"prompt": ""}, "prompt"),
    "empty list": ({"prompt": []}, "prompt"),
    "empty ids": ({"prompt": [[]]}, "prompt"),
    "one empty of two": ({"prompt": ["a", ""]}, "prompt"),
    "a number": ({"prompt": 5}, "prompt"),
    "mixed": ({"prompt": ["a", 1]}, "prompt"),
    "true as id": ({"prompt": [True]}, "prompt"),
    "fractional id": ({"prompt": [1.5]}, "prompt"),
    "id too large": ({"prompt": [257]}, "prompt"),
    "id below zero": ({"prompt": [[-1]]}, "prompt"),
    "huge id": ({"prompt": [10**30]}, "prompt"),
    "huge id echoed": ({"prompt": [10**30], "echo": True}, "prompt"),
    "prompt too long": ({"prompt": "a" * 600}, "prompt"),
    "half a surrogate pair": ({"prompt": HALF}, None),
    "NaN temperature": ({**TEXT, "temperature": float("nan")}, "temperature"),
    "infinite temperature": ({**TEXT, "temperature": float("inf")}, "temperature"),
    "temperature as text": ({**TEXT, "temperature": "hot"}, "temperature"),
    "negative temperature": ({**TEXT, "temperature": -0.1}, "temperature"),
    "top_p zero": ({**TEXT, "top_p": 0}, "top_p"),
    "top_p above one": ({**TEXT, "top_p": 1.1}, "top_p"),
    "top_k below zero": ({**TEXT, "top_k": -1}, "top_k"),
    "min_p above one": ({**TEXT, "min_p": 2}, "min_p"),
    "no tokens": ({**TEXT, "max_tokens": 0}, "max_tokens"),
    "fewer than none": ({**TEXT, "max_tokens": -1}, "max_tokens"),
    "tokens as text": ({**TEXT, "max_tokens": "5"}, "max_tokens"),
    "five stops": ({**TEXT, "stop": list("abcde")}, "stop"),
    "empty stop": ({**TEXT, "stop": ""}, "stop"),
    "stop of numbers": ({**TEXT, "stop": [1]}, "stop"),
    "stop ids as text": ({**TEXT, "stop_token_ids": ["1"]}, "stop_token_ids"),
    "too many logprobs": ({**TEXT, "logprobs": 21}, "logprobs"),
    "logprobs as truth": ({**TEXT, "logprobs": True}, "logprobs"),
    "seed as text": ({**TEXT, "seed": "x"}, "seed"),
    "two answers": ({**TEXT, "n": 2}, "n"),
    "best of two": ({**TEXT, "best_of": 2}, "best_of"),
    "a suffix": ({**TEXT, "suffix": "end"}, "suffix"),
    "a penalty": ({**TEXT, "presence_penalty": 0.5}, "presence_penalty"),
    "a bias": ({**TEXT, "logit_bias": {"1": 2}}, "logit_bias"),
    "misspelt": ({**TEXT, "max_token": 5}, "max_token"),
    "options without stream": ({**TEXT, "stream_options": {"include_usage": True}}, "stream_options"),
    "unknown stream option": ({**TEXT, "stream": True, "stream_options": {"x": 1}}, "stream_options"),
    "another model": ({**TEXT, "model": "gpt-4"}, "model"),
}
CHATS = {
    "no messages": ({}, "messages"),
    "empty messages": ({"messages": []}, "messages"),
    "a text": ({"messages": "hi"}, "messages"),
    "no role": ({"messages": [{"content": "hi"}]}, "messages"),
    "no content": ({"messages": [{"role": "user"}]}, "messages"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    "too long": ({"messages": [{"role": "user", "content": "a" * 600}]}, "messages"),
    "tools": ({**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    "JSON wanted": ({**CHAT, "response_format": {"type": "json_object"}}, "response_format"),
    "top without logprobs": ({**CHAT, "top_logprobs": 3}, "top_logprobs"),
    "too many top": ({**CHAT, "logprobs": True, "top_logprobs": 50}, "top_logprobs"),
    "two limits": ({**CHAT, "max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    "limit below one": ({**CHAT, "max_completion_tokens": 0}, "max_completion_tokens"),
}
ROUTES = {
    "nothing": ({}, "prompt"),
    "both": ({**CHAT, **TEXT}, "prompt"),
    "two prompts": ({"prompt": ["a", "b"]}, "prompt"),
    "id too large": ({"prompt": [999]}, "prompt"),
}
CASES = [
    pytest.param(path, *case, id=f"{path}: {name}")
    for path, cases in (("completions", COMPLETIONS), ("chat/completions", CHATS), ("route", ROUTES))
    for name, case in cases.items()
]


def refused(answer, param):
    """A 4xx whose error names the parameter, on one line."""
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert error["message"] and "\n" not in error["message"]
    return error["message"]


@pytest.fixture(scope="module")
def shared(tiny_tokenizer, serve):
    """One server for all: what a bad request breaks, the next test sees."""
    import httpx2
    from fake_engine import FakeEngine

    with (
        serve(FakeEngine(tiny_tokenizer), tiny_tokenizer, ["a", "b", "c"]) as url,
        httpx2.Client(base_url=url, timeout=20) as client,
    ):
        yield client


@pytest.mark.parametrize("path, body, param", CASES)
def test_is_refused_by_name(shared, path, body, param):
    answer = shared.post(f"/v1/{path}", content=json.dumps(body))
    message = refused(answer, param)
    assert param is None or param in message
    assert shared.post("/v1/completions", json={"prompt": "go on", "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 100000])
def test_bodies_that_are_no_json_objects(shared, content):
    refused(shared.post("/v1/completions", content=content), None)


def test_a_body_too_large(shared):
    answer = shared.post("/v1/completions", content=b" " * (17 * 2**20))
    assert answer.status_code == 413
    refused(answer, None)


def test_unknown_paths_and_methods(shared):
    assert shared.get("/v1/nothing").status_code == 404
    assert shared.get("/v1/completions").status_code == 405
    refused(shared.get("/v1/nothing"), None)
    refused(shared.get("/v1/completions"), None)


def test_a_template_that_refuses_the_messages(engine, tiny_tokenizer, serve, monkeypatch):
    import httpx2

    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with serve(engine, tiny_tokenizer, []) as url:
        assert "must alternate" in refused(httpx2.post(f"{url}/v1/chat/completions", json=CHAT), "messages")
        monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ messages.__class__.__mro__ }}")
        refused(httpx2.post(f"{url}/v1/chat/completions", json=CHAT), "messages")
        monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
        assert "template" in refused(httpx2.post(f"{url}/v1/chat/completions", json=CHAT), "messages")


def test_our_own_failures_are_500_without_inside_knowledge(http, engine, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(engine, "submit", broken)
    answer = http.post("/v1/completions", json=TEXT)
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text
    monkeypatch.undo()
    assert http.post("/v1/completions", json=TEXT).status_code == 200


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(
        sorted({k for body, _ in (*COMPLETIONS.values(), *CHATS.values()) for k in body} - {"stream"})
    ),
    value=ANYTHING,
    path=st.sampled_from(["completions", "chat/completions", "route"]),
)
def test_no_value_of_any_parameter_is_our_failure(shared, name, value, path):
    base = CHAT if path == "chat/completions" else TEXT
    answer = shared.post(
        f"/v1/{path}",
        content=json.dumps({**base, "max_tokens": 1, name: value} if path != "route" else {**base, name: value}),
    )
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"]
