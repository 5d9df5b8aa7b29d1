"""Errors in the shape of OpenAI's API."""

from __future__ import annotations

import json
from typing import Any

from fastapi.responses import JSONResponse, Response

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
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
        headers = {}
        if self.status in (429, 503):
            headers["Retry-After"] = str(RETRY_SECONDS)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that has to be changed."""
    return ApiError(400, message, param=param, code=code)
