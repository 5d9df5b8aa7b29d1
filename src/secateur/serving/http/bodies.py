"""Bodies of requests: JSON, with our own words for what is wrong."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from secateur.serving.http.faults import ApiError, bad_request

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
                check_type(request.headers.get("content-type", ""))
                with_body.known = parsed(await with_body.body())
            return await handle(with_body)

        return read


def check_type(content_type: str) -> None:
    """Refuse another type than JSON, which a page of another site could send.

    Raises:
        ApiError: it is another one, or none.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415,
            f"the content type is {kind[:80]!r}; send the header 'Content-Type: application/json'",
        )


def parsed(body: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        ApiError: it is something else.
    """

    def no_number(name: str) -> None:
        raise bad_request(f"the body is not JSON: {name} is no number of JSON")

    try:
        text = body.decode("utf-8-sig")
        if not text.strip():
            raise bad_request("the body is empty; it has to be a JSON object")
        found = json.loads(text, parse_constant=no_number)
        if SURROGATE.search(body):
            check_text(found, ())
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


def check_text(value: Any, path: Sequence[str | int]) -> None:
    """Refuse half of a surrogate pair, anywhere in a body.

    Raises:
        ApiError: names the place.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            where = place_of(path)
            raise bad_request(
                f"{where} is not text at character {error.start}: half of a surrogate pair", where
            ) from None
    elif isinstance(value, dict):
        for name, part in value.items():
            check_text(name, (*path, "a name"))
            check_text(part, (*path, name))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            check_text(part, (*path, number))


def place_of(path: Sequence[str | int]) -> str:
    """A place in a body, such as `messages[0].role`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).removeprefix(".")[:80]


def shown(value: Any) -> str:
    """A value for a message, cut where it is long or deep."""
    return SHORT.repr(value)


SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 60


def invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The error for a body whose values are wrong: one sentence about the first of them.

    Args:
        errors: those of pydantic.
    """
    first = errors[0]
    param = place_of([part for part in first["loc"] if part != "body"])
    if first["type"] == "missing":
        return bad_request(f"{param} is missing", param)
    bounds = {
        name: f"{value:g}" if isinstance(value, float) else value
        for name, value in first.get("ctx", {}).items()
    }
    said = WORDS.get(first["type"], "is not valid").format(**bounds)
    return bad_request(f"{param} {said}; it is {shown(first['input'])}", param)
