"""What a client of OpenAI's library sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from tiny import CHARACTERS, SPECIAL

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
    assert len({text() for _ in range(3)}) > 1
    assert complete(client, temperature=None, top_p=1e-9).choices[0].text == greedy
    assert text(extra_body={"top_k": 1}) == greedy
    assert text(extra_body={"min_p": 1.0}) == greedy
    assert text(seed=1, extra_body={"top_k": -1, "min_p": 0.0}) == text(seed=1)
    unlike = complete(client, frequency_penalty=2.0, presence_penalty=1.0).choices[0].text
    assert len({*unlike}) > len({*greedy})
    unlike = complete(client, extra_body={"repetition_penalty": 2.0}).choices[0].text
    assert unlike != greedy


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


def test_prompts_of_every_form(client: openai.OpenAI) -> None:
    ids = secateur_ids(client, "import o")
    whole = complete(client).choices[0].text
    for prompt in (ids, [ids], ["import o"]):
        assert complete(client, prompt=prompt).choices[0].text == whole
    assert complete(client, max_tokens=None).usage.completion_tokens == 16
    texts = ["import o", "def f(x", "a = b + "]
    alone = [complete(client, prompt=text).choices[0].text for text in texts]
    for prompt in (texts, [secateur_ids(client, text) for text in texts]):
        answer = complete(client, prompt=prompt)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert [choice.text for choice in answer.choices] == alone
        assert answer.usage.prompt_tokens == sum(map(len, texts))
        assert answer.usage.completion_tokens == 3 * 24
        parts: dict[int, str] = {0: "", 1: "", 2: ""}
        for chunk in complete(client, prompt=prompt, stream=True):
            for choice in chunk.choices:
                parts[choice.index] += choice.text
        assert [*parts.values()] == alone


@pytest.mark.parametrize("kind", [chat, complete])
def test_several_choices(client: openai.OpenAI, kind: Any) -> None:
    def texts(answer: Any) -> list[str]:
        if kind is chat:
            return [choice.message.content for choice in answer.choices]
        return [choice.text for choice in answer.choices]

    answer = kind(client, n=3, temperature=1.5, seed=5)
    alone = [kind(client, temperature=1.5, seed=5 + number) for number in range(3)]
    assert texts(answer) == [text for one in alone for text in texts(one)]
    assert len({*texts(answer)}) == 3
    assert answer.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert answer.usage.completion_tokens == 3 * 24
    assert len({*texts(kind(client, n=3, temperature=1.5))}) == 3


def test_a_prompt_with_its_log_probabilities(client: openai.OpenAI, model: Path) -> None:
    text = "import o, sys; x = y"  # more tokens than one call of the decoder takes
    ids = torch.tensor([secateur_ids(client, text)])
    with torch.inference_mode():
        logs = secateur.load(model)(ids).logits[0].float().log_softmax(-1)
    for prompt in (text, ids[0].tolist(), [ids[0].tolist()]):
        answer = complete(client, prompt=prompt, max_tokens=1, logprobs=2, echo=True).choices[0]
        listed = answer.logprobs
        assert "".join(listed.tokens) == answer.text
        assert answer.text[:-1] == text
        assert listed.text_offset == [*range(len(text) + 1)]
        assert listed.token_logprobs[0] is None
        assert listed.top_logprobs[0] is None
        expected = logs[:-1].gather(1, ids[0, 1:, None])[:, 0]
        found = torch.tensor(listed.token_logprobs[1:-1])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        for row, top in zip(logs, listed.top_logprobs[1:], strict=True):
            found = torch.tensor([*top.values()])
            torch.testing.assert_close(found, row.topk(2).values, rtol=0, atol=1e-4)
        assert listed.token_logprobs[-1] == max(listed.top_logprobs[-1].values())
    only = complete(client, prompt=text, max_tokens=0, logprobs=2, echo=True)
    assert only.choices[0].text == text
    assert only.usage.completion_tokens == 0
    assert only.choices[0].logprobs.token_logprobs == listed.token_logprobs[:-1]
    plain = complete(client, prompt=text, echo=True).choices[0]
    assert plain.text == text + complete(client, prompt=text).choices[0].text
    assert plain.logprobs is None


def test_an_echo_in_a_stream(client: openai.OpenAI) -> None:
    options = {"prompt": ["import o, sys; x = y", "de"], "echo": True, "logprobs": 1, "n": 2}
    whole = complete(client, **options).choices
    assert len(whole) == 4
    chunks = [*complete(client, **options, stream=True)]
    for choice in whole:
        parts = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        for name in ("tokens", "token_logprobs", "text_offset"):
            listed = [x for part in parts for x in getattr(part.logprobs, name)]
            assert listed == getattr(choice.logprobs, name)
        assert [part.finish_reason for part in parts if part.finish_reason] == ["length"]


def test_the_token_that_ends_a_text_is_listed(
    client: openai.OpenAI, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else clients that count from the end, such as lm-eval, would miss a token of the prompt."""
    ids = secateur_ids(client, complete(client).choices[0].text)
    monkeypatch.setattr(server.serving.service, "ends", frozenset(ids[:1]))
    ended = complete(client, echo=True, logprobs=1).choices[0]
    assert (ended.text, ended.finish_reason) == ("import o", "stop")
    assert len(ended.logprobs.tokens) == len("import o") + 1
    assert complete(client).usage.completion_tokens == 0
    on = complete(client, extra_body={"ignore_eos": True}, max_tokens=3)
    assert secateur_ids(client, on.choices[0].text) == ids[:3]


def test_what_is_ignored_is_named(client: openai.OpenAI) -> None:
    harmless = {
        "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto",
        "reasoning_effort": "low", "prompt_cache_key": "k",
        "verbosity": "low", "request_id": "7", "priority": 1, "cache_prompt": True,
        "min_tokens": 0, "tools": [], "n": 1,
    }  # fmt: skip
    named = [*harmless][:-3]
    for kind in (chat, complete):
        answer = kind(client, extra_body=harmless)
        assert [warning.split()[0] for warning in answer.warnings] == named
        streamed = [*kind(client, extra_body=harmless, stream=True)]
        assert streamed[0].warnings == answer.warnings
        assert not any(hasattr(chunk, "warnings") for chunk in streamed[1:])
        assert not hasattr(kind(client), "warnings")


def test_variables_of_the_chat_template(client: openai.OpenAI, server: Running) -> None:
    plain, moody = chat(client), chat(client, extra_body={"chat_template_kwargs": {"mood": "!!"}})
    assert moody.usage.prompt_tokens == plain.usage.prompt_tokens + 2
    body = {"messages": MESSAGES, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}
    refused = server.post("chat/completions", body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "chat_template_kwargs"


def secateur_ids(client: openai.OpenAI, text: str) -> list[int]:
    """Ids by the alphabet of the tiny tokenizer."""
    return [[*SPECIAL, *CHARACTERS].index(character) for character in text]


def test_messages_in_parts_and_the_newer_names(client: openai.OpenAI) -> None:
    texts = [{"type": "text", "text": text} for text in ("def ", "f(x")]
    parts: Any = [{"role": "developer", "content": "be"}, {"role": "user", "content": texts}]
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

    before = server.scheduler.counts["decode_calls"]
    with ThreadPoolExecutor(16) as pool:
        found = [*pool.map(ask, bodies)]
    calls = server.scheduler.counts["decode_calls"] - before
    assert calls < sum(b["max_tokens"] for b in bodies) * 0.9
    assert found == [ask(body) for body in bodies]
    assert found[3] == secateur.generate(model, prompts[3], chat=False, max_new_tokens=23).text


def test_models_health_and_metrics(server: Running, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["learned"]
    assert client.models.retrieve("learned").owned_by == "secateur"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")
    assert server.client.get("/health").json() == {"status": "ok"}
    chat(client)
    answer = server.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    numbers = {}
    for line in answer.text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            numbers[name] = float(value)
    assert numbers['secateur_http_responses_total{path="/v1/chat/completions",status="200"}'] >= 1
    assert numbers["secateur_new_tokens_total"] >= 24
    assert numbers["secateur_requests_running"] == numbers["secateur_requests_waiting"] == 0
    assert 0 < numbers["secateur_first_token_seconds_sum"] < 60
    assert numbers["secateur_first_token_seconds_count"] >= 1
    assert server.client.get("/openapi.json").json()["info"]["title"] == "Secateur"


def test_a_draft_changes_no_answer(
    serve: Callable[..., Running], model: Path, tmp_path: Path
) -> None:
    """Alone and beside others, with a stop text, log probabilities and a prefix that is known."""
    draft = tmp_path / "draft"
    secateur.compress(model, values="int4", group_size=32, embeddings="int4", output=draft)
    drafted, alone = serve(draft=str(draft)), serve()
    questions = [{"prompt": text, "max_tokens": 40, "temperature": 0, "logprobs": 2}
                 for text in ("import o", "def f(x", "class A", "x = [", "import o")]  # fmt: skip
    questions.append({**questions[0], "stop": ["n"]})
    expected = [alone.post("completions", body).json()["choices"] for body in questions]
    for workers in (1, 6):
        with ThreadPoolExecutor(workers) as pool:
            answers = pool.map(lambda body: drafted.post("completions", body).json(), questions)
            assert [answer["choices"] for answer in answers] == expected
    counts = drafted.scheduler.counts
    assert 0 < counts["draft_tokens_accepted"] <= counts["draft_tokens"]
    metrics = drafted.client.get("/metrics").text
    accepted = counts["draft_tokens_accepted"]
    assert f"secateur_draft_tokens_accepted_total {accepted}.0\n" in metrics
