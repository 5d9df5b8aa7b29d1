"""What a client may ask: the bodies of requests, checked."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from secateur.runtime.sampling import MAX_SEED
from secateur.serving.http.faults import bad_request

__all__ = ["ChatQuestion", "CompletionQuestion", "Question", "StreamOptions"]

MAX_STOPS, MAX_STOP_LENGTH = 16, 1000

IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Parameters of OpenAI's API that cannot change an answer here."""

ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Parameters that this server has not, and the values under which they change nothing."""

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None


class Message(BaseModel):
    """A line of a conversation."""

    model_config = ConfigDict(strict=True)
    role: str
    content: str | list[dict[str, Any]] | None = None

    def plain(self, number: int) -> dict[str, str]:
        """Role and text.

        Raises:
            ApiError: the message holds something else than text.
        """
        where = f"messages[{number}]"
        role = "system" if self.role == "developer" else self.role
        if role not in ("system", "user", "assistant"):
            raise bad_request(f"the role {self.role!r} is not supported", f"{where}.role")
        if self.content is None:
            raise bad_request("a message needs a content", f"{where}.content")
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        texts = []
        for part in self.content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type")
                raise bad_request(
                    f"a part of the kind {kind!r} is not supported; this model reads text",
                    f"{where}.content",
                )
            texts.append(part["text"])
        return {"role": role, "content": "".join(texts)}


class Question(BaseModel, ABC):
    """What both kinds of requests have in common.

    Parameters that are unknown, or that this server has not, are errors rather than ignored.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    default_tokens: ClassVar[int | None] = None
    """New tokens where a request does not say; None: what fits."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=MAX_SEED)
    stop: Stop | list[Stop] | None = None

    @property
    def stops(self) -> list[str]:
        """The texts before which the answer ends."""
        return [self.stop] if isinstance(self.stop, str) else (self.stop or [])

    @property
    def new_tokens(self) -> int | None:
        """How many tokens the answer may have; None: what fits."""
        return self.max_tokens or self.default_tokens

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """How many tokens are listed beside each one with their probabilities; None: no list."""

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Refuse what this server has not.

        Raises:
            ApiError: names the parameter.
        """
        if len(self.stops) > MAX_STOPS:
            raise bad_request(f"{len(self.stops)} stop texts, at most {MAX_STOPS}", "stop")
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options needs stream: true", "stream_options")
        for name, value in (self.model_extra or {}).items():
            if value is None or name in IGNORED or value in ONLY.get(name, ()):
                continue
            if name in ONLY:
                raise bad_request(f"this server does not support {name}={value!r:.80}", name)
            near = difflib.get_close_matches(name, [*type(self).model_fields, *ONLY], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise bad_request(f"unknown parameter {name!r:.80}{hint}", name[:80])

    def sampling(self) -> dict[str, Any]:
        """The options of the draw that are given; `top_k` below 1 means all tokens."""
        names = (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if given.get("top_k", 1) < 1:
            given["top_k"] = None
        if self.seed is not None:
            given["seed"] = self.seed % (MAX_SEED + 1)
        return given


class ChatQuestion(Question):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

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

    def conversation(self) -> list[dict[str, str]]:
        """Role and text of every message."""
        return [message.plain(number) for number, message in enumerate(self.messages)]


class CompletionQuestion(Question):
    """The body of `/v1/completions`. A prompt is a text, or a list of tokens."""

    default_tokens: ClassVar[int | None] = 16
    prompt: str | list[str] | list[int]
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def alternatives(self) -> int | None:
        """`logprobs` is this number."""
        return self.logprobs

    def only_prompt(self) -> str | list[int]:
        """The prompt.

        Raises:
            ApiError: there are several, or none.
        """
        if isinstance(self.prompt, str):
            return self.prompt
        if self.prompt and isinstance(self.prompt[0], str):
            if len(self.prompt) > 1:
                raise bad_request(
                    f"{len(self.prompt)} prompts in one request; send one request for each",
                    "prompt",
                )
            return self.prompt[0]
        return [token for token in self.prompt if isinstance(token, int)]
