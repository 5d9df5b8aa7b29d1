"""Exact counts and patterns, with Python's own sort."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


def nearest_count(total: int, sparsity: float) -> int:
    """The whole number nearest to sparsity · total, halves up, of the decimal as written."""
    return math.floor(Fraction(repr(sparsity)) * total + Fraction(1, 2))


def keep(scores: list[float], pruned: int) -> list[bool]:
    """Prune the first `pruned` in the order of (score, index)."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    gone = set(order[:pruned])
    return [i not in gone for i in range(len(scores))]


def unstructured(score: Tensor, pruned: int) -> Tensor:
    """All weights of the matrix compete."""
    return torch.tensor(keep(score.flatten().tolist(), pruned)).reshape(score.shape)


def per_row(score: Tensor, pruned: int) -> Tensor:
    """The weights of each row compete."""
    return torch.tensor([keep(row, pruned) for row in score.tolist()])


def n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    """Of every m consecutive weights of a row, n are kept."""
    rows = []
    for row in score.tolist():
        kept: list[bool] = []
        for start in range(0, len(row), m):
            kept += keep(row[start : start + m], m - n)
        rows.append(kept)
    return torch.tensor(rows)


def block(score: Tensor, rows: int, columns: int, pruned: int) -> Tensor:
    """Blocks compete by the sum of their scores."""
    places = [
        (i, j) for i in range(0, score.shape[0], rows) for j in range(0, score.shape[1], columns)
    ]
    sums = [float(score[i : i + rows, j : j + columns].sum()) for i, j in places]
    mask = torch.ones(score.shape, dtype=torch.bool)
    for (i, j), kept in zip(places, keep(sums, pruned), strict=True):
        mask[i : i + rows, j : j + columns] = kept
    return mask


def whole_columns(score: Tensor, width: int, multiple: int, sparsity: float) -> Tensor:
    """Groups of columns compete by the size of the sum of all their scores."""
    groups = score.shape[1] // width
    return fewest_columns(score, width, multiple * nearest_count(groups // multiple, sparsity))


def fewest_columns(score: Tensor, width: int, pruned: int) -> Tensor:
    """The groups of columns that count least go."""
    groups = score.shape[1] // width
    sums = [abs(float(score[:, i * width : (i + 1) * width].sum())) for i in range(groups)]
    mask = torch.ones(score.shape, dtype=torch.bool)
    for i, kept in enumerate(keep(sums, pruned)):
        mask[:, i * width : (i + 1) * width] = kept
    return mask


def mask_of(text: str, scope: str | None, score: Tensor, sparsity: float) -> Tensor:
    """The mask of a pattern as it is written in a recipe."""
    out, columns = score.shape
    if ":" in text:
        n, m = map(int, text.split(":"))
        return n_of_m(score, n, m)
    if text.startswith("*x"):
        if "@" in text:
            width, among = map(int, text.removeprefix("*x").split("@"))
            parts = score.split(width * among, dim=1)
            return torch.cat([whole_columns(part, width, 1, sparsity) for part in parts], dim=1)
        width, _, multiple = text.removeprefix("*x").partition("/")
        return whole_columns(score, int(width), int(multiple or 1), sparsity)
    if "x" in text:
        r, c = map(int, text.split("x"))
        return block(score, r, c, nearest_count((out // r) * (columns // c), sparsity))
    if scope == "row":
        return per_row(score, nearest_count(columns, sparsity))
    return unstructured(score, nearest_count(out * columns, sparsity))
