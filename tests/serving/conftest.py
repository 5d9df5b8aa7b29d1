"""A server in a thread of this process, for a tiny model that learned a little."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import transformers
from tiny import save_tiny
from tokenizers_of_kinds import tokenizer_of
from trained import save_trained

from secateur.recipes.deploy import ServeRecipe
from secateur.serving.serve import Serving, prepare

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }};{% endfor %}{{ mood }}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model of 256 positions with a chat template."""
    folder = save_trained(tmp_path_factory.mktemp("served") / "learned", steps=15)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TEMPLATE}))
    return folder


def byte_level(folder: Path, template: str = TEMPLATE, family: str = "llama") -> Path:
    """A random model of 1024 positions with a byte-level tokenizer of 512 tokens."""
    size = 512
    save_tiny(folder, family, tokenizer=False, vocab_size=size, max_position_embeddings=1024)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of("bytes", size),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


class Running:
    """A server that answers.

    Attributes:
        serving: the server.
        url: where it listens.
        client: sends requests to it.
    """

    def __init__(self, serving: Serving) -> None:
        self.serving, self.url = serving, serving.address
        # One client for all requests: each would read all certificates.
        self.client = httpx.Client(base_url=self.url, timeout=30)
        self.thread = threading.Thread(target=serving.run, daemon=True)
        self.thread.start()
        self.until(lambda: serving.server.started)

    @property
    def scheduler(self) -> Any:
        """What decides."""
        return self.serving.service.worker.scheduler

    def slow_down(self, seconds: float, call: str = "step") -> None:
        """Let every call of the engine take so long."""
        plain = getattr(self.scheduler.engine, call)

        def slowly(*args: Any, **options: Any) -> Any:
            time.sleep(seconds)
            return plain(*args, **options)

        setattr(self.scheduler.engine, call, slowly)

    def until(self, condition: Callable[[], Any], seconds: float = 20.0) -> None:
        """Wait for something that happens in another thread."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.005)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """Send a request."""
        return self.client.post(f"/v1/{path}", json=body, **options)

    def stop(self) -> None:
        """End the server."""
        self.client.close()
        self.serving.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()


def refusal(server: Running, path: str, body: Any) -> dict[str, Any]:
    """The error of a bad request, in the form of OpenAI's API."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    return fault_in(server.client.post(f"/v1/{path}", content=content, headers=headers))


def fault_in(answer: httpx.Response) -> dict[str, Any]:
    """The error of an answer to a bad request."""
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert [*error] == ["message", "type", "param", "code"]
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400
    return error


@pytest.fixture
def serve(model: Path) -> Iterator[Callable[..., Running]]:
    """Start servers; they end with the test."""
    running: list[Running] = []

    def start(folder: Path | None = None, **options: Any) -> Running:
        recipe = ServeRecipe(model=str(folder or model), port=0, **options)
        running.append(Running(prepare(recipe)))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Running]:
    """One server for all tests of a module that leave it as it is."""
    running = Running(prepare(ServeRecipe(model=str(model), port=0)))
    yield running
    running.stop()
