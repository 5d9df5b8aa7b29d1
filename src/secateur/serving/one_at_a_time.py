"""An engine for models that our own loop does not take: one sequence, through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.errors import ShapeError
from secateur.runtime.decode import SteppedGeneration, Token


class TransformersEngine:
    """One slot, decoded by transformers' `generate`. It keeps no prefixes and reads whole prompts.

    Args:
        model: a transformers causal language model in eval mode.
        capacity: the number of tokens that fit.

    Attributes:
        lengths: how many tokens the slot has.
        together: 1.
    """

    together = 1

    def __init__(self, model: Any, capacity: int) -> None:
        self.steps = SteppedGeneration(model)
        self.capacity, self.lengths = capacity, [0]

    def read(self, slot: int, ids: Tensor, *, every: bool = False) -> Tensor:
        """Read a whole prompt; returns the logits after it, or after each token [kept, vocabulary].

        The logits of all tokens need a forward of their own, because `generate` has only the last.
        """
        if self.lengths[slot]:
            raise ShapeError("a prompt has to be read at once")
        logits = self.steps.prefill(ids)[None]
        self.lengths[slot] = len(ids)
        if every:
            with torch.inference_mode():
                out = self.steps.model(input_ids=ids[None].to(self.steps.model.device))
            logits = torch.cat((out.logits[0, :-1].float().cpu(), logits))
        return logits

    def step(self, tokens: Sequence[Token]) -> Tensor:
        """Append one token; returns the logits after it [1, vocabulary]."""
        (token,) = tokens
        if not self.lengths[token.slot]:  # a prompt of one token
            return self.read(token.slot, torch.tensor([token.id]))
        logits = self.steps.step(token.id)
        self.lengths[token.slot] += 1
        return logits[None]

    def rewind(self, slot: int, length: int = 0) -> None:
        """Forget all tokens."""
        if length:
            raise ShapeError(f"cannot go back to {length} tokens")
        self.steps.close()
        self.lengths[slot] = 0

    def copy_out(self, slot: int, begin: int, end: int) -> Tensor:
        """Not possible: keys and values are inside of transformers."""
        raise ShapeError("keys and values cannot be copied")

    def copy_in(self, slot: int, known: Tensor) -> None:
        """Not possible."""
        raise ShapeError("keys and values cannot be copied")
