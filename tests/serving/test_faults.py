"""Bad requests, bad clients, and the end of a server."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import openai
import pytest
import torch
from slow import slow
from tiny import CHARACTERS, save_tiny

import secateur
from secateur.errors import RecipeError
from secateur.recipes.deploy import ServeRecipe
from secateur.recipes.reading import build_recipe
from secateur.serving.http.requests import ChatRequest, CompletionRequest, SamplingRequest
from secateur.serving.serve import KEY_VARIABLE, prepare
from serving.conftest import Running, byte_level, fault_in, refusal

Start = Callable[..., Running]
USER = [{"role": "user", "content": "x"}]
TOOL = {"type": "function", "function": {"name": "f"}}

CHAT, TEXT = "chat/completions", "completions"
CALLS = "messages[1].tool_calls[0].function"


def tools(*given: Any, **options: Any) -> dict[str, Any]:
    return {"messages": USER, "tools": [*given], **options}


def called(function: Any) -> dict[str, Any]:
    call = {"role": "assistant", "tool_calls": [{"function": function}]}
    return {"messages": [*USER, call]}


def said(**message: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", **message}]}


def formed(**form: Any) -> dict[str, Any]:
    return {"messages": USER, "response_format": form}


def structured(**structure: Any) -> dict[str, Any]:
    return {"prompt": "x", "structured_outputs": structure}


def function(**options: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "a", **options}}


BAD: dict[str, tuple[str, Any, str | None]] = {
    "no JSON": (CHAT, b'{"messages": [', None),
    "no text": (CHAT, b'{"a\xff": 1}', None),
    "a list": (CHAT, [1], None),
    "deep": (CHAT, b"[" * 100_000, None),
    "deep value": (CHAT, b'{"functions": ' + b"[" * 500 + b"]" * 500 + b"}", None),
    "empty": (CHAT, b" ", None),
    "nothing": (CHAT, b"", None),
    "nan": (CHAT, b'{"messages": [], "temperature": NaN}', None),
    "half a pair": (TEXT, b'{"prompt": ["a\\ud800"]}', None),
    "half a name": (TEXT, b'{"prompt": "a", "\\udc00": 1}', None),
    "digits": (TEXT, b'{"seed": ' + b"1" * 5000 + b"}", None),
    "endless": (TEXT, b'{"prompt": "x", "top_p": 1e999}', "top_p"),
    "no messages": (CHAT, {}, "messages"),
    "no message": (CHAT, {"messages": []}, "messages"),
    "no object": (CHAT, {"messages": [1]}, "messages[0]"),
    "no role": (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role"),
    "role": (CHAT, {"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
    "no content": (CHAT, said(), "messages[0]"),
    "odd content": (CHAT, said(content=7), "messages[0].content"),
    "picture": (CHAT, said(content=[{"type": "image_url"}]), "messages[0].content[0].type"),
    "template": (CHAT, said(content="refuse"), "messages"),
    "text as a number": (CHAT, {"messages": USER, "temperature": "1"}, "temperature"),
    "temperature": (CHAT, {"messages": USER, "temperature": -1}, "temperature"),
    "whole": (TEXT, {"prompt": "x", "n": 1.5}, "n"),
    "true": (TEXT, {"prompt": "x", "stream": "yes"}, "stream"),
    "options": (TEXT, {"prompt": "x", "stream_options": 3}, "stream_options"),
    "usage": (TEXT, {"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    "tokens": (TEXT, {"prompt": "x", "max_tokens": 0}, "max_tokens"),
    "stop": (TEXT, {"prompt": "x", "stop": [""]}, "stop[0]"),
    "stops": (TEXT, {"prompt": "x", "stop": ["a"] * 17}, "stop"),
    "odd stop": (TEXT, {"prompt": "x", "stop": 5}, "stop"),
    "seed": (TEXT, {"prompt": "x", "seed": 2**63}, "seed"),
    "choices": (TEXT, {"prompt": "x", "n": 129}, "n"),
    "many": (TEXT, {"prompt": [[5]] * 1000, "n": 2}, "prompt"),
    "best": (TEXT, {"prompt": "x", "best_of": 3}, "best_of"),
    "bias": (TEXT, {"prompt": "x", "logit_bias": {"5": 1}}, "logit_bias"),
    "list": (CHAT, {"messages": USER, "top_logprobs": 2}, "top_logprobs"),
    "tools": (TEXT, {"prompt": "x", "tools": [{}]}, "tools"),
    "no tool": (CHAT, tools({}), "tools[0].type"),
    "name of a tool": (CHAT, tools(function(name="a b\n")), "tools[0].function.name"),
    "parameters": (CHAT, tools(function(parameters=[1])), "tools[0].function.parameters"),
    "twice": (CHAT, tools(TOOL, TOOL), "tools"),
    "choice without tools": (CHAT, {"messages": USER, "tool_choice": "required"}, "tool_choice"),
    "choice": (CHAT, tools(TOOL, tool_choice="any"), "tool_choice"),
    "chosen": (CHAT, tools(TOOL, tool_choice={"function": {"name": "g"}}), "tool_choice"),
    "no template for tools": (CHAT, tools(TOOL), "tools"),
    "format": (CHAT, formed(type="xml"), "response_format.type"),
    "no schema": (CHAT, formed(type="json_schema"), "response_format"),
    "odd schema": (CHAT, formed(type="json_object", schema=[1]), "response_format.schema"),
    "two formats": (TEXT, structured(regex="a", choice=["a"]), "structured_outputs"),
    "no choices": (TEXT, structured(choice=[]), "structured_outputs.choice"),
    "structure": (TEXT, structured(grammar="start: a"), "structured_outputs.grammar"),
    "structure of older clients": (TEXT, {"prompt": "x", "guided_regex": "a"}, "guided_regex"),
    "endless structure": (TEXT, {**structured(regex="a"), "ignore_eos": True}, "ignore_eos"),
    "NaN in a schema": (TEXT, structured(json='{"const": NaN}'), "structured_outputs.json"),
    "arguments": (CHAT, called({"name": "f", "arguments": "{"}), f"{CALLS}.arguments"),
    "half a pair in arguments": (
        CHAT, called({"name": "f", "arguments": '{"a": "\\ud800"}'}), f"{CALLS}.arguments"
    ),
    "call": (CHAT, called({"name": "f"}), f"{CALLS}.arguments"),
    "caller": (
        CHAT, said(tool_calls=[{"function": {"name": "f", "arguments": {}}}]), "messages[0]"
    ),
    "no prompt": (TEXT, {"prompt": ""}, None),
    "no token": (TEXT, {"prompt": []}, None),
    "no tokens": (TEXT, {"prompt": [[5], []]}, None),
    "no second": (TEXT, {"prompt": ["x", ""]}, None),
    "odd prompt": (TEXT, {"prompt": [5, "a"]}, "prompt"),
    "floats": (TEXT, {"prompt": [5.0]}, "prompt"),
    "bools": (TEXT, {"prompt": [True]}, "prompt"),
    "deeper": (TEXT, {"prompt": [[[5]]]}, "prompt"),
    "odd token": (TEXT, {"prompt": [5, 96]}, "prompt"),
    "below": (TEXT, {"prompt": [[5], [-1]]}, "prompt"),
    "huge": (TEXT, {"prompt": [10**300]}, "prompt"),
    "long prompt": (TEXT, {"prompt": "x" * 256}, None),
    "long echo": (TEXT, {"prompt": ["x", "x" * 257], "echo": True, "max_tokens": 0}, None),
    "long answer": (TEXT, {"prompt": "x" * 200, "max_tokens": 57}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", [*BAD])
def test_a_bad_request_is_refused_by_the_name_of_what_is_wrong(server: Running, case: str) -> None:
    path, body, param = BAD[case]
    assert refusal(server, path, body)["param"] == param
    assert server.post("completions", {"prompt": "x", "max_tokens": 1}).status_code == 200


VALUES = (
    "", "x", [], {}, -1, 0, 10**30, 1.5, True, [1, "a"], [[1], "a"], {"a": 1}, [None], [{}],
    [{"role": 1, "content": [1]}], "\U0001f600" * 200,
)  # fmt: skip


def alike(request: type[SamplingRequest]) -> Iterator[list[str]]:
    """The parameters of a request, together where they have one validator."""
    groups: dict[str, list[str]] = {}
    for name, field in request.model_fields.items():
        checks = [*request.__pydantic_decorators__.field_validators.values()]
        own = [name for check in checks if name in check.info.fields]
        groups.setdefault(f"{field.annotation} {field.metadata} {own}", []).append(name)
    yield from groups.values()
    yield from ([name] for name in ("tools", "echo", "suffix", "logit_bias", "user"))


@pytest.mark.parametrize(("path", "kind"), [(CHAT, ChatRequest), (TEXT, CompletionRequest)])
def test_any_value_is_answered_or_refused(
    server: Running, path: str, kind: type[SamplingRequest]
) -> None:
    right = {"prompt": "x"} if path == TEXT else {"messages": USER}
    for names, value in itertools.product(alike(kind), VALUES):
        body = {**right, "max_tokens": 1, "temperature": 0, **dict.fromkeys(names, value)}
        answer = server.post(path, body)
        if answer.status_code == 400:
            fault_in(answer)
        else:
            assert answer.status_code in (200, 404), (names, value, answer.text)


def test_wrong_places(server: Running) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
    ):
        answer = server.client.request(method, path)
        assert answer.status_code == status
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert path in error["message"]
        if status == 405:
            assert answer.headers["allow"] == ("POST" if method == "GET" else "GET")
    answer = server.post("completions", {"prompt": "x", "model": "gpt-4"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        plain = server.client.post(
            "/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": kind}
        )
        assert plain.status_code == 415  # a page of another site could send it


def test_long_bodies(serve: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.serving.http.requests.BODY_BYTES", 10 * 2**10)
    server = serve()
    assert server.post("completions", {"prompt": "x" * 20_000}).status_code == 413

    def parts() -> Iterator[bytes]:
        for _ in range(50):
            yield b" " * 1000

    answer = server.client.post(
        "/v1/completions", content=parts(), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"
    assert server.post("completions", {"prompt": "x", "max_tokens": 1}).status_code == 200


def raw(server: Running, head: str, body: bytes = b"") -> socket.socket:
    """A connection with a request as it is written here."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(head.replace("\n", "\r\n").encode() + body)
    return connection


def request(body: dict[str, Any], length: int | None = None) -> tuple[str, bytes]:
    content = json.dumps(body).encode()
    return (
        f"POST /v1/completions HTTP/1.1\nHost: x\nContent-Type: application/json\n"
        f"Content-Length: {len(content) if length is None else length}\n\n"
    ), content


HEAD = "POST /v1/completions HTTP/1.1\nHost: x\n"

HEADS = {
    "a header without end": HEAD + "A: " + "b" * 200_000,
    "many headers": HEAD + "A: b\n" * 50_000 + "\n",
    "large headers": HEAD + f"A: {'b' * 9000}\n" * 30 + "\n",
    "a long address": "GET /" + "a" * 200_000,
    "no HTTP": "HELLO\n\n",
}


@pytest.mark.parametrize("case", [*HEADS])
def test_heads_are_bounded(server: Running, case: str) -> None:
    text = HEADS[case]
    with raw(server, "") as connection:
        for begin in range(0, len(text), 30_000):
            with contextlib.suppress(ConnectionError):  # it may be closed before everything is sent
                connection.sendall(text[begin : begin + 30_000].replace("\n", "\r\n").encode())
            time.sleep(0.01)
        received = connection.recv(5000)
        assert received.startswith(b"HTTP/1.1 400 ")
        assert connection.recv(10) == b""
    assert server.client.get("/health").status_code == 200


def test_a_prompt_that_cannot_fit_is_not_read(serve: Start, tmp_path: Path) -> None:
    server = serve(byte_level(tmp_path / "bytes"))
    service = server.serving.service
    assert service.bound == (50, b"")  # its longest token has 25 letters
    service.reader.submit = service.long_reader.submit = None  # reading would fail
    for prompt in ("x" * 3_900_000, ["a", "x" * 3_900_000]):
        error = refusal(server, "completions", {"prompt": prompt})
        assert error["code"] == "context_length_exceeded"


def test_a_long_text_does_not_hold_short_ones_up(serve: Start) -> None:
    server = serve()  # one token for all that it does not know: there is no bound by bytes
    service, begun, go_on = server.serving.service, threading.Event(), threading.Event()
    assert service.bound is None
    assert service.long_reader is not service.reader
    service.long_reader.submit(lambda: (begun.set(), go_on.wait(20)))
    begun.wait()
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(server.post, "completions", {"prompt": "\u1234" * 100_000})
        short = server.post("completions", {"prompt": "x" * 100, "max_tokens": 2})
        assert short.status_code == 200
        assert not long.done()
        go_on.set()
        assert "100000 tokens" in long.result().json()["error"]["message"]


def test_memory_of_long_texts_is_given_back(serve: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    given_back = []
    monkeypatch.setattr("secateur.serving.service.trim", lambda: given_back.append(1))
    server = serve()
    for size, count in ((100, 0), (100_000, 1)):
        server.post("completions", {"prompt": "x" * size, "max_tokens": 1})
        server.until(lambda count=count: len(given_back) == count)


def test_a_client_that_reads_nothing_holds_nobody_up(serve: Start) -> None:
    server = serve(slots=1)
    body = {"prompt": "x", "max_tokens": 200, "temperature": 1, "stream": True, "logprobs": 5}
    with raw(server, *request(body)) as connection:
        server.until(lambda: server.scheduler.ended)
        assert server.post("completions", {"prompt": "x", "max_tokens": 3}).status_code == 200
        connection.settimeout(20)
        received = b""
        while b"[DONE]" not in received:
            received += connection.recv(1 << 16)


@pytest.mark.parametrize("stream", [True, False])
def test_an_aborted_request_frees_its_slot(serve: Start, stream: bool) -> None:
    server = serve(slots=1)
    server.slow_down(0.02)
    body = {"prompt": "x", "max_tokens": 200, "temperature": 1, "seed": 4, "stream": stream}
    running, waiting = raw(server, *request(body)), None
    server.until(lambda: server.scheduler.running)
    waiting = raw(server, *request(body))
    server.until(lambda: server.scheduler.queue)
    waiting.close()  # while it waits
    server.until(lambda: not server.scheduler.queue)
    running.close()
    server.until(lambda: server.scheduler.idle)
    assert server.scheduler.ended == {"cancelled": 2}
    assert server.scheduler.counts["new_tokens"] < 200
    assert server.post("completions", {"prompt": "x", "max_tokens": 3}).status_code == 200


def test_a_client_that_leaves_many_prompts(serve: Start) -> None:
    server = serve(slots=2)
    server.scheduler.most_piece = 16
    server.slow_down(0.02, "read")
    body = {"prompt": ["x" * 200] * 20, "max_tokens": 0, "echo": True, "logprobs": 1}
    client = raw(server, *request(body))
    server.until(lambda: server.scheduler.running)
    client.close()
    server.until(lambda: server.scheduler.idle)
    assert server.scheduler.ended["cancelled"] >= 18
    assert server.post("completions", {"prompt": "x", "max_tokens": 3}).status_code == 200


def test_a_full_queue(serve: Start) -> None:
    server = serve(slots=1, queue=1)
    server.slow_down(0.02)
    body = {"prompt": "x", "max_tokens": 40, "temperature": 0}
    connections = [raw(server, *request(body))]
    server.until(lambda: server.scheduler.running)
    connections.append(raw(server, *request(body)))
    server.until(lambda: server.scheduler.queue)
    refused = server.post("completions", body)
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "queue_full"
    for connection in connections:  # both that were accepted are answered
        connection.settimeout(30)
        assert b"200 OK" in connection.recv(1000).split(b"\r\n")[0]
        connection.close()


def test_time_runs_out(serve: Start) -> None:
    server = serve(request_seconds=0.3)
    server.slow_down(0.05)
    body = {"prompt": "x", "max_tokens": 200, "temperature": 1, "seed": 4}
    late = server.post("completions", body)
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "timeout"
    streamed = server.post("completions", {**body, "stream": True})
    assert streamed.status_code == 200
    last = streamed.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"


def test_the_api_key(serve: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "from the environment")
    for server, key in ((serve(), "from the environment"), (serve(api_key="s3"), "s3")):
        for given in (None, "Bearer wrong", f"Basic {key}", f"Bearer {key} "):
            headers = {} if given is None else {"Authorization": given.strip() + "x"}
            answer = server.client.get("/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key) as client:
            assert [*client.models.list()]
        assert server.client.get("/health").status_code == 200
        assert server.client.get("/metrics").status_code == 200


def test_an_error_of_the_model(serve: Start, capfd: pytest.CaptureFixture[str]) -> None:
    server = serve()
    with pytest.MonkeyPatch.context() as patch:
        broken = Mock(side_effect=MemoryError("no more"))
        patch.setattr(server.scheduler.engine, "step", broken)
        answer = server.post("completions", {"prompt": "x", "max_tokens": 3})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "no more" not in answer.text
    assert server.post("completions", {"prompt": "x", "max_tokens": 3}).status_code == 200
    assert "MemoryError: no more" in capfd.readouterr().err


def test_a_model_that_goes_through_transformers(serve: Start, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "other", "gpt2", n_positions=64)
    server = serve(folder)
    line, template = server.serving.lines
    assert "gpt2" in line
    assert "/v1/completions" in template
    body = {"prompt": "abc", "max_tokens": 12, "temperature": 0}
    found = server.post("completions", body).json()["choices"][0]["text"]
    assert found == secateur.generate(folder, "abc", max_new_tokens=12).text
    body = {"prompt": ["abcd", "a"], "max_tokens": 1, "logprobs": 0, "echo": True, "temperature": 0}
    first, single = server.post("completions", body).json()["choices"]
    ids = torch.tensor([server.serving.service.tokenizer("abcd")["input_ids"]])
    with torch.inference_mode():
        logs = secateur.load(folder)(ids).logits[0].log_softmax(-1)
    listed = first["logprobs"]["token_logprobs"]
    expected = logs[:-1].gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(listed[1:4]), expected, rtol=0, atol=1e-5)
    assert listed[4] == pytest.approx(float(logs[3].max()), abs=1e-5)
    assert single["logprobs"]["token_logprobs"][0] is None
    assert refusal(server, "chat/completions", {"messages": USER})["code"] == "no_template"


def test_a_token_that_the_model_has_not(serve: Start, tmp_path: Path) -> None:
    """The tokenizer has 96 tokens, and a request must not end those of others."""
    server = serve(save_tiny(tmp_path / "small", vocab_size=90))
    for prompt in ([5, 93], "a" + CHARACTERS[-1]):
        error = refusal(server, "completions", {"prompt": prompt, "echo": True})
        assert error["param"] == "prompt"
        assert "89" in error["message"]
    assert server.serving.service.worker.failures == 0


def test_what_cannot_start(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RecipeError, match=f"port {port}") as caught:
            prepare(ServeRecipe(model=str(model), port=port))
    assert caught.value.where == "--port"
    with pytest.raises(RecipeError, match="256") as caught:
        prepare(ServeRecipe(model=str(model), port=0, context_length=300))
    assert caught.value.where == "--context-length"
    monkeypatch.setenv(KEY_VARIABLE, " ")
    with pytest.raises(RecipeError, match=KEY_VARIABLE):
        prepare(ServeRecipe(model=str(model), port=0))
    monkeypatch.delenv(KEY_VARIABLE)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in [n for n in sys.modules if n.startswith("secateur.serving.http")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(RecipeError, match=r"pip install '.\[serve\]'"):
        prepare(ServeRecipe(model=str(model), port=0))


@pytest.mark.parametrize("name", ["api_key", "name", "host"])
@pytest.mark.parametrize("value", ["", " ", "k "])
def test_an_empty_key_is_refused(name: str, value: str) -> None:
    with pytest.raises(RecipeError, match="variable"):
        build_recipe(ServeRecipe, {"model": "m", name: value})


def test_strangers_are_warned_about(model: Path) -> None:
    for options, warned in (
        ({"host": "0.0.0.0"}, True),
        ({"host": "0.0.0.0", "api_key": "k"}, False),
        ({}, False),
    ):
        serving = prepare(ServeRecipe(model=str(model), port=0, **options))
        assert serving.listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        serving.listening.close()
        assert any("WARNING" in line for line in serving.lines) == warned


SLOWLY = """
import sys, time
from secateur.runtime.decode import SlotDecoder

step = SlotDecoder.step
SlotDecoder.step = lambda self, tokens: (time.sleep(0.03), step(self, tokens))[1]
from secateur.cli import main

sys.argv = ["secateur", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGINT)])
def test_a_signal_lets_finish_what_runs(model: Path, number: signal.Signals) -> None:
    words = ["serve", str(model), "--port", "0", "--slots", "1", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["address"]
        body = {"prompt": "x", "max_tokens": 60, "temperature": 1, "seed": 4, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(number)
            time.sleep(0.3)
            with pytest.raises(httpx.TransportError):
                httpx.get(f"{url}/health", timeout=5)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert sum('"text"' in line for line in rest) > 40
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "Traceback" not in err
