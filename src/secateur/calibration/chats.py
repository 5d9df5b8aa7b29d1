"""Conversations: read from rows, written by a chat template, and which of their tokens are answers.

| fields of a row                                    | read as                              |
|----------------------------------------------------|--------------------------------------|
| `messages`: [{"role", "content"}, …]               | a conversation, in the chat template |
| `conversations`: [{"from", "value"}, …] (ShareGPT) | the same                             |
| `prompt` and `completion`, lists of messages       | the same, all messages together      |
| `prompt` and `completion`, texts                   | one text, without a template         |

Answers are what the assistant writes, or the completion.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from secateur.errors import SourceError, first_line
from secateur.models.tokenizer import Tokenizer, encoded
from secateur.registry import did_you_mean

FIELD = "text"
CHATS = ("messages", "conversations")
PAIR = ("prompt", "completion")
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "function")},
    **{"human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool"},
}
"""The roles of messages; those of ShareGPT become the usual ones."""

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Marks answers in a chat template."""


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt and its completion, both plain texts.

    Attributes:
        prompt: the first part of the text.
        completion: the second part, which is the answer.
    """

    prompt: str
    completion: str
    ends_itself: ClassVar[bool] = False

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """Its token ids, without special tokens around them."""
        return self.marked(tokenizer)[0]

    def marked(self, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
        """Its token ids, and which of them are the answer."""
        text = self.prompt + self.completion
        return _marked(tokenizer, text, [(len(self.prompt), len(text))])


@dataclass(frozen=True)
class Chat:
    """A conversation, to be written with the chat template of a tokenizer.

    Attributes:
        messages: role and content of each, and whatever else the template reads.
        where: file and line, or data set and row, for errors.
        tools: descriptions of tools, for the template.
    """

    messages: tuple[dict[str, Any], ...]
    where: str
    tools: list[Any] | None = None
    ends_itself: ClassVar[bool] = True

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """Its token ids: those of `apply_chat_template`.

        Raises:
            SourceError: the tokenizer has no chat template, or the template refuses the messages.
        """
        return encoded(tokenizer, [self._whole(tokenizer)], add_special_tokens=False)[0]

    def marked(self, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
        """Its token ids, and which of them are answers.

        A template with `{% generation %}` marks them itself. Otherwise an answer is what the
        template adds for it, between the conversation before it with the generation prompt and the
        conversation with it; white space at its end does not belong to it.

        Raises:
            SourceError: as `ids`; or the answers cannot be found.
        """
        whole = self._whole(tokenizer)
        if GENERATION.search(tokenizer.get_chat_template(tools=self.tools)):
            found = self._call(
                tokenizer,
                self.messages,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},
            )
            return list(found["input_ids"]), [bool(x) for x in found["assistant_masks"]]
        answers = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        return _marked(tokenizer, whole, [self._answer(tokenizer, whole, i) for i in answers])

    def _answer(self, tokenizer: Tokenizer, whole: str, number: int) -> tuple[int, int]:
        """The first character of an answer in the whole conversation, and the one after it."""
        prompt = self._text(tokenizer, number, add_generation_prompt=True) if number else ""
        after, content = self._text(tokenizer, number + 1), _words(self.messages[number]).strip()
        known, through = prompt and whole.startswith(prompt), whole.startswith(after)
        start, end = len(prompt), len(after.rstrip())
        if not known:  # an earlier answer may be written otherwise than the generation prompt
            asked = self._text(tokenizer, number) if number else ""
            start = after.rfind(content) if through else len(asked)
            start = whole.find(content, start) if content and whole.startswith(asked) else -1
        if not through:  # or shorter than it was as the last one
            place = whole.find(content, start) if content and start >= 0 else -1
            end = place + len(content) if place >= 0 else -1
            behind = whole[end:].lstrip()
            stops = [token for token in tokenizer.get_added_vocab() if behind.startswith(token)]
            stop = max(stops, key=len, default="")
            end = len(whole) - len(behind) + len(stop) if end >= 0 and stop else end
        if start < 0 or end < start:
            raise SourceError(
                f"message {number + 1} is an answer that cannot be found in what the chat template "
                "writes",
                where=self.where,
                remedy="mark the answers in the template with {% generation %}, or train on whole "
                "conversations (--whole-conversations)",
            )
        return start, end

    def _whole(self, tokenizer: Tokenizer) -> str:
        """The conversation as the template writes it."""
        text = self._text(tokenizer, len(self.messages))
        for number, message in enumerate(self.messages, start=1):
            if message["role"] == "user" and _words(message).strip() not in text:
                raise SourceError(
                    f"the chat template does not write the text of message {number}",
                    where=self.where,
                    remedy='write its content as this template reads it: a text, or [{"type": '
                    '"text", "text": "..."}]',
                )
        return text

    def _text(self, tokenizer: Tokenizer, count: int, **options: bool) -> str:
        """The first messages as the template writes them."""
        return str(self._call(tokenizer, self.messages[:count], tokenize=False, **options))

    def _call(self, tokenizer: Tokenizer, messages: Sequence[Any], **options: Any) -> Any:
        """What `apply_chat_template` returns."""
        if not getattr(tokenizer, "chat_template", None):
            raise SourceError(
                "this is a conversation, and the tokenizer has no chat template",
                where=self.where,
                remedy="copy chat_template.jinja or tokenizer_config.json of the instruct model to "
                "the model's folder, or write the conversation as one text, in the field 'text'",
            )
        options |= {"tools": self.tools} if self.tools else {}
        try:
            return tokenizer.apply_chat_template(list(messages), **options)
        except Exception as error:  # templates can raise any exception
            raise SourceError(
                f"the chat template refuses the conversation: {first_line(error)}",
                where=self.where,
                remedy="change or remove this conversation; many templates need user and assistant "
                "to alternate, and some refuse a system message",
            ) from error


Document = str | Chat | PromptCompletion
"""A text, or a conversation that needs a tokenizer to become one."""


def _words(message: Mapping[str, Any]) -> str:
    """The text of a message; its content may be in parts."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _marked(
    tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[bool]]:
    """The token ids of a text, and which of them have characters in one of the spans."""
    if not tokenizer.is_fast:
        raise SourceError(
            "answers cannot be found in tokens: the tokenizer is not a fast one",
            remedy="save it as tokenizer.json, or train on whole conversations "
            "(--whole-conversations)",
        )
    found = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
    )
    marks = [
        any(first < end and last > start for start, end in spans)  # one character is enough
        for first, last in found["offset_mapping"]
    ]
    return list(found["input_ids"]), marks


def holds_chats(documents: Sequence[Document]) -> bool:
    """Whether the documents are conversations and not texts; a source has one of the two."""
    return len(documents) > 0 and not isinstance(documents[0], str)


def whole_characters(text: str, where: str) -> str:
    """The text. JSON can write half of a surrogate pair, and no tokenizer reads it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"the text has half of a surrogate pair (\\u{ord(text[error.start]):04x}) at character "
            f"{error.start}",
            where=where,
            remedy="write the whole character, or remove it",
        ) from None
    return text


def conversation_fields(row: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """The fields of a row with a conversation, or a prompt and its completion; () for a text."""
    if isinstance(row.get(field), list):
        return (field,)
    if field != FIELD or row.get(field) is not None:
        return ()
    if all(row.get(name) is not None for name in PAIR) and not row.get(CHATS[0]):
        return PAIR
    return next(((name,) for name in CHATS if name in row), ())


def conversation(
    row: Mapping[str, Any], fields: tuple[str, ...], where: str
) -> Chat | PromptCompletion:
    """The conversation of a row."""
    values = [row[name] for name in fields]
    if all(isinstance(value, str) for value in values) and len(values) == len(PAIR):
        prompt, completion = (whole_characters(value, where) for value in values)
        return PromptCompletion(prompt, completion)
    wrong = [name for name, x in zip(fields, values, strict=True) if not isinstance(x, list)]
    if wrong:
        raise SourceError(
            f"the field {wrong[0]!r} is a {type(row[wrong[0]]).__name__}, not a list of messages",
            where=where,
            remedy='write [{"role": "user", "content": "..."}, ...]',
        )
    messages = tuple(_message(x, where) for value in values for x in value)
    if not any(m["content"] or len(m) > 2 for m in messages):
        raise SourceError(
            "the conversation is empty", where=where, remedy="remove it, or write its messages"
        )
    tools = row.get("tools") or None
    if not isinstance(tools, list | None):
        raise SourceError(
            f"the field 'tools' is a {type(tools).__name__}, not a list of tools",
            where=where,
            remedy='write [{"type": "function", "function": {...}}, ...]',
        )
    return Chat(messages, where, tools)


def _message(given: Any, where: str) -> dict[str, Any]:
    """A message with role and content, whichever names they have."""
    found = given if isinstance(given, dict) else {}
    role, content = found.get("role", found.get("from")), found.get("content", found.get("value"))
    others = {
        name: value
        for name, value in found.items()
        if name not in ("role", "from", "content", "value") and value is not None
    }
    if content is None and others:  # of a message that calls a tool
        content = ""
    if role is None or content is None:
        raise SourceError(
            "a message has no role or no content; it has: " + (", ".join(found) or "no field"),
            where=where,
            remedy='write {"role": "user", "content": "..."}',
        )
    if not isinstance(role, str) or role not in ROLES:
        raise SourceError(
            f"unknown role {role!r}", where=where, remedy=did_you_mean(str(role), [*ROLES])
        )
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise SourceError(
                f"the content of a message has a part that is no text ({kind})",
                where=where,
                remedy="remove it",
            )
        whole_characters(part["text"], where)
    return {"role": ROLES[role], "content": content, **others}
