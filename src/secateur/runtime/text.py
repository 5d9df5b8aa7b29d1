"""Text from tokens, one at a time: whole characters only, and never a part of a stop text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from secateur.models.tokenizer import Tokenizer

HALF = "\ufffd"
"""What tokenizers write for bytes that are no character, or not yet."""

LOOK_BACK = 6
"""Tokens before a piece of text that are decoded with it, because some tokenizers write a token
differently at the beginning of a text."""


class TextStream:
    """Turns tokens into text one at a time, and ends at a stop text.

    A piece of text is passed on when no later token can change it. Half of a character waits for
    its other bytes. A possible beginning of a stop text waits until it cannot be a stop text. Only
    the last tokens are decoded each time, so the work for a token does not grow with the text.

    Args:
        tokenizer: the model's tokenizer.
        stop: the text ends before the first of these.
        tell: receives each piece.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], tell: Callable[[str], None]
    ) -> None:
        self.tokenizer, self.stop, self.tell = tokenizer, [s for s in stop if s], tell
        self.longest_stop = max(map(len, self.stop), default=0)
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.text = ""
        self.passed_on = 0
        self.from_token = self.to_token = 0  # tokens before `to_token` are in the text
        self.stopped = False

    def add(self, token: int) -> bool:
        """Add a token. Return False if the text ends."""
        self.times.append(time.perf_counter())
        self.tokens.append(token)
        self.take(self.new_text(whole=True))
        return not self.stopped

    def new_text(self, *, whole: bool) -> str:
        """The text of the tokens that came last; with `whole`, once its characters are whole."""
        known = self.decoded(self.tokens[self.from_token : self.to_token])
        more = self.decoded(self.tokens[self.from_token :])
        if whole and more.endswith(HALF):
            return ""
        self.to_token = len(self.tokens)
        self.from_token = max(self.from_token, self.to_token - LOOK_BACK)
        return more[len(known) :]

    def decoded(self, tokens: list[int]) -> str:
        """The text of some tokens, without special ones."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""

    def take(self, new: str) -> None:
        """Append text, and end at a stop text."""
        begin = max(0, len(self.text) - self.longest_stop)
        self.text += new
        places = [place for s in self.stop if (place := self.text.find(s, begin)) >= 0]
        if places:
            self.text, self.stopped = self.text[: min(places)], True
        self.pass_on(len(self.text) - (0 if self.stopped else self.waiting()))

    def waiting(self) -> int:
        """The number of characters at the end that may begin a stop text."""
        return max(
            (n for stop in self.stop for n in range(1, len(stop)) if self.text.endswith(stop[:n])),
            default=0,
        )

    def pass_on(self, end: int) -> None:
        """Pass on the text up to a position."""
        if end > self.passed_on:
            self.tell(self.text[self.passed_on : end])
            self.passed_on = end

    def finish(self) -> None:
        """Pass on the remaining text, half a character at the end included."""
        if not self.stopped:
            self.take(self.new_text(whole=False))
        self.pass_on(len(self.text))
