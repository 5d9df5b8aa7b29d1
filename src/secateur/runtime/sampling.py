"""How the next token is drawn from the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.errors import RecipeError

__all__ = ["MAX_SEED", "Sampling"]

MAX_SEED = 2**63 - 1
"""The largest seed of a torch generator."""


@dataclass(frozen=True)
class Sampling:
    """Temperature, top-k and top-p (nucleus) sampling.

    Temperature 0 takes the most likely token. Above 0 the probabilities are softmax(logits / T).
    Top-k keeps the k most likely tokens. Top-p then keeps the fewest of the most likely tokens
    whose probabilities sum to at least p (Holtzman et al., The Curious Case of Neural Text
    Degeneration, ICLR 2020, arXiv 1904.09751). The rest is never drawn.

    Args:
        temperature: 0 or more.
        top_k: how many tokens may be drawn; None for all.
        top_p: the probability that they must have together, above 0 and at most 1.
        seed: of the draw.

    Raises:
        RecipeError: a number is out of range; NaN and infinity are.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("--temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
            ("--top-k", self.top_k, self.top_k is None or self.top_k >= 1, "1 or more"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--seed", self.seed, 0 <= self.seed <= MAX_SEED, "from 0 to 2⁶³ − 1"),
        )
        for option, value, right, allowed in checks:
            if not right:
                raise RecipeError(
                    f"{option} {value} is out of range",
                    where=option,
                    remedy=f"give a number {allowed}",
                )

    def generator(self) -> torch.Generator:
        """A generator of random numbers that begins at the seed."""
        return torch.Generator().manual_seed(self.seed)

    def draw(self, logits: Float[Tensor, " vocabulary"], generator: torch.Generator) -> int:
        """The next token.

        Args:
            logits: float32, of all tokens.
            generator: the source of the draw; not used at temperature 0.
        """
        if self.temperature == 0:
            return int(logits.argmax())
        chances = (logits / self.temperature).softmax(-1)
        if self.top_k is None and self.top_p >= 1:
            return int(torch.multinomial(chances, 1, generator=generator))
        ordered, tokens = chances.sort(descending=True, stable=True)
        if self.top_k is not None:
            ordered, tokens = ordered[: self.top_k], tokens[: self.top_k]
            ordered = ordered / ordered.sum()
        # the probability of all tokens before this one: the first is always kept
        kept = int((ordered.cumsum(-1) - ordered < self.top_p).sum())
        return int(tokens[torch.multinomial(ordered[:kept], 1, generator=generator)])
