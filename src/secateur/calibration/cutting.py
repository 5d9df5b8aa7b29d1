"""The one way to cut a text into windows, for calibration, training and evaluation alike.

Where the tokenizer puts start tokens in front of a text, every window begins with them. A model
trained with start tokens fails without them, because its attention rests on the first token. So a
window of S tokens is

    start tokens (k of them) + S − k tokens of text

and windows that do not overlap take S − k tokens of text each: no token is lost between two of
them, and none is read twice. Only windows have start tokens; the text itself has none. An end token
that a tokenizer appends to a text belongs to the text. Where the tokenizer puts no start token, k
is 0 and a window is S tokens of text.

Evaluation predicts no start token. Training and gradients do not predict the first token of a
window. For k ≤ 1 this is the same; of two start tokens they predict the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import RecipeError
from secateur.models.tokenizer import Tokenizer, start_tokens, text_tokens
from secateur.types import Windows


@dataclass(frozen=True)
class WindowCutter:
    """Cuts windows of one length from the text of one tokenizer.

    Attributes:
        tokenizer: used with its default special tokens.
        start: the tokens that each window begins with.
        sequence_length: tokens in a window, the start tokens among them.
    """

    tokenizer: Tokenizer
    start: tuple[int, ...]
    sequence_length: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, sequence_length: int) -> WindowCutter:
        """A cutter for a tokenizer; encoding a text shows the start tokens.

        Raises:
            RecipeError: the start tokens leave no room for text.
        """
        start = start_tokens(tokenizer)
        if sequence_length <= len(start):
            raise RecipeError(
                f"windows of {sequence_length} tokens have no room for text: the tokenizer puts "
                f"{len(start)} in front of each",
                remedy=f"use a sequence length above {len(start)}",
            )
        return cls(tokenizer, start, sequence_length)

    @property
    def text_length(self) -> int:
        """Tokens of text in a window."""
        return self.sequence_length - len(self.start)

    def read(self, texts: list[str]) -> list[list[int]]:
        """The token ids of each text, without start tokens."""
        return text_tokens(self.tokenizer, texts, self.start)

    def places(self, tokens: int) -> list[int]:
        """The starts of windows that do not overlap, in a text of so many tokens."""
        return list(range(0, tokens - self.text_length + 1, self.text_length))

    def cut(self, stream: Sequence[int], places: Sequence[int]) -> Windows:
        """The windows whose text begins at these places of a stream of token ids.

        Returns:
            Token ids [places, sequence_length], int64.
        """
        length = self.text_length
        rows = [[*self.start, *stream[place : place + length]] for place in places]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, self.sequence_length)


def begins_with(windows: Windows, start: Sequence[int]) -> bool:
    """Whether every window begins with these tokens; True for no tokens.

    Example:
        >>> import torch
        >>> from secateur.calibration.cutting import begins_with
        >>> begins_with(torch.tensor([[1, 5, 6], [1, 7, 8]]), [1])
        True
    """
    head = torch.tensor(start, dtype=windows.dtype)
    return len(start) < windows.shape[1] and bool((windows[:, : len(start)] == head).all())


def without_start(windows: Windows, start: Sequence[int]) -> Tensor:
    """The text of windows, [windows, text]: without start tokens, if all windows have them."""
    return windows[:, len(start) :] if begins_with(windows, start) else windows
