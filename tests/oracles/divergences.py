"""Losses of training by their definitions, in float64 and by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """mean −log q(next); logits [windows, length, vocabulary]."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for window, row in zip(logits.double(), ids, strict=True):
        for place in range(len(row) - 1):
            total = total - window[place].softmax(-1)[row[place + 1]].log()
            count += 1
    return total / count


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Σ p log(p / q) of two distributions."""
    return (p * (p / q).log()).sum()


def divergence(logits: Tensor, wanted: Tensor, kind: str, temperature: float) -> Tensor:
    """T² mean_t of the divergence; logits [tokens, vocabulary]."""
    total = torch.zeros((), dtype=torch.float64)
    for z, w in zip(logits.double(), wanted.double(), strict=True):
        q, p = (z / temperature).softmax(-1), (w / temperature).softmax(-1)
        total = total + of_kind(p, q, kind)
    return temperature**2 * total / len(logits)


def of_kind(p: Tensor, q: Tensor, kind: str) -> Tensor:
    """One divergence."""
    if kind == "total_variation":
        return (p - q).abs().sum() / 2
    each = {"forward": kl(p, q), "reverse": kl(q, p)}
    return each[kind] if kind in each else (each["forward"] + each["reverse"]) / 2


def lumped_divergence(
    logits: Tensor, wanted: Tensor, k: int, kind: str, temperature: float
) -> Tensor:
    """The same where all but the teacher's k most likely tokens are one outcome."""
    total = torch.zeros((), dtype=torch.float64)
    for z, w in zip(logits.double(), wanted.double(), strict=True):
        q, p = (z / temperature).softmax(-1), (w / temperature).softmax(-1)
        most = p.topk(k).indices.tolist()
        lump = [torch.stack([*(x[i] for i in most), 1 - sum(x[i] for i in most)]) for x in (p, q)]
        total = total + of_kind(*lump, kind)
    return temperature**2 * total / len(logits)
