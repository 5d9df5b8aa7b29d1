"""What a client may ask: the bodies of requests, and errors in the shape of OpenAI's API."""

from __future__ import annotations

import json
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import pydantic
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException

from secateur.recipes.deploy import Sampling
from secateur.recipes.options import MAX_SEED
from secateur.runtime.grammar import choice_text, json_text, regex_text

MAX_CHOICES = 1024
"""Choices of one request: prompts times `n`."""

ONLY: dict[str, tuple[Any, ...]] = {
    name: values
    for names, values in (
        ("audio chat_template guided_choice guided_grammar guided_json guided_regex", ()),
        ("json_schema prompt_embeds prompt_logprobs truncate_prompt_tokens", ()),
        ("web_search_options", ()),
        ("add_generation_prompt skip_special_tokens", (True,)),
        ("add_special_tokens continue_final_message echo use_beam_search", (False,)),
        ("include_stop_str_in_output return_token_ids return_tokens_as_token_ids", (False,)),
        ("allowed_token_ids bad_words documents functions stop_token_ids tools", ([],)),
        ("function_call tool_choice", ("none", "auto")),
        ("grammar suffix", ("",)),
        ("length_penalty typical_p", (1,)),
        ("logit_bias", ({},)),
        ("min_tokens", (0,)),
        ("modalities", (["text"],)),
    )
    for name in names.split()
}
"""Parameters of OpenAI's API, vLLM and llama.cpp that change answers and that this server has not,
and the values under which they change nothing. Other parameters that it does not know are ignored
with a warning.
"""

Prompt = str | list[str] | list[int] | list[list[int]]


def _a_list_of(kind: type, value: Any) -> bool:
    """Whether a value is a list with parts of one type only."""
    return isinstance(value, list) and all(type(part) is kind for part in value)


def _read(value: Any) -> Any:
    """JSON in a text, which is read; other values as they are."""
    # some clients send no arguments as an empty text
    return from_json(value or "{}", allow_inf_nan=False) if isinstance(value, str) else value


def _schema(value: Any) -> Any:
    if not isinstance(schema := _read(value), dict | bool):
        raise ValueError("a JSON schema is an object or a boolean")
    return schema


Schema = Annotated[Any, pydantic.BeforeValidator(_schema)]
NotEmpty = Annotated[str, pydantic.Field(min_length=1)]


class Body(pydantic.BaseModel):
    """A JSON object of a request: no value is converted."""

    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = None


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(Body):
    """A function of a call. Templates take the arguments as an object."""

    name: str
    arguments: Annotated[dict[str, Any], pydantic.BeforeValidator(_read)]


class MessageCall(Body):
    """A call of a tool in a conversation."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """A line of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        list[TextPart] | None,
        pydantic.BeforeValidator(
            lambda x: [{"type": "text", "text": x}] if isinstance(x, str) else x
        ),
    ] = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[MessageCall] | None = None

    @pydantic.model_validator(mode="after")
    def check_content(self) -> Message:
        """Refuse a message that says nothing, and calls of others than the assistant."""
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs a content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant has tool_calls")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as chat templates take it: role and text, and calls of tools."""
        role = "system" if self.role == "developer" else self.role
        found = {"role": role, "content": "".join(part.text for part in self.content or ())}
        if role == "tool":
            found |= self.model_dump(include={"name", "tool_call_id"}, exclude_none=True)
        if self.tool_calls:
            found |= self.model_dump(include={"tool_calls"}, exclude_none=True)
        return found


class Constraint(NamedTuple):
    """What the text of an answer follows.

    Args:
        kind: json, regex or choice.
        value: the JSON schema, the regular expression or the texts.
    """

    kind: str
    value: Any

    def grammar(self) -> str:
        """The same for `Grammars`."""
        written = {"json": json_text, "regex": regex_text, "choice": choice_text}
        return written[self.kind](self.value)


ANY_OBJECT = {"type": "object"}


class NamedSchema(Body):
    """The schema of a format."""

    value: Schema = pydantic.Field(alias="schema")


class ResponseFormat(Body):
    """OpenAI's way to ask for JSON; llama.cpp's has a schema beside `json_object`."""

    type: Literal["text", "json_object", "json_schema"]
    any_object: Schema = pydantic.Field(ANY_OBJECT, alias="schema")
    json_schema: NamedSchema | None = None

    @pydantic.model_validator(mode="after")
    def check_schema(self) -> ResponseFormat:
        """Refuse a schema that is missing."""
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self

    @property
    def constraints(self) -> list[Constraint]:
        """What it says; one or none."""
        if self.type == "text":
            return []
        return [Constraint("json", self.json_schema.value if self.json_schema else self.any_object)]


class StructuredOutputs(Body):
    """vLLM's way to ask for JSON, a regular expression or one of several texts."""

    model_config = pydantic.ConfigDict(extra="forbid")
    schema_of_json: Schema = pydantic.Field(None, alias="json")
    regex: NotEmpty | None = None
    choice: list[NotEmpty] | None = pydantic.Field(None, min_length=1)
    json_object: bool | None = None

    @property
    def constraints(self) -> list[Constraint]:
        """All that it says."""
        anything = ANY_OBJECT if self.json_object else None
        given = (("json", self.schema_of_json), ("json", anything), ("regex", self.regex))
        found = (*given, ("choice", self.choice))
        return [Constraint(kind, value) for kind, value in found if value is not None]


class SamplingRequest(Body, ABC):
    """What both kinds of requests have in common."""

    model_config = pydantic.ConfigDict(extra="allow")
    default_tokens: ClassVar[int | None] = None
    """New tokens where a request does not say; None: what fits."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = pydantic.Field(None, ge=0)
    temperature: float | None = pydantic.Field(None, ge=0, le=100)
    top_p: float | None = pydantic.Field(None, gt=0, le=1)
    top_k: int | None = pydantic.Field(None, ge=-1)
    min_p: float | None = pydantic.Field(None, ge=0, le=1)
    repetition_penalty: float | None = pydantic.Field(None, gt=0, le=100)
    presence_penalty: float | None = pydantic.Field(None, ge=-2, le=2)
    frequency_penalty: float | None = pydantic.Field(None, ge=-2, le=2)
    seed: int | None = pydantic.Field(None, ge=-(2**63), le=MAX_SEED)
    stop: Annotated[
        list[Annotated[str, pydantic.Field(min_length=1, max_length=1000)]] | None,
        pydantic.Field(max_length=16),
        pydantic.BeforeValidator(lambda x: [x] if isinstance(x, str) else x),
    ] = None
    n: int | None = pydantic.Field(None, ge=1, le=128)
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def new_tokens(self) -> int | None:
        """How many tokens the answer may have; None: what fits."""
        return self.default_tokens if self.max_tokens is None else self.max_tokens

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """How many tokens are listed beside each one with their probabilities; None: no list."""

    @property
    def constraint(self) -> Constraint | None:
        """What the text follows; None: anything."""
        given = [x for x in (self.response_format, self.structured_outputs) if x is not None]
        found = [constraint for one in given for constraint in one.constraints]
        if len(found) > 1:
            raise bad_request("an answer follows one structure", "structured_outputs")
        if found and self.ignore_eos:
            raise bad_request("ignore_eos does not go with a structure", "ignore_eos")
        return found[0] if found else None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> list[str]:
        """Refuse what this server has not.

        Returns:
            What it ignores.

        Raises:
            ApiError: names the parameter.
        """
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options needs stream: true", "stream_options")
        ignored = []
        for name, value in (self.model_extra or {}).items():
            if value is None or value in ONLY.get(name, ()):
                continue
            if name in ONLY:
                raise bad_request(f"this server does not support {name}={shown(value)}", name)
            ignored.append(f"{name[:80]} was ignored: this server does not know it")
        return ignored

    def sampling(self) -> dict[str, Any]:
        """The options of the draw that are given; `top_k` below 1 means all tokens."""
        given = self.model_dump(include=set(Sampling.model_fields), exclude_none=True)
        if given.get("top_k", 1) < 1:
            given["top_k"] = None
        if "seed" in given:
            given["seed"] %= MAX_SEED + 1
        return given


class ToolFunction(Body):
    """A function that the model may call."""

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    parameters: dict[str, Any] | None = None


class Tool(Body):
    """A tool, which is a function."""

    type: Literal["function"]
    function: ToolFunction


GivenTool = Annotated[Tool, pydantic.WrapValidator(lambda given, check: check(given) and given)]
"""A tool as it is given: templates write its names in their order."""


class ChatRequest(SamplingRequest):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = pydantic.Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = pydantic.Field(None, ge=1)
    max_tokens: int | None = pydantic.Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = pydantic.Field(None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[GivenTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    @pydantic.field_validator(
        "tool_choice", mode="plain", json_schema_input_type=str | dict[str, Any]
    )
    @classmethod
    def check_tool_choice(cls, value: Any) -> Any:
        """The word, or the name of the function in a list."""
        match value:
            case None | "none" | "auto" | "required":
                return value
            case {"function": {"name": str()}}:
                return value
        raise ValueError("give none, auto, required or a function")

    @property
    def known_tools(self) -> list[dict[str, Any]]:
        """The tools that the model may call.

        Raises:
            ApiError: two have one name, or none has the name that is chosen.
        """
        tools: list[Any] = self.tools or []
        names = [tool["function"]["name"] for tool in tools]
        if len({*names}) < len(names):
            raise bad_request("two tools have one name", "tools")
        if not tools and self.tool_choice not in (None, "none", "auto"):
            raise bad_request("tool_choice needs tools", "tool_choice")
        return [] if self.tool_choice == "none" else tools

    @property
    def forced_tools(self) -> list[dict[str, Any]]:
        """The tools of which one must be called; none if the model decides."""
        if not isinstance(self.tool_choice, dict):
            return self.known_tools if self.tool_choice == "required" else []
        wanted = self.tool_choice["function"]["name"]
        found = [tool for tool in self.known_tools if tool["function"]["name"] == wanted]
        if not found:
            raise bad_request(f"there is no tool {shown(wanted)}", "tool_choice")
        return found

    @property
    def alternatives(self) -> int | None:
        """`top_logprobs`, where `logprobs` is true."""
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def new_tokens(self) -> int | None:
        """`max_completion_tokens` is the newer name of `max_tokens`."""
        return self.max_completion_tokens or super().new_tokens


class CompletionRequest(SamplingRequest):
    """The body of `/v1/completions`: one prompt or several, each a text or a list of tokens."""

    default_tokens: ClassVar[int | None] = 16
    prompt: Prompt
    logprobs: int | None = pydantic.Field(None, ge=0, le=5)
    echo: bool | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None

    @pydantic.field_validator("prompt", mode="plain", json_schema_input_type=Prompt)
    @classmethod
    def check_prompt(cls, value: Any) -> Any:
        """All prompts in a list."""
        if isinstance(value, str) or (_a_list_of(int, value) and value):
            return [value]
        if _a_list_of(str, value):
            return value
        if _a_list_of(list, value) and all(_a_list_of(int, ids) for ids in value):
            return value
        raise ValueError("give a string, a list of tokens, or a list of strings or such lists")

    @property
    def prompts(self) -> list[str | list[int]]:
        """All prompts."""
        given: Any = self.prompt
        return given or [[]]

    @property
    def alternatives(self) -> int | None:
        """`logprobs` is this number."""
        return self.logprobs

    def check(self) -> list[str]:
        """Refuse what this server has not."""
        if self.max_tokens == 0 and not self.echo:
            raise bad_request("max_tokens 0 needs echo: true; else nothing is asked", "max_tokens")
        if self.best_of not in (None, self.n or 1):
            raise bad_request("only the value of n is supported", "best_of")
        if len(self.prompts) * (self.n or 1) > MAX_CHOICES:
            raise bad_request(f"more than {MAX_CHOICES} choices in one request", "prompt")
        return super().check()


BODY_BYTES = 4 << 20
"""The longest body of a request."""


class JsonRequest(Request):
    """A request whose body pydantic reads: no NaN, half of a character, or deep nesting."""

    async def body(self) -> bytes:
        """The body, as long as it may be."""
        if not hasattr(self, "_body"):
            read = bytearray()
            async for part in self.stream():
                read += part
                if len(read) > BODY_BYTES:
                    said = f"the body is longer than {BODY_BYTES:,} bytes"
                    raise ApiError(413, said, code="body_too_large")
            self._body = bytes(read)
        return self._body

    async def json(self) -> Any:
        """The body."""
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise bad_request(f"the body is not JSON: {error}") from error


class JsonRoute(APIRoute):
    """A path of the API."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Refuse other bodies than JSON: a page of another site could send them."""
        handle = super().get_route_handler()

        async def read(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if request.method == "POST" and kind != "application/json":
                raise ApiError(415, "send the header 'Content-Type: application/json'")
            return await handle(JsonRequest(request.scope, request.receive))

        return read


SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 60
shown = SHORT.repr
"""A value for a message, cut where it is long or deep."""


def invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The error for a body whose values are wrong: one sentence about the first of them.

    Args:
        errors: those of pydantic.
    """
    _, *place = errors[0]["loc"] or ("body",)
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    param = "".join(parts).removeprefix(".")[:80]
    said = errors[0]["msg"].removeprefix("Value error, ")
    return bad_request(f"{param or 'the body'}: {said}", param or None)


KINDS = {
    **dict.fromkeys((400, 404, 405, 413, 415, 431), "invalid_request_error"),
    401: "authentication_error",
    408: "timeout_error",
    429: "rate_limit_error",
}
"""The `type` of an error by its status; `server_error` for the others."""

RETRY = {"Retry-After": "1"}
"""For clients that came at a bad moment."""

HEADERS = {429: RETRY, 503: RETRY, 401: {"WWW-Authenticate": "Bearer"}}


class ApiError(HTTPException):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: what is wrong, for a person.
        param: the parameter that is wrong.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers or HEADERS.get(status))
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """The JSON of an answer."""
        kind = KINDS.get(self.status_code, "server_error")
        error = {"message": self.detail, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def event(self) -> bytes:
        """The same in a stream that has begun."""
        return b"data: " + json.dumps(self.body()).encode() + b"\n\n"

    def response(self) -> Response:
        """The answer."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that has to be changed."""
    return ApiError(400, message, param=param, code=code)
