"""What `generate` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from secateur.reporting.results.result import Result
from secateur.reporting.tables import Block, Line


@dataclass(frozen=True, repr=False)
class GenerateResult(Result):
    """A generated text, with speed and decode loop.

    Attributes:
        model: the name from the user.
        prompt: the prompt.
        text: the generated text.
        tokens: number of tokens in the text.
        load_seconds: time to load the model.
        first_token_seconds: time from the prompt to the first token.
        tokens_per_second: speed after the first token; None for a single token.
        loop: `fused decode loop`, one call into C for each token; or `transformers` and the reason.
        chat: whether the prompt was a message in the tokenizer's chat template.
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
        """Number of tokens, speed and decode loop; a line more if there is no answer."""
        rate = "" if self.tokens_per_second is None else f", {self.tokens_per_second:.1f} tokens/s"
        told = f"{self.tokens} tokens{rate} ({self.loop})"
        if self.tokens == 0 and self.chat:
            told += (
                "\nThe model ends its answer at once, as a pruned one does that has forgotten the "
                "chat format. --no-chat continues the prompt as it is; or train on chats"
            )
        return told

    def blocks(self) -> Sequence[Block]:
        """The text, after its prompt unless it answers a message; then the account."""
        text = self.text if self.chat else self.prompt + self.text
        return [Line(text), Line(self.account, style="dim")]
