"""Pair swaps, one at a time: every error is computed from its definition."""

from __future__ import annotations

from torch import Tensor


def row_error(weight: list[float], kept: list[bool], gram: list[list[float]]) -> float:
    """‖(w − ŵ)X‖² of one row whose pruned weights are zero."""
    lost = [(j, w) for j, (w, k) in enumerate(zip(weight, kept, strict=True)) if not k]
    return sum(a * b * gram[i][j] for i, a in lost for j, b in lost)


def best_swap(
    weight: list[float], kept: list[bool], gram: list[list[float]], group: int
) -> tuple[float, int, int]:
    """The least error one swap can reach, and the columns it prunes and restores.

    Only weights of the same `group` consecutive ones are swapped. Without any swap the error is
    infinite.
    """
    best = (float("inf"), -1, -1)
    for p in range(len(weight)):
        for q in range(len(weight)):
            if kept[p] and not kept[q] and p // group == q // group:
                swapped = list(kept)
                swapped[p], swapped[q] = False, True
                best = min(best, (row_error(weight, swapped, gram), p, q))
    return best


def swap_down(weight: Tensor, mask: Tensor, gram: Tensor, group: int, swaps: int) -> Tensor:
    """The mask after the best swap of each row, again and again while the error falls."""
    g, refined = gram.double().tolist(), mask.clone()
    for i, row in enumerate(weight.double().tolist()):
        kept = mask[i].tolist()
        for _ in range(swaps):
            error, p, q = best_swap(row, kept, g, group)
            if error >= row_error(row, kept, g) * (1 - 1e-5):
                break
            kept[p], kept[q] = False, True
            refined[i, p], refined[i, q] = False, True
    return refined


def row_errors(weight: Tensor, mask: Tensor, gram: Tensor) -> list[float]:
    """The error of every row."""
    g = gram.double().tolist()
    rows = zip(weight.double().tolist(), mask.tolist(), strict=True)
    return [row_error(row, kept, g) for row, kept in rows]
