"""What a server answers: the JSON of OpenAI's API, whole or in chunks."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.serving.service import Answer, End, Piece, TokenChance

__all__ = ["DONE", "ChatWriter", "CompletionWriter", "Writer"]

DONE = b"data: [DONE]\n\n"


@dataclass
class Writer(ABC):
    """Writes the answer of one request.

    Args:
        model: the name of the model.
        listed: whether tokens are listed with their probabilities.
        include_usage: whether a stream ends with its usage.
    """

    model: str
    listed: bool = False
    include_usage: bool = False
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    offset: int = 0  # characters before the next token, in the list of a completion

    prefix = kind = chunk_kind = ""

    def __post_init__(self) -> None:
        self.id = self.prefix + secrets.token_hex(12)

    def head(self, kind: str) -> dict[str, Any]:
        """What every answer and chunk begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def usage(self, answer: Answer, end: End) -> dict[str, Any]:
        """How many tokens were read and written."""
        return {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": end.tokens,
            "total_tokens": answer.prompt_tokens + end.tokens,
            "prompt_tokens_details": {"cached_tokens": end.cached},
        }

    def whole(self, answer: Answer, pieces: Sequence[Piece], end: End) -> dict[str, Any]:
        """The answer of a request that is no stream."""
        text = "".join(piece.text for piece in pieces)
        chances = [chance for piece in pieces for chance in piece.chances]
        choice = self.choice(text, chances) | {"finish_reason": end.reason}
        return self.head(self.kind) | {"choices": [choice], "usage": self.usage(answer, end)}

    def event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        """A chunk of a stream."""
        chunk: dict[str, Any] = self.head(self.chunk_kind) | {"choices": choices}
        if self.include_usage:
            chunk["usage"] = usage
        return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"

    def first(self) -> bytes:
        """What a stream begins with."""
        return b""

    def piece(self, piece: Piece) -> bytes:
        """A piece of text in a stream."""
        return self.event([self.delta(piece.text, piece.chances) | {"finish_reason": None}])

    def last(self, answer: Answer, end: End) -> bytes:
        """What a stream ends with."""
        ending = self.event([self.delta(None, []) | {"finish_reason": end.reason}])
        usage = self.event([], self.usage(answer, end)) if self.include_usage else b""
        return ending + usage + DONE

    @abstractmethod
    def choice(self, text: str, chances: Sequence[TokenChance]) -> dict[str, Any]:
        """The answer itself."""

    @abstractmethod
    def delta(self, text: str | None, chances: Sequence[TokenChance]) -> dict[str, Any]:
        """A piece of it; None is nothing more."""


class ChatWriter(Writer):
    """Answers of `/v1/chat/completions`."""

    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, text: str, chances: Sequence[TokenChance]) -> dict[str, Any]:
        """The message."""
        message = {"role": "assistant", "content": text}
        return {"index": 0, "message": message, "logprobs": self.logprobs(chances)}

    def delta(self, text: str | None, chances: Sequence[TokenChance]) -> dict[str, Any]:
        """A piece of the message."""
        content = {} if text is None else {"content": text}
        return {"index": 0, "delta": content, "logprobs": self.logprobs(chances)}

    def first(self) -> bytes:
        """The role."""
        delta = {"role": "assistant", "content": ""}
        return self.event([{"index": 0, "delta": delta, "finish_reason": None}])

    def logprobs(self, chances: Sequence[TokenChance]) -> dict[str, Any] | None:
        """The list of tokens."""
        if not self.listed:
            return None
        return {
            "content": [
                self.entry(c.text, c.log_probability)
                | {"top_logprobs": [self.entry(text, log) for text, log in c.others]}
                for c in chances
            ]
        }

    def entry(self, text: str, log_probability: float) -> dict[str, Any]:
        """A token of the list."""
        return {"token": text, "logprob": log_probability, "bytes": list(text.encode())}


class CompletionWriter(Writer):
    """Answers of `/v1/completions`."""

    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def choice(self, text: str, chances: Sequence[TokenChance]) -> dict[str, Any]:
        """The text."""
        return {"index": 0, "text": text, "logprobs": self.logprobs(chances)}

    def delta(self, text: str | None, chances: Sequence[TokenChance]) -> dict[str, Any]:
        """A piece of the text."""
        return self.choice(text or "", chances)

    def logprobs(self, chances: Sequence[TokenChance]) -> dict[str, Any] | None:
        """The list of tokens, in the older form of this endpoint."""
        if not self.listed:
            return None
        offsets = []
        for chance in chances:
            offsets.append(self.offset)
            self.offset += len(chance.text)
        return {
            "tokens": [c.text for c in chances],
            "token_logprobs": [c.log_probability for c in chances],
            "top_logprobs": [dict(c.others) for c in chances],
            "text_offset": offsets,
        }
