"""Bad requests, bad clients, and the end of a server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from secateur.errors import RecipeError
from secateur.recipes.serve import ServeRecipe
from secateur.workflows.serve import KEY_VARIABLE, prepare
from serving.conftest import Running
from slow import slow
from tiny import save_tiny

Start = Callable[..., Running]
USER = [{"role": "user", "content": "x"}]

BAD: dict[str, tuple[str, Any, str, str | None]] = {
    "no JSON": ("chat/completions", b'{"messages": [', "the body is not JSON", None),
    "no text": ("chat/completions", b"\xff\xfe", "", None),
    "a list": ("chat/completions", [1], "the body has to be a JSON object", None),
    "deep": ("chat/completions", b"[" * 100_000, "", None),
    "empty": ("chat/completions", b"", "the body has to be a JSON object", None),
    "no messages": ("chat/completions", {}, "messages", "messages"),
    "no message": ("chat/completions", {"messages": []}, "messages", "messages"),
    "text as a number": (
        "chat/completions", {"messages": USER, "temperature": "1"}, "temperature", "temperature",
    ),
    "nan": ("chat/completions", b'{"messages": [], "temperature": NaN}', "", None),
    "temperature": (
        "chat/completions", {"messages": USER, "temperature": -1}, "temperature", "temperature",
    ),
    "tokens": ("completions", {"prompt": "x", "max_tokens": 0}, "max_tokens", "max_tokens"),
    "stop": ("completions", {"prompt": "x", "stop": [""]}, "stop", None),
    "stops": ("completions", {"prompt": "x", "stop": ["a"] * 17}, "17 stop texts", "stop"),
    "seed": ("completions", {"prompt": "x", "seed": 2**63}, "seed", "seed"),
    "unknown": (
        "completions", {"prompt": "x", "temprature": 1}, "did you mean 'temperature'?",
        "temprature",
    ),
    "choices": ("completions", {"prompt": "x", "n": 2}, "does not support n=2", "n"),
    "tools": ("chat/completions", {"messages": USER, "tools": [{}]}, "tools", "tools"),
    "format": (
        "chat/completions", {"messages": USER, "response_format": {"type": "json_object"}},
        "response_format", "response_format",
    ),
    "usage": (
        "completions", {"prompt": "x", "stream_options": {"include_usage": True}},
        "stream_options needs stream", "stream_options",
    ),
    "list": ("chat/completions", {"messages": USER, "top_logprobs": 2}, "logprobs: true",
             "top_logprobs"),
    "prompts": ("completions", {"prompt": ["a", "b"]}, "2 prompts in one request", "prompt"),
    "no prompt": ("completions", {"prompt": ""}, "the prompt has no token", None),
    "no token": ("completions", {"prompt": []}, "the prompt has no token", None),
    "odd token": ("completions", {"prompt": [5, 96]}, "token 96 is not in the voc", "prompt"),
    "half a pair": ("completions", b'{"prompt": "a\\ud800"}', "half of a surrogate", "prompt"),
    "long prompt": ("completions", {"prompt": "x" * 256}, "the prompt has 256", None),
    "long answer": (
        "completions", {"prompt": "x" * 200, "max_tokens": 57}, "57 more are wanted", None,
    ),
    "role": (
        "chat/completions", {"messages": [{"role": "tool", "content": "x"}]},
        "the role 'tool' is not supported", "messages[0].role",
    ),
    "picture": (
        "chat/completions",
        {"messages": [*USER, {"role": "user", "content": [{"type": "image_url"}]}]},
        "'image_url' is not supported", "messages[1].content",
    ),
    "template": (
        "chat/completions", {"messages": [{"role": "user", "content": "refuse"}]},
        "the chat template refuses the messages: no", "messages",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", [*BAD])
def test_a_bad_request_says_what_is_wrong(server: Running, case: str) -> None:
    path, body, told, param = BAD[case]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(
        f"{server.url}/v1/{path}",
        content=content,
        headers={"content-type": "application/json"},
        timeout=30,
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert told in error["message"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
    assert server.post("completions", {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_wrong_places(server: Running) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
    ):
        answer = httpx.request(method, server.url + path)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"
    answer = server.post("completions", {"prompt": "x", "model": "gpt-4"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    plain = httpx.post(
        f"{server.url}/v1/completions", content=b'{"prompt": "x"}',
        headers={"content-type": "text/plain"},
    )  # fmt: skip
    assert plain.status_code == 400  # a page of another site could send it


def test_long_bodies(serve: Start) -> None:
    server = serve(body_mib=0.01)
    assert server.post("completions", {"prompt": "x" * 20_000}).status_code == 413

    def parts() -> Iterator[bytes]:
        for _ in range(50):
            yield b" " * 1000

    answer = httpx.post(
        f"{server.url}/v1/completions", content=parts(), timeout=30,
        headers={"content-type": "application/json"},
    )  # fmt: skip
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


def test_a_slow_body(serve: Start) -> None:
    server = serve()
    object.__setattr__(server.serving.server.config.app, "body_seconds", 0.3)
    with raw(server, *request({"prompt": "x"}, length=500)) as connection:
        assert b"408" in connection.recv(1000).split(b"\r\n")[0]
    assert server.post("completions", {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_client_that_reads_nothing_holds_nobody_up(serve: Start) -> None:
    server = serve(slots=1)
    body = {"prompt": "x", "max_tokens": 200, "temperature": 1, "stream": True, "logprobs": 5}
    with raw(server, *request(body)) as connection:
        server.until(lambda: server.scheduler.counts.ended)
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
    assert server.scheduler.counts.ended == {"cancelled": 2}
    assert server.scheduler.counts.new_tokens < 200
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
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
        pytest.raises(openai.RateLimitError),
    ):
        client.completions.create(model="learned", prompt="x")
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
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
        pytest.raises(openai.APIError, match="took too long"),
    ):
        for _ in client.completions.create(
            model="learned", prompt="x", max_tokens=200, stream=True, seed=4
        ):
            pass


def test_the_api_key(serve: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "from the environment")
    for server, key in ((serve(), "from the environment"), (serve(api_key="s3"), "s3")):
        for given in (None, "Bearer wrong", f"Basic {key}", f"Bearer {key} "):
            headers = {} if given is None else {"Authorization": given.strip() + "x"}
            answer = httpx.get(f"{server.url}/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key) as client:
            assert [*client.models.list()]
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/metrics").status_code == 200


def test_an_error_of_the_model(serve: Start, capfd: pytest.CaptureFixture[str]) -> None:
    server = serve()
    step = server.scheduler.engine.step

    def broken(tokens: Any) -> Any:
        raise MemoryError("no more")

    server.scheduler.engine.step = broken
    answer = server.post("completions", {"prompt": "x", "max_tokens": 3})
    assert answer.status_code == 500
    assert "the model failed" in answer.json()["error"]["message"]
    assert "no more" not in answer.text
    server.scheduler.engine.step = step
    assert server.post("completions", {"prompt": "x", "max_tokens": 3}).status_code == 200
    assert "MemoryError: no more" in capfd.readouterr().err


def test_a_model_that_goes_through_transformers(serve: Start, tmp_path: Path) -> None:
    import secateur

    folder = save_tiny(tmp_path / "other", "gpt2", n_positions=64)
    server = serve(folder)
    line, template = server.serving.lines
    assert line.startswith("one request at a time, through transformers, because its type is gpt2")
    assert "no chat template" in template
    body = {"prompt": "abc", "max_tokens": 12, "temperature": 0}
    found = server.post("completions", body).json()["choices"][0]["text"]
    assert found == secateur.generate(folder, "abc", max_new_tokens=12).text
    refused = server.post("chat/completions", {"messages": USER})
    assert refused.status_code == 400
    assert "use /v1/completions" in refused.json()["error"]["message"]


def test_what_cannot_start(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RecipeError, match=f"port {port}"):
            prepare(ServeRecipe(model=str(model), port=port))
    with pytest.raises(RecipeError, match="--context 300, and the model has 256 positions"):
        prepare(ServeRecipe(model=str(model), port=0, context=300))
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in [n for n in sys.modules if n.startswith("secateur.serving.http")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(RecipeError, match=r"pip install '.\[serve\]'"):
        prepare(ServeRecipe(model=str(model), port=0))


def test_strangers_are_warned_about(model: Path) -> None:
    for options, warned in (
        ({"host": "0.0.0.0"}, True),
        ({"host": "0.0.0.0", "api_key": "k"}, False),
        ({}, False),
    ):
        serving = prepare(ServeRecipe(model=str(model), port=0, **options))
        serving.listening.close()
        assert any("WARNING" in line for line in serving.lines) == warned


SLOWLY = """
import sys, time
from secateur.runtime.slots import SlotDecoder

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
