"""What `generate` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from secateur.reporting.results.result import Result
from secateur.reporting.tables import Block, Line

__all__ = ["GenerateResult"]


@dataclass(frozen=True)
class GenerateResult(Result):
    """A text and how it was made.

    Attributes:
        model: as it was given.
        prompt: what was given.
        text: what followed.
        tokens: of the text.
        load_seconds: from the files to a model that is ready.
        first_token_seconds: from the prompt to the first token.
        tokens_per_second: of the tokens after the first; None for a single one.
        loop: `one call for each token`, or `transformers` and why.
        chat: whether the prompt was a message, written by the tokenizer's chat template.
    """

    model: str
    prompt: str
    text: str
    tokens: int
    load_seconds: float
    first_token_seconds: float | None
    tokens_per_second: float | None
    loop: str
    chat: bool = False

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    @property
    def account(self) -> str:
        """How many tokens, how fast, and by which loop, in a line."""
        rate = "" if self.tokens_per_second is None else f", {self.tokens_per_second:.1f} tokens/s"
        return f"{self.tokens} tokens{rate} ({self.loop})"

    def blocks(self) -> Sequence[Block]:
        """The text, behind its prompt unless it answers a message; then the account."""
        text = self.text if self.chat else self.prompt + self.text
        return [Line(text), Line(self.account, style="dim")]
