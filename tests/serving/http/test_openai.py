"""The official client, unmodified, against a server: completions, chat, streams, logprobs, errors."""

from __future__ import annotations

import math

import numpy as np
import openai
import pytest

PROMPT = "once upon"


def greedy(engine, prompt: list[int], count: int) -> list[int]:
    """What the model says, token by token, without a server."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(engine.model.logprobs(tokens))))
    return tokens[len(prompt) :]


@pytest.fixture
def expected(engine):
    """The greedy continuation of a text."""
    return lambda text, count: engine.tokenizer.decode(greedy(engine, engine.tokenizer.encode(text), count))


def test_models(client):
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "readme_jax"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.param == "model"


def test_completion(client, expected):
    done = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=7, temperature=0)
    assert done.object == "text_completion" and done.model == "tiny"
    assert done.choices[0].text == expected(PROMPT, 7)
    assert done.choices[0].finish_reason == "length" and done.choices[0].logprobs is None
    assert done.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": 9,
        "completion_tokens": 7,
        "total_tokens": 16,
    }
    assert len(client.completions.create(model="tiny", prompt=PROMPT).choices[0].text) == 16  # OpenAI's default


def test_every_kind_of_prompt(client, engine, expected):
    def texts(prompt):
        done = client.completions.create(model="tiny", prompt=prompt, max_tokens=5)
        assert [c.index for c in done.choices] == list(range(len(done.choices)))
        return [c.text for c in done.choices], done.usage.prompt_tokens

    ids = engine.tokenizer.encode
    both = [expected("one", 5), expected("three", 5)]
    assert texts("one") == texts(["one"]) == texts(ids("one")) == texts([ids("one")]) == (both[:1], 3)
    assert texts(["one", "three"]) == texts([ids("one"), ids("three")]) == (both, 8)


def test_parameters_reach_the_engine(client, engine):
    client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=3,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        stop=["ab", "cd"],
        logprobs=4,
        extra_body={"top_k": 5, "min_p": 0.1, "stop_token_ids": [1]},
        user="someone",
        n=1,
        presence_penalty=0,
    )
    params = engine.seen[0].params
    assert (params.max_tokens, params.temperature, params.top_p, params.seed) == (3, 0.5, 0.9, 7)
    assert (params.stop, params.top_k, params.min_p, params.stop_ids) == (("ab", "cd"), 5, 0.1, (1,))
    assert params.logprobs == 4 and not params.echo
    client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_completion_tokens=2, stop="x"
    )
    params = engine.seen[1].params
    assert (params.max_tokens, params.temperature, params.stop, params.logprobs) == (2, 1.0, ("x",), None)


def test_stop(client, expected):
    text = expected(PROMPT, 6)
    stop = text[4]
    done = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, stop=stop).choices[0]
    assert done.text == text[: text.index(stop)] and done.finish_reason == "stop"


def test_completion_logprobs_with_echo(client, engine):
    prompt = engine.tokenizer.encode("h€y")  # the euro sign is three tokens
    done = client.completions.create(model="tiny", prompt=[prompt], max_tokens=2, logprobs=3, echo=True).choices[0]
    tokens = prompt + greedy(engine, prompt, 2)
    assert done.text == engine.tokenizer.decode(tokens)
    found = done.logprobs
    assert found.tokens[:5] == ["h", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "y"]
    assert "".join(found.tokens[4:]) == done.text[2:]
    assert found.text_offset == [0, 1, 1, 1, 2, 3, 4]
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    for i in range(1, len(tokens)):
        row = engine.model.logprobs(tokens[:i])
        assert found.token_logprobs[i] == float(row[tokens[i]])
        top = found.top_logprobs[i]
        assert len(top) in (3, 4) and top[found.tokens[i]] == found.token_logprobs[i]
        assert max(top.values()) == float(row.max())
    assert found.token_logprobs[-1] == max(found.top_logprobs[-1].values())  # greedy: the identical float


def test_scoring_without_generation(client, engine):
    done = client.completions.create(model="tiny", prompt="abc", max_tokens=0, logprobs=0, echo=True)
    assert done.choices[0].text == "abc" and len(done.choices[0].logprobs.tokens) == 3
    assert done.usage.completion_tokens == 0


def test_echo_without_logprobs_costs_no_scoring(client, engine, expected):
    done = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4, echo=True)
    assert done.choices[0].text == PROMPT + expected(PROMPT, 4)
    assert not engine.seen[0].params.echo


@pytest.mark.parametrize("logprobs, echo", [(None, False), (2, False), (None, True), (2, True)])
def test_streamed_completion_is_the_whole_one_in_pieces(client, logprobs, echo):
    wanted = {"model": "tiny", "prompt": [PROMPT, "two"], "max_tokens": 6, "logprobs": logprobs, "echo": echo}
    whole = client.completions.create(**wanted)
    chunks = list(client.completions.create(**wanted, stream=True, stream_options={"include_usage": True}))
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    for choice in whole.choices:
        pieces = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(p.text for p in pieces) == choice.text
        assert [p.finish_reason for p in pieces][-1] == choice.finish_reason
        assert all(p.finish_reason is None for p in pieces[:-1]) and len(pieces) >= 6
        if logprobs is not None:
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                joined = [value for p in pieces for value in getattr(p.logprobs, name)]
                assert joined == getattr(choice.logprobs, name)


def test_chat(client, engine, expected):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    done = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=4, logprobs=True, top_logprobs=2, temperature=0
    )
    prompt = "system: be brief\nuser: hi\nassistant:"
    assert done.object == "chat.completion"
    message = done.choices[0].message
    assert (message.role, message.content) == ("assistant", expected(prompt, 4))
    content = done.choices[0].logprobs.content
    assert "".join(p.token for p in content) == message.content
    assert bytes(b for p in content for b in p.bytes).decode() == message.content
    assert all(p.logprob == p.top_logprobs[0].logprob and len(p.top_logprobs) == 2 for p in content)
    assert done.usage.prompt_tokens == len(engine.tokenizer.encode(prompt))
    assert not engine.seen[0].special  # the template has put the special tokens there


def test_streamed_chat(client):
    wanted = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    whole = client.chat.completions.create(**wanted)
    chunks = list(client.chat.completions.create(**wanted, stream=True))
    assert chunks[0].object == "chat.completion.chunk" and chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks][-1] == "length"
    text = whole.choices[0].message.content
    with client.chat.completions.stream(**wanted, stop=text[3]) as stream:  # the client's own accumulation
        assert stream.get_final_completion().choices[0].message.content == text[: text.index(text[3])]


def test_concurrent_requests_each_get_their_own_answer(address, expected):
    import asyncio

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            asked = [client.completions.create(model="tiny", prompt=f"number {i}", max_tokens=9) for i in range(10)]
            return [done.choices[0].text for done in await asyncio.gather(*asked)]

    assert asyncio.run(all_of_them()) == [expected(f"number {i}", 9) for i in range(10)]


def test_errors_are_the_clients_own(client, engine):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=PROMPT, temperature=-1)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "hi"}])
    assert caught.value.param == "model" and caught.value.code == "model_not_found"
    engine.queue = -engine.rows
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="tiny", prompt=PROMPT)
    assert caught.value.response.headers["Retry-After"] == "2"


def test_the_clients_retries_get_past_an_overload(address, engine):
    engine.queue = -engine.rows

    def on_second(request):
        if request.headers.get("x-stainless-retry-count") == "1":
            engine.queue = 8

    import httpx2

    with openai.OpenAI(
        base_url=f"{address}/v1", api_key="none", http_client=httpx2.Client(event_hooks={"request": [on_second]})
    ) as client:
        assert math.isfinite(client.completions.create(model="tiny", prompt=PROMPT).usage.total_tokens)
