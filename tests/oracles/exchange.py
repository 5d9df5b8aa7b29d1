"""Masks in training, weight by weight."""

from __future__ import annotations

from torch import Tensor


def exchanged(
    score: Tensor, kept: Tensor, gradient: Tensor, pruned: int, given_up: int
) -> list[list[bool]]:
    """Of one matrix: prune to so many zeros by score, give up so many more, regrow by gradient.

    Ties must not occur.
    """
    rows, columns = score.shape
    places = [(i, j) for i in range(rows) for j in range(columns)]
    alive = [p for p in places if bool(kept[p])]
    by_score = sorted(alive, key=lambda p: float(score[p]), reverse=True)
    survivors = by_score[: len(places) - pruned - given_up]
    others = [p for p in places if p not in survivors]
    by_gradient = sorted(others, key=lambda p: abs(float(gradient[p])), reverse=True)
    grown = by_gradient[:given_up]
    return [[(i, j) in survivors or (i, j) in grown for j in range(columns)] for i in range(rows)]
