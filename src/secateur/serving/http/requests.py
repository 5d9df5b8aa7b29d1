"""What a client may ask: the bodies of requests, checked, with our own words for what is wrong.

Errors have the shape of OpenAI's API.
"""

from __future__ import annotations

import difflib
import json
import re
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, field_validator

from secateur.recipes.deploy import Sampling
from secateur.recipes.options import MAX_SEED
from secateur.runtime.grammar import choice_text, json_text, regex_text

MAX_STOPS, MAX_STOP_LENGTH = 16, 1000
MAX_CHOICES = 1024
"""Choices of one request: prompts times `n`."""

ONLY: dict[str, tuple[Any, ...]] = {
    name: values
    for names, values in (
        ("audio chat_template guided_grammar json_schema prompt_embeds prompt_logprobs", ()),
        ("truncate_prompt_tokens web_search_options", ()),
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

TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

SIMILAR = 0.8
"""An unknown parameter whose name is so similar to a known one is taken for a slip."""


Prompt = str | list[str] | list[int] | list[list[int]]


def _a_list_of(kind: type, value: Any) -> bool:
    """Whether a value is a list with parts of one type only."""
    return isinstance(value, list) and all(type(part) is kind for part in value)


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None


class Message(BaseModel):
    """A line of a conversation."""

    model_config = ConfigDict(strict=True)
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def check_content(cls, value: Any) -> Any:
        """Say what a content may be."""
        if value is None or isinstance(value, str) or _a_list_of(dict, value):
            return value
        raise ValueError("must be a string or a list of objects")

    def plain(self, number: int) -> dict[str, Any]:
        """The message as chat templates take it: role and text, and calls of tools.

        Raises:
            ApiError: the message holds something else.
        """
        where = f"messages[{number}]"
        role = "system" if self.role == "developer" else self.role
        if role not in ("system", "user", "assistant", "tool"):
            raise bad_request(f"the role {shown(self.role)} is not supported", f"{where}.role")
        if self.content is None and not self.tool_calls:
            raise bad_request("a message needs a content", f"{where}.content")
        found: dict[str, Any] = {"role": role, "content": self.text(where)}
        if role == "tool":
            given = {"name": self.name, "tool_call_id": self.tool_call_id}
            found |= {name: value for name, value in given.items() if value is not None}
        if self.tool_calls:
            if role != "assistant":
                raise bad_request("only an assistant calls tools", f"{where}.tool_calls")
            calls = enumerate(self.tool_calls)
            found["tool_calls"] = [_called(x, f"{where}.tool_calls[{n}]") for n, x in calls]
        return found

    def text(self, where: str) -> str:
        """The text of the content."""
        if isinstance(self.content, str):
            return self.content
        texts = []
        for part in self.content or ():
            kind, text = part.get("type"), part.get("text")
            if kind != "text" or not isinstance(text, str):
                said = f"a part of the kind {shown(kind)} is not supported; this model reads text"
                raise bad_request(said, f"{where}.content")
            texts.append(text)
        return "".join(texts)


def _called(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A call in a message, with its arguments as an object: so templates take it."""
    function = call.get("function")
    name, arguments = (_of(function, "name"), _of(function, "arguments"))
    if isinstance(arguments, str):
        arguments = _json_in(arguments or "{}", f"{where}.function.arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        said = "a call needs a function with a name, and with arguments that are a JSON object"
        raise bad_request(said, f"{where}.function")
    id = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _json_in(text: str, param: str) -> Any:
    """The JSON in a text of a body."""
    try:
        found = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise bad_request(f"{param} is not JSON", param) from None
    _check_text(found, (param,))
    return found


def _of(value: Any, name: str) -> Any:
    """A part of an object; None for what is none."""
    return value.get(name) if isinstance(value, dict) else None


class Constraint(NamedTuple):
    """What the text of an answer follows.

    Args:
        param: the parameter that says so.
        kind: json, regex or choice.
        value: the JSON schema, the regular expression or the texts.
    """

    param: str
    kind: str
    value: Any

    def grammar(self) -> str:
        """The same for `Grammars`."""
        return GRAMMARS[self.kind](self.value)


GRAMMARS: dict[str, Callable[[Any], str]] = {
    "json": json_text,
    "regex": regex_text,
    "choice": choice_text,
}

ANY_OBJECT = {"type": "object"}


def _constraint(param: str, kind: str, value: Any) -> Constraint:
    """What a parameter of vLLM's says, checked."""
    if kind == "json" and isinstance(value, str):
        value = _json_in(value, param)
    right = {
        "json": isinstance(value, dict | bool),
        "regex": isinstance(value, str) and value != "",
        "choice": _a_list_of(str, value) and all([*value, value]),
    }
    if not right[kind]:
        words = {"json": "a JSON schema", "regex": "a regular expression"}.get(kind, "texts")
        raise bad_request(f"{param} must be {words}; it is {shown(value)}", param)
    return Constraint(param, kind, value)


def _format_constraint(given: Mapping[str, Any]) -> list[Constraint]:
    """What `response_format` says."""
    param, kind = "response_format", given.get("type")
    if kind == "json_object":
        return [_constraint(param, "json", given.get("schema", ANY_OBJECT))]
    if kind == "json_schema":
        schema = _of(given.get(kind), "schema")
        return [_constraint(f"{param}.json_schema.schema", "json", schema)]
    if kind != "text":
        raise bad_request(f"{param}.type must be text, json_object or json_schema", param)
    return []


def _vllm_constraints(given: Mapping[str, Any]) -> list[Constraint]:
    """What `structured_outputs` says."""
    param, found = "structured_outputs", list[Constraint]()
    for name, value in given.items():
        if value is None or value is False:
            continue
        if name == "json_object":
            found.append(_constraint(param, "json", ANY_OBJECT))
        elif name in GRAMMARS:
            found.append(_constraint(f"{param}.{name}", name, value))
        else:
            raise bad_request(f"{param} must have json, regex or choice, not {shown(name)}", param)
    return found


class SamplingRequest(BaseModel, ABC):
    """What both kinds of requests have in common."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    default_tokens: ClassVar[int | None] = None
    """New tokens where a request does not say; None: what fits."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=MAX_SEED)
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=1, le=128)
    ignore_eos: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def check_stop(cls, value: Any) -> Any:
        """Say what `stop` may be."""
        texts = [value] if isinstance(value, str) else value or []
        if (
            _a_list_of(str, texts)
            and len(texts) <= MAX_STOPS
            and all(1 <= len(text) <= MAX_STOP_LENGTH for text in texts)
        ):
            return value
        raise ValueError(
            f"must be a string or a list of at most {MAX_STOPS} strings, each of 1 to "
            f"{MAX_STOP_LENGTH} characters"
        )

    @property
    def stops(self) -> list[str]:
        """The texts before which the answer ends."""
        return [self.stop] if isinstance(self.stop, str) else (self.stop or [])

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
        found = [
            _constraint(name, name.removeprefix("guided_"), value)
            for name in ("guided_json", "guided_regex", "guided_choice")
            if (value := getattr(self, name)) is not None
        ]
        if self.response_format is not None:
            found += _format_constraint(self.response_format)
        if self.structured_outputs is not None:
            found += _vllm_constraints(self.structured_outputs)
        if len(found) > 1:
            raise bad_request(f"give one of {', '.join(x.param for x in found)}", found[1].param)
        constraint = found[0] if found else None
        if constraint is not None and self.ignore_eos:
            raise bad_request(f"ignore_eos does not go with {constraint.param}", "ignore_eos")
        return constraint

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
            near = difflib.get_close_matches(name, [*type(self).model_fields, *ONLY], 1, SIMILAR)
            if near:
                raise bad_request(
                    f"unknown parameter {shown(name)}; did you mean {shown(near[0])}?", name[:80]
                )
            ignored.append(f"{name[:80]} was ignored: this server does not know it")
        return ignored

    def sampling(self) -> dict[str, Any]:
        """The options of the draw that are given; `top_k` below 1 means all tokens."""
        options = self.model_dump(include=set(Sampling.model_fields))
        given = {name: value for name, value in options.items() if value is not None}
        if given.get("top_k", 1) < 1:
            given["top_k"] = None
        if "seed" in given:
            given["seed"] %= MAX_SEED + 1
        return given


class ChatRequest(SamplingRequest):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    @field_validator("tool_choice", mode="before")
    @classmethod
    def check_tool_choice(cls, value: Any) -> Any:
        """Say what `tool_choice` may be."""
        named = _of(_of(value, "function"), "name")
        if value in (None, "none", "auto", "required") or isinstance(named, str):
            return value
        raise ValueError("must be none, auto, required or a function")

    @property
    def known_tools(self) -> list[dict[str, Any]]:
        """The tools that the model may call.

        Raises:
            ApiError: a tool is not what it should be, or none has the name that is chosen.
        """
        tools, names = self.tools or [], set[str]()
        for number, tool in enumerate(tools):
            function, where = tool.get("function"), f"tools[{number}]"
            name, parameters = _of(function, "name"), _of(function, "parameters")
            if tool.get("type") != "function" or not isinstance(name, str):
                raise bad_request("a tool must be a function with a name", where)
            if not TOOL_NAME.fullmatch(name):
                said = f"must have 1 to 64 letters, digits, _, . or -; it is {shown(name)}"
                raise bad_request(f"the name of a tool {said}", f"{where}.function.name")
            if not isinstance(parameters, dict | None):
                said = f"parameters must be a JSON schema; it is {shown(parameters)}"
                raise bad_request(said, f"{where}.function.parameters")
            if name in names:
                raise bad_request(
                    f"two tools have the name {shown(name)}", f"{where}.function.name"
                )
            names.add(name)
        if not tools and self.tool_choice not in (None, "none", "auto"):
            raise bad_request("tool_choice needs tools", "tool_choice")
        return [] if self.tool_choice == "none" else tools

    @property
    def forced_tools(self) -> list[dict[str, Any]]:
        """The tools of which one must be called; none if the model decides."""
        if self.tool_choice == "required":
            return self.known_tools
        wanted = _of(_of(self.tool_choice, "function"), "name")
        found = [tool for tool in self.known_tools if tool["function"]["name"] == wanted]
        if wanted is not None and not found:
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
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None

    @field_validator("prompt", mode="plain", json_schema_input_type=Prompt)
    @classmethod
    def check_prompt(cls, value: Any) -> Any:
        """Say what a prompt may be."""
        if (
            isinstance(value, str)
            or _a_list_of(str, value)
            or _a_list_of(int, value)
            or (_a_list_of(list, value) and all(_a_list_of(int, ids) for ids in value))
        ):
            return value
        raise ValueError("must be a string, a list of tokens, or a list of strings or such lists")

    @property
    def prompts(self) -> list[str | list[int]]:
        """All prompts."""
        given: Any = self.prompt
        alone = isinstance(given, str) or _a_list_of(int, given)
        return [given] if alone else [*given]

    @property
    def alternatives(self) -> int | None:
        """`logprobs` is this number."""
        return self.logprobs

    def check(self) -> list[str]:
        """Refuse what this server has not."""
        if self.max_tokens == 0 and not self.echo:
            raise bad_request("max_tokens 0 needs echo: true; else nothing is asked", "max_tokens")
        if self.best_of not in (None, self.n or 1):
            raise bad_request(
                f"best_of={self.best_of} is not supported, only the value of n", "best_of"
            )
        return super().check()


class TokenizeRequest(BaseModel):
    """The body of `/tokenize`: a text or a conversation, as in vLLM."""

    model_config = ConfigDict(strict=True)
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, fail_fast=True)
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(BaseModel):
    """The body of `/detokenize`, as in vLLM."""

    model_config = ConfigDict(strict=True)
    model: str | None = None
    tokens: list[int] = Field(fail_fast=True)


SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""JSON's escape for half of a character; the other half may be missing."""

WORDS = {
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_type": "must be a whole number",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list",
    "model_attributes_type": "must be an object",
    "model_type": "must be an object",
    "string_type": "must be a string",
    "too_short": "must not be empty",
    "value_error": "{error}",
}
"""What is wrong with a value, by pydantic's word for it."""


class JsonRequest(Request):
    """A request whose body was read."""

    known: Any = None

    async def json(self) -> Any:
        """The body."""
        return self.known


class JsonRoute(APIRoute):
    """A path of the API. FastAPI would read bodies with other errors."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Read the body first."""
        handle = super().get_route_handler()

        async def read(request: Request) -> Response:
            with_body = JsonRequest(request.scope, request.receive)
            if request.method == "POST":
                kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                if kind != "application/json":  # a page of another site could send other types
                    send = "send the header 'Content-Type: application/json'"
                    raise ApiError(415, f"the content type is {shown(kind)}; {send}")
                with_body.known = _parsed(await with_body.body())
            return await handle(with_body)

        return read


def _no_number(name: str) -> None:
    raise bad_request(f"the body is not JSON: {name} is no number of JSON")


def _parsed(body: bytes) -> dict[str, Any]:
    """The JSON object of a body."""
    try:
        text = body.decode("utf-8-sig")
        if not text.strip():
            raise bad_request("the body is empty; it has to be a JSON object")
        found = json.loads(text, parse_constant=_no_number)
        if SURROGATE.search(body):
            _check_text(found, ())
    except UnicodeDecodeError as error:
        raise bad_request(
            f"the body is not UTF-8: byte {body[error.start]:#x} at position {error.start}"
        ) from error
    except json.JSONDecodeError as error:
        said = error.msg[:1].lower() + error.msg[1:]
        raise bad_request(
            f"the body is not JSON: {said}, line {error.lineno}, column {error.colno}"
        ) from error
    except ValueError as error:  # Python's limit for integers
        raise bad_request("a number of the body has too many digits") from error
    except RecursionError as error:
        raise bad_request("the body is nested too deeply") from error
    if not isinstance(found, dict):
        raise bad_request(f"the body has to be a JSON object; it is {shown(found)}")
    return found


def _check_text(value: Any, path: Sequence[str | int]) -> None:
    """Refuse half of a surrogate pair, anywhere in a body."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            where = _place_of(path)
            raise bad_request(
                f"{where} is not text at character {error.start}: half of a surrogate pair", where
            ) from None
    elif isinstance(value, dict):
        for name, part in value.items():
            _check_text(name, (*path, "a name"))
            _check_text(part, (*path, name))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            _check_text(part, (*path, number))


def _place_of(path: Sequence[str | int]) -> str:
    """A place in a body, such as `messages[0].role`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).removeprefix(".")[:80]


def shown(value: Any) -> str:
    """A value for a message, as JSON, cut where it is long or deep."""
    return SHORT.repr(value)


class ShortJson(reprlib.Repr):
    """Writes values as JSON does, and leaves out parts of large ones."""

    def repr_str(self, value: str, level: int) -> str:
        """Quotation marks of JSON, and letters of any language as they are."""
        cut = value if len(value) <= self.maxstring else f"{value[: self.maxstring - 3]}..."
        return json.dumps(cut, ensure_ascii=False)

    def repr_bool(self, value: bool, level: int) -> str:
        """The words of JSON."""
        return json.dumps(value)

    repr_NoneType = repr_bool  # noqa: N815, the name that reprlib looks for


SHORT = ShortJson()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 60


def invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The error for a body whose values are wrong: one sentence about the first of them.

    Args:
        errors: those of pydantic.
    """
    first = errors[0]
    param = _place_of([part for part in first["loc"] if part != "body"])
    if first["type"] == "missing":
        return bad_request(f"{param} is missing", param)
    given = first.get("ctx", {}).items()
    bounds = {name: f"{x:g}" if isinstance(x, float) else x for name, x in given}
    said = WORDS.get(first["type"], "is not valid").format(**bounds)
    return bad_request(f"{param} {said}; it is {shown(first['input'])}", param)


KINDS = {
    **dict.fromkeys((400, 404, 405, 413, 414, 415, 431), "invalid_request_error"),
    401: "authentication_error",
    408: "timeout_error",
    429: "rate_limit_error",
}
"""The `type` of an error by its status; `server_error` for the others."""

RETRY_SECONDS = 1
"""What `Retry-After` says to clients that came at a bad moment."""


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: what is wrong, for a person.
        param: the parameter that is wrong.
        code: a word for programs.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON of an answer."""
        kind = KINDS.get(self.status, "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def event(self) -> bytes:
        """The same in a stream that has begun."""
        return b"data: " + json.dumps(self.body()).encode() + b"\n\n"

    def response(self) -> Response:
        """The answer."""
        retry = {"Retry-After": str(RETRY_SECONDS)}
        headers = {429: retry, 503: retry, 401: {"WWW-Authenticate": "Bearer"}}.get(self.status)
        return JSONResponse(self.body(), self.status, headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that has to be changed."""
    return ApiError(400, message, param=param, code=code)
