"""The divergence between the predictions of two models, and its gradient, for every token.

Let z be the logits of the student, q = softmax(z / T), and p the teacher's distribution at the
same temperature T. All losses are per token and multiplied by T²:

    forward    KL(p ‖ q) = Σ p (log p − log q)         gradient T (q − p)
    reverse    KL(q ‖ p) = Σ q (log q − log p)         gradient T q (log q − log p − KL(q ‖ p))
    symmetric  half of each

Forward KL makes the student cover every token that the teacher could choose. Reverse KL
concentrates it on the teacher's likely tokens. The factor T² keeps the gradients as large as at
T = 1. Papers: Hinton et al. 2015, arXiv:1503.02531 (forward, T²);
Gu et al. 2023, "MiniLLM", arXiv:2306.08543 (reverse). Everything is in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

KINDS = ("forward", "reverse", "symmetric")
LEAST = -1e4
"""Replaces log p of impossible tokens, so that 0 · log 0 is 0. Its exponential is 0 in float32."""


class Rows(Protocol):
    """Computes the loss of some tokens from their logits."""

    def __call__(self, rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum over these tokens divided by the number of all tokens, and its gradient.

        Args:
            rows: which tokens of the batch.
            logits: float32 [tokens, vocabulary]; may be overwritten.
        """
        ...


def next_token_rows(targets: Tensor, count: int) -> Rows:
    """−log q of the next token: the usual loss of language models.

    Args:
        targets: the next token of each; −100 where there is none.
        count: number of tokens that have a next token.

    Example:
        >>> import torch
        >>> from secateur.training.divergences import next_token_rows
        >>> rows = next_token_rows(torch.tensor([0]), count=1)
        >>> rows(slice(0, 1), torch.zeros(1, 2))
        (tensor(0.6931), tensor([[-0.5000,  0.5000]]))
    """

    def of(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        tokens = targets[rows]
        there = tokens >= 0
        places = tokens.clamp(min=0)[:, None]
        log_q = logits.log_softmax(-1)
        loss = -(log_q.gather(1, places)[:, 0] * there).sum()
        gradient = log_q.exp_()
        gradient.scatter_add_(1, places, gradient.new_full(places.shape, -1.0))
        gradient.mul_((there / count)[:, None])
        return loss / count, gradient

    return of


def divergence_rows(
    kind: str, temperature: float, count: int, expected: Callable[[slice, Tensor], Tensor]
) -> Rows:
    """The divergence of the student from the teacher.

    Args:
        kind: forward, reverse or symmetric.
        temperature: T.
        count: number of all tokens.
        expected: rows and log q → log p, float32 [tokens, vocabulary]. Where only a part of p is
            known, the remaining probability may be distributed as in q. The gradients then equal
            those of the divergence that treats all remaining tokens as one outcome.
    """

    def of(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        log_q = logits.div_(temperature).log_softmax(-1).clamp_(min=LEAST)
        log_p = expected(rows, log_q).clamp_(min=LEAST)
        apart = log_q - log_p
        p, q = log_p.exp_(), log_q.exp_()
        if kind == "forward":
            loss = -torch.dot(p.flatten(), apart.flatten())
            gradient = q.sub_(p)
        else:
            each = apart.mul_(q) if kind == "reverse" else apart * q
            sums = each.sum(-1, keepdim=True)
            loss, gradient = sums.sum(), each.addcmul_(q, sums, value=-1.0)
            if kind == "symmetric":
                loss = (loss - torch.dot(p.flatten(), apart.flatten())) / 2
                gradient = gradient.add_(q.sub_(p)).div_(2)
        return loss * (temperature**2 / count), gradient.mul_(temperature / count)

    return of
