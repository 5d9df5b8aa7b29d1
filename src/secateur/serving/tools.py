"""Calls of tools: how a model writes them, found in the text of its answer.

The chat template says how. A call of a function that no tool has is written with it, and what comes
out is compared with the two ways that are known here: Hermes's, which Qwen has too, and Llama 3's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from secateur.models.tokenizer import Tokenizer
from secateur.runtime.grammar import json_rule

Tool = Mapping[str, Any]
"""A tool as in OpenAI's API: `{"type": "function", "function": {"name": …, "parameters": …}}`."""


class ToolFormat(NamedTuple):
    """How calls are written: JSON with the name and the arguments, between two marks.

    Args:
        begin, end: the marks. Without marks the whole text is one call.
        arguments: the key of the arguments.
    """

    begin: str
    end: str
    arguments: str

    def grammar(self, tools: Sequence[Tool], *, several: bool, answer: Any = None) -> str:
        """The grammar of an answer that calls tools.

        Args:
            tools: one of them is called.
            several: whether there may be more than one call.
            answer: the JSON schema of an answer that may come instead; None: there is none.
        """
        begin, end = self.begin + '{"name": ', "}" + self.end
        lines = ["start: calls" + (" | answer" if answer is not None else "")]
        lines.append("calls: call" + (' ("\\n" call)*' if several and self.end else ""))
        lines.append("call: " + " | ".join(f"call_{n}" for n in range(len(tools))))
        for number, tool in enumerate(tools):
            function = tool["function"]
            name = json.dumps(f'{begin}{json.dumps(function["name"])}, "{self.arguments}": ')
            arguments = json_rule(function.get("parameters") or {"type": "object"})
            lines.append(f"call_{number}: {name} {arguments} {json.dumps(end)}")
        return "\n".join(lines + ([f"answer: {json_rule(answer)}"] if answer is not None else []))


LLAMA = ToolFormat("", "", "parameters")

PROBE = {"name": "secateur_probe", "arguments": {"secateur_key": "secateur_value"}}
PROBE_TEXT = re.compile(
    r"(?P<begin><tool_call>\s*)?"
    r'\{"name":\s*"secateur_probe",\s*"(?P<key>arguments|parameters)":\s*'
    r'\{"secateur_key":\s*"secateur_value"\}\s*\}'
    r"(?(begin)(?P<end>\s*</tool_call>))"
)


def tool_format(tokenizer: Tokenizer) -> ToolFormat | None:
    """How the chat template of a model writes calls; None: it does not, or in a way of its own."""
    # what the template writes for this call shows its way
    called = {"id": "call00000", "type": "function", "function": PROBE}
    answer = {"role": "assistant", "content": "", "tool_calls": [called]}
    messages: list[dict[str, Any]] = [{"role": "user", "content": "x"}, answer]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # templates can raise any exception
        return None
    found = PROBE_TEXT.search(text)
    if found is None:
        return None
    begin, end = found["begin"] or "", found["end"] or ""
    # the text of an answer has no special tokens, so marks must not be such
    ids = tokenizer(begin, add_special_tokens=False)["input_ids"]
    seen = str(tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""
    if begin.strip() not in seen:  # the marks are special tokens, which no text shows
        return None
    return ToolFormat(begin, end, found["key"])


class ToolCall(NamedTuple):
    """A call: the name of the function, and its arguments as JSON."""

    name: str
    arguments: str


@dataclass
class CallReader:
    """Finds the calls in a text that comes in pieces. What is no call stays text.

    Args:
        format: how calls are written.
        names: of the functions that may be called.
        most: calls that are wanted; later ones are left out.

    Attributes:
        held: text that may become a call.
        plain: whether the text cannot become a call any more, because it began as no call.
        found: how many calls there were.
    """

    format: ToolFormat
    names: frozenset[str]
    most: int | None = None
    held: str = ""
    plain: bool = False
    found: int = 0

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """Add a piece; returns the text that is no call for sure, and the calls that ended."""
        self.held += text
        begin, end = self.format.begin.strip(), self.format.end.strip()
        if not begin:
            self.plain |= self.held.lstrip()[:1] not in ("", "{")
            passed, self.held = (self.held, "") if self.plain else ("", self.held)
            return passed, []
        passed, calls = "", list[ToolCall]()
        while (first := self.held.find(begin)) >= 0 and (last := self.held.find(end, first)) >= 0:
            inner = self.calls_in(self.held[first + len(begin) : last])
            last += len(end)
            passed += self.held[:first].rstrip() if inner else self.held[:last]
            calls += inner
            self.held = self.held[last:]
        if first < 0:
            # what may be the beginning of a mark waits for the next piece
            possible = re.search(rf"\s*(?:{_beginnings(begin)})?\Z", self.held)
            assert possible is not None
            first = possible.start()
        else:
            first = len(self.held[:first].rstrip())
        passed, self.held = passed + self.held[:first], self.held[first:]
        return passed, self.wanted(calls)

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest of the text and of the calls."""
        text, self.held = self.held, ""
        calls = self.calls_in(text.replace(self.format.begin.strip(), "", 1))
        if calls:
            return "", self.wanted(calls)
        return ("" if self.found and not text.strip() else text), []

    def wanted(self, calls: list[ToolCall]) -> list[ToolCall]:
        """The calls that are passed on."""
        if self.most is not None:
            calls = calls[: self.most - self.found]
        self.found += len(calls)
        return calls

    def calls_in(self, text: str) -> list[ToolCall]:
        """The calls that a text consists of, with nothing or a semicolon between; else none."""
        calls, text = [], text.strip()
        while text:
            try:
                value, end = DECODER.raw_decode(text)
                name, arguments = value["name"], value[self.format.arguments]
                written = json.dumps(arguments, ensure_ascii=False)
                written.encode()  # half of a surrogate pair is an error too
                known = name in self.names and isinstance(arguments, dict)
            except (ValueError, TypeError, LookupError, RecursionError):
                return []
            if not known:
                return []
            calls.append(ToolCall(name, written))
            text = text[end:].lstrip().removeprefix(";").lstrip()
        return calls


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


DECODER = json.JSONDecoder(parse_constant=_no_number)


def _beginnings(mark: str) -> str:
    """A regular expression of all beginnings of a mark."""
    return "|".join(re.escape(mark[:n]) for n in range(len(mark), 0, -1))
