"""How the next token is drawn from the logits: for `generate`, `chat` and `serve` alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.errors import RecipeError

MAX_SEED = 2**63 - 1
"""The largest seed of a torch generator."""

FIRST_LOOK = 1024
"""Most draws need only this many of the most likely tokens; sorting all of them takes longer."""


@dataclass(frozen=True)
class Sampling:
    """Temperature, top-k, top-p and min-p sampling, and penalties for tokens that occurred.

    Penalties come first. The repetition penalty r divides the positive logits of all tokens of
    prompt and text by r, and multiplies the negative ones (Keskar et al., CTRL, arXiv 1909.05858).
    The presence penalty is subtracted from the logits of tokens of the text, and the frequency
    penalty once for each time that they occurred (OpenAI's API).

    Temperature 0 takes the most likely token. Above 0 the probabilities are softmax(logits / T).
    Top-k keeps the k most likely tokens. Top-p then keeps the fewest of the most likely tokens
    whose probabilities sum to at least p (Holtzman et al., The Curious Case of Neural Text
    Degeneration, ICLR 2020, arXiv 1904.09751). Min-p keeps tokens of at least p times the largest
    probability (Nguyen et al., Turning Up the Heat, ICLR 2025, arXiv 2407.01082). The rest is never
    drawn.

    Args:
        temperature: 0 or more.
        top_k: how many tokens may be drawn; None for all.
        top_p: the probability that they must have together, above 0 and at most 1.
        seed: of the draw.
        min_p: the share of the largest probability that a token needs, 0 to 1.
        repetition_penalty: above 0; 1 changes nothing.
        presence_penalty: any number; 0 changes nothing.
        frequency_penalty: any number; 0 changes nothing.

    Raises:
        RecipeError: a number is out of range; NaN and infinity are.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        finite, inf = "a finite number", math.inf
        repetition, presence = self.repetition_penalty, self.presence_penalty
        frequency = self.frequency_penalty
        checks = (
            ("--temperature", self.temperature, 0 <= self.temperature < inf, "a number 0 or more"),
            ("--top-k", self.top_k, self.top_k is None or self.top_k >= 1, "a number 1 or more"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "a number above 0 and at most 1"),
            ("--seed", self.seed, 0 <= self.seed <= MAX_SEED, "a number from 0 to 2⁶³ − 1"),
            ("--min-p", self.min_p, 0 <= self.min_p <= 1, "a number from 0 to 1"),
            ("--repetition-penalty", repetition, 0 < repetition < inf, "a number above 0"),
            ("--presence-penalty", presence, math.isfinite(presence), finite),
            ("--frequency-penalty", frequency, math.isfinite(frequency), finite),
        )
        for option, value, right, allowed in checks:
            if not right:
                raise RecipeError(
                    f"{option} {value} is out of range", where=option, remedy=f"give {allowed}"
                )

    def begin(self, prompt: Sequence[int] = ()) -> Draws:
        """The draws of one text.

        Args:
            prompt: its tokens, which the repetition penalty counts.
        """
        return Draws(self, prompt)


class Draws:
    """Draws the tokens of one text, and remembers them for the penalties.

    Args:
        sampling: how tokens are drawn.
        prompt: the tokens before the text.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.prompt, self.text = list(prompt), list[int]()

    def draw(self, logits: Float[Tensor, " vocabulary"]) -> int:
        """The next token.

        Args:
            logits: float32, of all tokens.
        """
        logits = self.penalised(logits)
        token = int(logits.argmax()) if self.sampling.temperature == 0 else self.chosen(logits)
        self.text.append(token)
        return token

    def penalised(self, logits: Float[Tensor, " vocabulary"]) -> Float[Tensor, " vocabulary"]:
        """The logits after all penalties; the argument stays as it is."""
        s = self.sampling
        if s.repetition_penalty != 1:
            seen = torch.tensor(sorted({*self.prompt, *self.text}), dtype=torch.long)
            found = logits[seen]
            logits = logits.clone()
            logits[seen] = torch.where(
                found > 0, found / s.repetition_penalty, found * s.repetition_penalty
            )
        if self.text and (s.presence_penalty or s.frequency_penalty):
            seen, counts = torch.tensor(self.text).unique(return_counts=True)
            logits = logits.clone()
            logits[seen] -= s.presence_penalty + s.frequency_penalty * counts
        return logits

    def chosen(self, logits: Float[Tensor, " vocabulary"]) -> int:
        """A token by its probability among those that may be drawn."""
        s = self.sampling
        chances = (logits / s.temperature).softmax(-1)
        if s.top_k is None and s.top_p >= 1 and s.min_p == 0:
            return int(torch.multinomial(chances, 1, generator=self.generator))
        ordered, tokens = self.likeliest(chances)
        if s.top_k is not None:
            ordered, tokens = ordered[: s.top_k], tokens[: s.top_k]
            ordered = ordered / ordered.sum()
        # the probability of all tokens before this one: the first is always kept
        kept = ordered.cumsum(-1) - ordered < s.top_p
        kept &= ordered >= s.min_p * ordered[0]
        number = torch.multinomial(ordered[: int(kept.sum())], 1, generator=self.generator)
        return int(tokens[number])

    def likeliest(self, chances: Float[Tensor, " vocabulary"]) -> tuple[Tensor, Tensor]:
        """Probabilities in descending order and their tokens, as many as may be needed."""
        s = self.sampling
        if len(chances) > FIRST_LOOK and (s.top_k is None or s.top_k <= FIRST_LOOK):
            ordered, tokens = chances.topk(FIRST_LOOK)
            enough = s.top_k is not None or float(ordered.sum()) > s.top_p
            if enough or float(ordered[-1]) < s.min_p * float(ordered[0]):
                return ordered, tokens
        ordered, tokens = chances.sort(descending=True, stable=True)
        return ordered, tokens
