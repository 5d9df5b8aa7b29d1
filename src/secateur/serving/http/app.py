"""The application: OpenAI's endpoints, health and metrics.

uvicorn runs it, and stops without losing what runs.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import secrets
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from secateur.errors import RecipeError
from secateur.recipes.options import MAX_SEED
from secateur.runtime.grammar import Grammar
from secateur.runtime.sampling import sampling_with
from secateur.serving.http import requests
from secateur.serving.http.middleware import Metrics, guarded
from secateur.serving.http.responses import AnswerResponse, ChatWriter, CompletionWriter, Writer
from secateur.serving.scheduler import QueueFullError
from secateur.serving.service import Service
from secateur.serving.tools import LLAMA, CallReader, ToolFormat

TOO_LONG = "context_length_exceeded"


def application(
    service: Service,
    *,
    api_key: str | None = None,
    stop_seconds: float = 30.0,
) -> ASGIApp:
    """OpenAI's API for a model.

    Args:
        service: the model.
        api_key: what clients send as a bearer token; None: everybody may ask.
        stop_seconds: how long what runs may go on when the server stops.
    """
    metrics = Metrics(service.worker.scheduler)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.worker.stop(stop_seconds)

    app = FastAPI(title="Secateur", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.router.route_class = requests.JsonRoute
    _add_faults(app)
    endpoints = Endpoints(service, metrics)
    app.post("/v1/chat/completions", response_class=Response)(endpoints.chat)
    app.post("/v1/completions", response_class=Response)(endpoints.complete)
    app.get("/v1/models")(endpoints.models)
    app.get("/v1/models/{name:path}")(endpoints.one_model)
    app.get("/health", response_class=Response)(endpoints.health)
    app.get("/metrics", response_class=PlainTextResponse)(endpoints.metrics_text)
    return guarded(app, metrics, api_key)


class Endpoints:
    """The answers of the application.

    Args:
        service: the model.
        metrics: what is counted.
    """

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self.service, self.metrics = service, metrics

    def model(self) -> dict[str, Any]:
        """The model in the list of models."""
        s = self.service
        known = {"id": s.name, "object": "model", "created": s.created, "owned_by": "secateur"}
        return known | {"max_model_len": s.capacity}

    async def models(self) -> dict[str, Any]:
        """The list of models: one."""
        return {"object": "list", "data": [self.model()]}

    async def one_model(self, name: str) -> dict[str, Any]:
        """The model, by its name."""
        self.check_model(name)
        return self.model()

    def check_model(self, name: str | None) -> None:
        """Refuse another model. A request may leave the name out."""
        if name is not None and name != self.service.name:
            said = f"there is no model {requests.shown(name)} here, only {self.service.name}"
            raise requests.ApiError(404, said, param="model", code="model_not_found")

    async def health(self) -> Response:
        """Whether requests are computed."""
        worker = self.service.worker
        if not worker.alive or worker.scheduler.closed:
            return JSONResponse({"status": "stopping" if worker.alive else "dead"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics_text(self) -> PlainTextResponse:
        """Numbers for Prometheus."""
        return PlainTextResponse(generate_latest(self.metrics), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def chat(self, request: requests.ChatRequest) -> Response:
        """Answer a conversation."""
        self.check_model(request.model)
        warnings = request.check()
        tools, form = request.known_tools, self.service.tool_format
        text = await self.conversation(request.messages, request.chat_template_kwargs, tools)
        self.check_size(text, "messages")
        names = [tool["function"]["name"] for tool in tools]
        hidden = [name for name in names if name not in text]
        if hidden and request.forced_tools:
            warnings.append("the chat template does not show tools to the model")
        elif tools and not request.forced_tools:
            self.check_template(form, hidden)
        ids = self.known(await self.service.tokens(text, special=False), "messages")
        grammar = await self.grammar(_tool_grammar(request, form))
        most = 1 if request.parallel_tool_calls is False else None
        calls = partial(CallReader, form or LLAMA, frozenset(names), most) if tools else None
        writer = partial(ChatWriter, calls=calls)
        return self.answer(request, [ids], writer, warnings, grammar=grammar)

    def check_template(self, form: ToolFormat | None, hidden: Sequence[str]) -> None:
        """Refuse tools that the model would not know of, or whose calls would not be found."""
        said = "the chat template of this model "
        if hidden:
            said += f"does not show tools, such as {requests.shown(hidden[0])}"
        elif form is None:
            said += "writes calls of tools in a way of its own, which this server does not read"
        else:
            return
        raise requests.bad_request(f"{said}; tool_choice required, or a function, works", "tools")

    async def grammar(self, written: Callable[[], str] | None) -> Grammar | None:
        """The grammar of an answer, from what writes it; None: there is none."""
        try:
            return None if written is None else await self.service.grammar(written)
        except RecipeError as error:
            said = error.what if error.remedy is None else f"{error.what}; {error.remedy}"
            raise requests.bad_request(said, code="grammar") from error

    def check_size(self, text: str, param: str) -> None:
        """Refuse a prompt that cannot fit, before it is read."""
        if not self.service.fits(text):
            said = f"{len(text.encode()):,} bytes do not fit in {self.service.capacity} tokens"
            raise requests.bad_request(said, param, TOO_LONG)

    async def conversation(
        self,
        messages: Sequence[requests.Message],
        variables: Mapping[str, Any] | None,
        tools: Sequence[dict[str, Any]] = (),
    ) -> str:
        """A conversation, written by the model's chat template."""
        tokenizer = self.service.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            said = "this model has no chat template; use /v1/completions"
            raise requests.bad_request(said, "messages", "no_template")
        options = inspect.signature(tokenizer.apply_chat_template).parameters
        if taken := sorted((variables or {}).keys() & options):
            said = "is an option of the tokenizer, no variable of the template"
            raise requests.bad_request(f"{requests.shown(taken[0])} {said}", "chat_template_kwargs")
        plain = [message.plain() for message in messages]
        variables = {**(variables or {}), **({"tools": [*tools]} if tools else {})}
        try:
            text = await self.service.conversation(plain, variables)
        except Exception as error:  # templates can raise any exception
            said = f"the chat template refuses the messages: {str(error)[:200]}"
            raise requests.bad_request(said, "messages") from error
        for number, message in enumerate(plain):
            for call in message.get("tool_calls", ()):
                if call["function"]["name"] not in text:
                    said = "the chat template of this model does not show calls of tools"
                    raise requests.bad_request(said, f"messages[{number}].tool_calls")
        return text

    async def complete(self, request: requests.CompletionRequest) -> Response:
        """Continue a text, or several."""
        self.check_model(request.model)
        warnings = request.check()
        prompts, service = request.prompts, self.service
        special = request.add_special_tokens is not False
        for text in prompts:
            if isinstance(text, str):
                self.check_size(text, "prompt")
        tokens: list[list[int]] = []
        for ids in prompts:
            own = await service.tokens(ids, special=special) if isinstance(ids, str) else ids
            tokens.append(self.known(own, "prompt"))
        echo = None
        if request.echo:
            echo = [x if isinstance(x, str) else await service.text(x) for x in prompts]
        constraint = request.constraint
        grammar = await self.grammar(None if constraint is None else constraint.grammar)
        return self.answer(request, tokens, CompletionWriter, warnings, echo, grammar=grammar)

    def known(self, ids: list[int], param: str) -> list[int]:
        """Tokens, which have to be in the vocabulary: one that is not would end all requests."""
        size = self.service.vocabulary
        for token in ids:
            if not 0 <= token < size:
                known = f"the vocabulary, which has 0 to {size - 1}"
                raise requests.bad_request(
                    f"token {requests.shown(token)} is not in {known}", param
                )
        return ids

    def answer(
        self,
        request: requests.SamplingRequest,
        prompts: Sequence[Sequence[int]],
        kind: Callable[..., Writer],
        warnings: Sequence[str],
        echo: Sequence[str] | None = None,
        grammar: Grammar | None = None,
    ) -> Response:
        """Begin to answer prompts."""
        service = self.service
        limits = [self.fitting(len(ids), request.new_tokens) for ids in prompts]
        alternatives = request.alternatives
        try:
            drawn = {"seed": secrets.randbits(63)} | service.defaults | request.sampling()
            samplings = [
                sampling_with(drawn, {"seed": (drawn["seed"] + number) % (MAX_SEED + 1)})
                for number in range(request.n or 1)
            ]
        except RecipeError as error:
            raise requests.bad_request(error.what) from error
        try:
            answer = service.ask(
                prompts,
                samplings,
                min(limits),
                stop=request.stop or (),
                alternatives=alternatives,
                echo=echo,
                ignore_ends=bool(request.ignore_eos),
                grammar=grammar,
            )
        except QueueFullError as error:
            if service.worker.scheduler.closed:
                raise requests.ApiError(503, error.what, code="server_stopping") from error
            raise requests.ApiError(429, error.what, code="queue_full") from error
        writer = kind(service.name, alternatives is not None, request.include_usage, warnings)
        stream = bool(request.stream)
        return AnswerResponse(answer, writer, service.worker, self.metrics, stream=stream)

    def fitting(self, prompt: int, wanted: int | None) -> int:
        """The number of new tokens that fit after a prompt."""
        capacity = self.service.capacity
        if prompt == 0:
            raise requests.bad_request("the prompt has no token")
        room, least = capacity - prompt, 1 if wanted is None else wanted
        if room < least:
            said = f"{prompt} tokens of prompt and {least} new ones do not fit in {capacity}"
            raise requests.bad_request(said, code=TOO_LONG)
        return room if wanted is None else wanted


def _tool_grammar(
    request: requests.ChatRequest, form: ToolFormat | None
) -> Callable[[], str] | None:
    """What writes the grammar of an answer that may call tools; None: it is not constrained."""
    constraint, tools, forced = request.constraint, request.known_tools, request.forced_tools
    if forced or (constraint is not None and tools):
        if not forced and constraint is not None and constraint.kind != "json":
            raise requests.bad_request(f"a {constraint.kind} does not go with tools", "tools")
        answer = None if forced or constraint is None else constraint.value
        alone = request.parallel_tool_calls is False or isinstance(request.tool_choice, dict)
        written = (form or LLAMA).grammar
        return partial(written, forced or tools, several=not alone, answer=answer)
    return None if constraint is None else constraint.grammar


def _add_faults(app: FastAPI) -> None:
    """Write all errors of an application as OpenAI's API does."""

    async def wrong(_: Request, error: RequestValidationError) -> Response:
        return requests.invalid(error.errors()).response()

    async def plain(request: Request, error: HTTPException) -> Response:
        if isinstance(error, requests.ApiError):
            return error.response()
        where = f"{request.method} {requests.shown(request.url.path)}"
        said = f"{where}: {error.detail}; GET /openapi.json lists what there is"
        return requests.ApiError(error.status_code, said, headers=error.headers).response()

    async def unexpected(_: Request, error: Exception) -> Response:
        return requests.ApiError(500, "an error of the server; its log says more").response()

    app.add_exception_handler(RequestValidationError, wrong)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, plain)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, unexpected)


BACKLOG = 128
HEAD_BYTES = 64 << 10
"""The longest head of a request: its address and headers."""
OF_THE_PORT = (errno.EADDRINUSE, errno.EACCES)
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that accepts connections.

    Raises:
        RecipeError: the port is taken, or the address is not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        found = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        raise RecipeError(
            f"cannot listen on {host}, port {port}: {error}",
            where="--port" if getattr(error, "errno", None) in OF_THE_PORT else "--host",
            remedy="--port 0 takes a free one; --host 127.0.0.1 is this machine, 0.0.0.0 all",
        ) from error
    # connections inherit this; else each small part of an answer waits 40 ms for the one before it
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found


class StoppableServer(uvicorn.Server):
    """Stops at SIGTERM or Ctrl-C: what runs ends, everything else is refused.

    A second signal ends it at once.

    Args:
        app: the application.
        on_stop: called at the first signal, before anything ends.
        stop_seconds: how long what runs may go on.
    """

    def __init__(self, app: ASGIApp, on_stop: Callable[[], None], stop_seconds: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",  # unlike httptools, it bounds the heads of requests
                h11_max_incomplete_event_size=HEAD_BYTES,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=max(1, round(stop_seconds)),
                lifespan="on",
            )
        )
        self.on_stop = on_stop

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while the server runs. It ends by itself, so none is raised again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, and at the second signal at once."""
        if self.should_exit:
            self.force_exit = True
        self.stop()

    def stop(self) -> None:
        """Refuse new requests, and end when the running ones have ended."""
        self.should_exit = True
        self.on_stop()
