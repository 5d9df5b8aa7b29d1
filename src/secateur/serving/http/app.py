"""The application: OpenAI's endpoints, health and metrics."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from secateur.errors import RecipeError
from secateur.runtime.sampling import Sampling
from secateur.serving.http.answers import ChatWriter, CompletionWriter, Writer
from secateur.serving.http.faults import ApiError, bad_request, overloaded
from secateur.serving.http.limits import Limits
from secateur.serving.http.metrics import Metrics
from secateur.serving.http.questions import ChatQuestion, CompletionQuestion, Question
from secateur.serving.http.streams import AnswerResponse
from secateur.serving.scheduler import QueueFullError
from secateur.serving.service import Service

__all__ = ["application"]


def application(
    service: Service,
    *,
    api_key: str | None = None,
    body_bytes: int = 4 << 20,
    body_seconds: float = 30.0,
    stop_seconds: float = 30.0,
) -> ASGIApp:
    """OpenAI's API for a model.

    Args:
        service: the model.
        api_key: what clients send as a bearer token; None: everybody may ask.
        body_bytes: the longest body of a request.
        body_seconds: the longest time for a body to arrive.
        stop_seconds: how long what runs may go on when the server stops.
    """
    metrics = Metrics(service.worker.scheduler)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.worker.stop(stop_seconds)

    app = FastAPI(title="Secateur", docs_url=None, redoc_url=None, lifespan=lifespan)
    add_faults(app)
    endpoints = Endpoints(service, metrics)
    app.get("/v1/models")(endpoints.models)
    app.get("/v1/models/{name:path}")(endpoints.one_model)
    app.post("/v1/chat/completions", response_class=Response)(endpoints.chat)
    app.post("/v1/completions", response_class=Response)(endpoints.complete)
    app.get("/health", response_class=Response)(endpoints.health)
    app.get("/metrics", response_class=PlainTextResponse)(endpoints.metrics_text)
    return Limits(app, metrics, api_key, body_bytes, body_seconds)


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
            raise ApiError(
                404,
                f"there is no model {name!r:.80} here, only {self.service.name!r}",
                param="model",
                code="model_not_found",
            )

    async def health(self) -> Response:
        """Whether requests are computed."""
        worker = self.service.worker
        if not worker.alive or worker.scheduler.closed:
            return JSONResponse({"status": "stopping" if worker.alive else "dead"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics_text(self) -> PlainTextResponse:
        """Numbers for Prometheus."""
        return PlainTextResponse(
            self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def chat(self, question: ChatQuestion) -> Response:
        """Answer a conversation."""
        self.check(question)
        if not getattr(self.service.tokenizer, "chat_template", None):
            raise bad_request(
                "this model has no chat template; use /v1/completions", "messages", "no_template"
            )
        messages = question.conversation()
        for message in messages:
            check_text(message["content"], "messages")
        try:
            ids = await self.service.conversation(messages)
        except Exception as error:  # templates can raise any exception
            raise bad_request(
                f"the chat template refuses the messages: {str(error)[:200]}", "messages"
            ) from error
        return self.answer(question, ids, ChatWriter)

    async def complete(self, question: CompletionQuestion) -> Response:
        """Continue a text."""
        self.check(question)
        prompt = question.only_prompt()
        if isinstance(prompt, str):
            check_text(prompt, "prompt")
            ids = await self.service.text(prompt)
        else:
            ids = prompt
            vocabulary = len(self.service.tokenizer)
            odd = [token for token in ids if not 0 <= token < vocabulary]
            if odd:
                raise bad_request(f"token {odd[0]} is not in the vocabulary", "prompt")
        return self.answer(question, ids, CompletionWriter)

    def check(self, question: Question) -> None:
        """Refuse what this server or this model has not."""
        self.check_model(question.model)
        question.check()
        for stop in question.stops:
            check_text(stop, "stop")

    def answer(self, question: Question, ids: list[int], kind: type[Writer]) -> Response:
        """Begin to answer a prompt."""
        service = self.service
        new_tokens = self.fitting(len(ids), question.new_tokens)
        alternatives = question.alternatives
        try:
            chance = {"seed": secrets.randbits(63)}
            sampling = Sampling(**(chance | service.defaults | question.sampling()))
        except RecipeError as error:
            raise bad_request(error.what) from error
        try:
            answer = service.ask(
                ids, new_tokens, sampling, stop=question.stops, alternatives=alternatives
            )
        except QueueFullError as error:
            stopping = service.worker.scheduler.closed
            raise overloaded(error.what, stopping=stopping) from error
        writer = kind(service.name, alternatives is not None, question.include_usage)
        stream = bool(question.stream)
        return AnswerResponse(answer, writer, service.worker, self.metrics, stream=stream)

    def fitting(self, prompt: int, wanted: int | None) -> int:
        """The number of new tokens that fit after a prompt."""
        capacity = self.service.capacity
        if prompt == 0:
            raise bad_request("the prompt has no token")
        room = capacity - prompt
        if room < (wanted or 1):
            raise bad_request(
                f"this model has room for {capacity} tokens; the prompt has {prompt}, and "
                f"{wanted or 1} more are wanted",
                code="context_length_exceeded",
            )
        return wanted or room


def check_text(text: str, param: str) -> None:
    """Refuse what is not text: half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise bad_request(
            f"not text at character {error.start}: half of a surrogate pair", param
        ) from None


def add_faults(app: FastAPI) -> None:
    """Write all errors of an application as OpenAI's API does."""

    async def ours(_: Request, error: ApiError) -> Response:
        return error.response()

    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        if first["type"] == "json_invalid":
            return bad_request(f"the body is not JSON: {first['ctx']['error']}").response()
        said = first["msg"] if place else f"the body has to be a JSON object: {first['msg']}"
        return bad_request(f"{'.'.join(place)}: {said}", ".".join(place) or None).response()

    async def plain(_: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail)).response()

    async def unexpected(_: Request, error: Exception) -> Response:
        return ApiError(500, "an error of the server; its log says more").response()

    app.add_exception_handler(ApiError, ours)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, plain)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, unexpected)
