"""Decodes one sequence, token by token, with the loop that also decodes several (`slots.py`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

from jaxtyping import Float, Int64
from torch import Tensor

from secateur.errors import ShapeError
from secateur.runtime.sampling import Sampling
from secateur.runtime.slots import SlotDecoder, Token

GREEDY = Sampling()


class Decoder:
    """Decodes one sequence, token by token.

    Args:
        model: a transformers model in eval mode, from `secateur.load` or plain.
        capacity: the number of tokens that fit in the cache.
        continues: whether a prompt that begins like the text before, as in a conversation, is read
            only from where it differs.

    Raises:
        ArchitectureError: the model is not of Llama's shape; `slots.why_not` gives the reason.
    """

    def __init__(self, model: Any, capacity: int, *, continues: bool = False) -> None:
        self.slots = SlotDecoder(model, capacity)
        self.capacity, self.continues = capacity, continues
        self.text: list[int] = []

    @property
    def length(self) -> int:
        """How many tokens are in the cache."""
        return self.slots.lengths[0]

    def prefill(self, ids: Int64[Tensor, " tokens"]) -> Float[Tensor, " vocabulary"]:
        """Start anew with a prompt; returns the logits after its last token, float32.

        Raises:
            ShapeError: the prompt is empty, longer than the cache, or not in the vocabulary.
        """
        if not 1 <= len(ids) <= self.capacity:
            raise ShapeError(f"a prompt of {len(ids)} tokens, for a cache of {self.capacity}")
        text = ids.tolist()
        self.slots.rewind(0, self.known(text) if self.continues else 0)
        logits = self.slots.read(0, ids[self.length :])[0]
        self.text = text
        return logits

    def known(self, text: Sequence[int]) -> int:
        """How many tokens of a prompt are in the cache; at least its last one is read."""
        limit = min(self.length, len(self.text), len(text) - 1)
        return next((n for n in range(limit) if text[n] != self.text[n]), limit)

    def step(self, token: int) -> Float[Tensor, " vocabulary"]:
        """Process one token; returns the logits of the next, float32.

        Raises:
            ShapeError: the cache is full, or the token is not in the vocabulary.
            KernelError: memory ran out.
        """
        logits = self.slots.step([Token(0, self.length, token)])[0]
        self.text.append(token)
        return logits


class TokenSteps(Protocol):
    """What computes one sequence: `Decoder` or `SteppedGeneration`."""

    def prefill(self, ids: Int64[Tensor, " tokens"]) -> Float[Tensor, " vocabulary"]:
        """Start anew with a prompt; returns the logits after its last token."""

    def step(self, token: int) -> Float[Tensor, " vocabulary"]:
        """Process one token; returns the logits of the next."""


def continued(
    steps: TokenSteps,
    ids: Int64[Tensor, " tokens"],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Yield the tokens that follow a prompt, one by one.

    Args:
        steps: computes them.
        ids: the prompt.
        max_new_tokens: the limit.
        sampling: how tokens are drawn; the most likely one by default.
        stop: tokens that end the text; they are not yielded.

    Raises:
        ShapeError: prompt and new tokens do not fit.
    """
    draws = sampling.begin(ids.tolist())
    logits = steps.prefill(ids)
    for number in range(max_new_tokens):
        token = draws.draw(logits)
        if token in stop:
            return
        yield token
        if number + 1 < max_new_tokens:
            logits = steps.step(token)
