"""What a client of OpenAI's library sees."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import secateur
from serving.conftest import Running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30
    ) as made:
        yield made


MESSAGES: Any = [{"role": "system", "content": "be"}, {"role": "user", "content": "def f(x"}]


def chat(client: openai.OpenAI, **options: Any) -> Any:
    options = {"max_tokens": 24, "temperature": 0, "messages": MESSAGES} | options
    return client.chat.completions.create(model="learned", **options)


def complete(client: openai.OpenAI, **options: Any) -> Any:
    options = {"max_tokens": 24, "temperature": 0, "prompt": "import o"} | options
    return client.completions.create(model="learned", **options)


def test_an_answer_is_that_of_generate(client: openai.OpenAI, model: Path) -> None:
    answer = chat(client)
    expected = secateur.generate(model, "def f(x", system="be", max_new_tokens=24)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 24
    assert answer.usage.prompt_tokens == len("s:be;u:def f(x;a:")
    assert answer.usage.total_tokens == 24 + answer.usage.prompt_tokens
    answer = complete(client)
    expected = secateur.generate(model, "import o", chat=False, max_new_tokens=24)
    assert answer.choices[0].text == expected.text


@pytest.mark.parametrize("kind", [chat, complete])
def test_a_stream_is_the_same_in_pieces(client: openai.OpenAI, kind: Any) -> None:
    whole = kind(client, stop=["zzz"]).choices[0]
    chunks = [*kind(client, stream=True, stop=["zzz"], stream_options={"include_usage": True})]
    *pieces, usage = chunks
    assert usage.choices == []
    assert usage.usage.completion_tokens == 24
    assert all(chunk.usage is None for chunk in pieces)
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].choices[0].finish_reason == "length"
    if kind is chat:
        assert pieces[0].choices[0].delta.role == "assistant"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
        assert text == whole.message.content
    else:
        assert "".join(chunk.choices[0].text for chunk in pieces) == whole.text
    without = [*kind(client, stream=True)]
    assert all(chunk.usage is None for chunk in without)


def test_a_stop_text_ends_an_answer(client: openai.OpenAI) -> None:
    whole = complete(client).choices[0].text
    stop = whole[5:8]
    answer = complete(client, stop=stop).choices[0]
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"
    streamed = complete(client, stop=[stop, "never"], stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.text


def test_draws_and_penalties(client: openai.OpenAI) -> None:
    greedy = complete(client).choices[0].text

    def text(**options: Any) -> str:
        return complete(client, temperature=1.5, **options).choices[0].text

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(seed=-5) == text(seed=-5)
    assert complete(client, temperature=None, top_p=1e-9).choices[0].text == greedy
    assert text(extra_body={"top_k": 1}) == greedy
    assert text(extra_body={"min_p": 1.0}) == greedy
    assert text(seed=1, extra_body={"top_k": -1, "min_p": 0.0}) == text(seed=1)
    unlike = complete(client, frequency_penalty=2.0, presence_penalty=1.0).choices[0].text
    assert len({*unlike}) > len({*greedy})
    unlike = complete(client, extra_body={"repetition_penalty": 2.0}).choices[0].text
    assert unlike != greedy


def test_without_a_seed_draws_differ(client: openai.OpenAI) -> None:
    texts = {complete(client, temperature=2.0).choices[0].text for _ in range(3)}
    assert len(texts) > 1


def test_tokens_with_their_probabilities(client: openai.OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=3)
    listed = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in listed) == answer.choices[0].message.content
    for entry in listed:
        best = entry.top_logprobs[0]
        assert (entry.token, entry.logprob) == (best.token, best.logprob)  # greedy
        assert bytes(entry.bytes).decode() == entry.token
        assert sum(math.exp(other.logprob) for other in entry.top_logprobs) <= 1 + 1e-5
    streamed = [*chat(client, logprobs=True, top_logprobs=3, stream=True)]
    parts = [c.choices[0].logprobs.content for c in streamed if c.choices[0].logprobs]
    assert [e for part in parts for e in part] == listed
    old = complete(client, logprobs=2).choices[0]
    assert "".join(old.logprobs.tokens) == old.text
    assert old.logprobs.text_offset[:3] == [0, 1, 2]
    assert [len(others) for others in old.logprobs.top_logprobs] == [2] * 24
    assert chat(client).choices[0].logprobs is None


def test_prompts_of_tokens(client: openai.OpenAI) -> None:
    ids = secateur_ids(client, "import o")
    assert complete(client, prompt=ids).choices[0].text == complete(client).choices[0].text
    assert complete(client, prompt=["import o"]).choices[0].text == complete(client).choices[0].text
    assert complete(client, max_tokens=None).usage.completion_tokens == 16


def secateur_ids(client: openai.OpenAI, text: str) -> list[int]:
    """Ids by the alphabet of the tiny tokenizer."""
    from tiny import CHARACTERS, SPECIAL

    return [[*SPECIAL, *CHARACTERS].index(character) for character in text]


def test_messages_in_parts_and_the_newer_names(client: openai.OpenAI) -> None:
    parts: Any = [
        {"role": "developer", "content": "be"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "def "}, {"type": "text", "text": "f(x"}],
        },
    ]
    answer = chat(client, messages=parts, max_tokens=None, max_completion_tokens=24)
    assert answer.choices[0].message.content == chat(client).choices[0].message.content
    assert chat(client, user="me", n=1, logit_bias={}, response_format={"type": "text"}).choices


def test_the_answer_may_fill_what_is_left(client: openai.OpenAI) -> None:
    answer = chat(client, max_tokens=None, temperature=1.0, seed=0)
    assert answer.usage.total_tokens <= 256
    reason = "length" if answer.usage.total_tokens == 256 else "stop"
    assert answer.choices[0].finish_reason == reason


def test_sixteen_clients_get_what_each_would_get_alone(server: Running, model: Path) -> None:
    prompts = [f"def {'ab'[i % 2] * (1 + 7 * i)}(" for i in range(16)]
    bodies = [{"prompt": p, "max_tokens": 20 + i, "temperature": 0} for i, p in enumerate(prompts)]

    def ask(body: dict[str, Any]) -> str:
        answer = server.post("completions", body).json()
        assert answer["usage"]["completion_tokens"] == body["max_tokens"]
        return str(answer["choices"][0]["text"])

    before = server.scheduler.counts.calls
    with ThreadPoolExecutor(16) as pool:
        found = [*pool.map(ask, bodies)]
    assert server.scheduler.counts.calls - before < sum(b["max_tokens"] for b in bodies) * 0.9
    assert found == [ask(body) for body in bodies]
    assert found[3] == secateur.generate(model, prompts[3], chat=False, max_new_tokens=23).text


def test_models_health_and_metrics(server: Running, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["learned"]
    assert client.models.retrieve("learned").owned_by == "secateur"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    chat(client)
    told = httpx.get(f"{server.url}/metrics")
    assert told.headers["content-type"].startswith("text/plain; version=0.0.4")
    numbers = {}
    for line in told.text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            numbers[name] = float(value)
    assert numbers['secateur_http_responses_total{path="/v1/chat/completions",status="200"}'] >= 1
    assert numbers["secateur_new_tokens_total"] >= 24
    assert numbers["secateur_requests_running"] == numbers["secateur_requests_waiting"] == 0
    assert 0 < numbers["secateur_first_token_seconds_sum"] < 60
    assert numbers["secateur_first_token_seconds_count"] >= 1
    assert httpx.get(f"{server.url}/openapi.json").json()["info"]["title"] == "Secateur"
