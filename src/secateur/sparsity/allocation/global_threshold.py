"""One threshold for a whole model, found exactly while only one matrix is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from secateur.errors import NumericalError, PatternError, RecipeError

__all__ = ["global_threshold"]

_BINS = 2**16
_INFINITY = 0x7F800000  # the bits of float32 infinity; those of NaN are above


def global_threshold(
    scores: Callable[[], Iterable[tuple[str, Tensor]]], pruned: int
) -> dict[str, int]:
    """How many entries each tensor loses when the `pruned` smallest of all tensors are pruned.

    Of equal scores, those of the earlier tensor are pruned first. Within a tensor, pruning its
    count of lowest scores (lower index first, as the patterns do) completes the selection.

    The bits of non-negative float32 numbers, read as integers, are ordered as the numbers. The
    first pass counts the upper 16 bits of all scores and finds those of the threshold; the
    second counts the lower 16 bits among the scores that share them. Memory: the tensor at hand,
    and 256 KiB for each name.

    Args:
        scores: called twice; each time yields the same (name, score) pairs in the same order.
            Any shape, float32, >= 0: weights, or the sums over blocks (`Pattern.units`).
        pruned: how many entries to prune over all tensors.

    Returns:
        The number of entries to prune by name.

    Raises:
        PatternError: more is to be pruned than there is.
        NumericalError: a score is negative or NaN, or the second pass saw other scores.
        RecipeError: two tensors have the same name.
    """
    sizes: dict[str, int] = {}
    upper = torch.zeros(_BINS, dtype=torch.int64)
    for name, bits in _read(scores()):
        sizes[name] = len(bits)
        upper += _histogram(bits >> 16)
    if not 0 <= pruned <= sum(sizes.values()):
        raise PatternError(f"cannot prune {pruned} of {sum(sizes.values())} weights")
    if pruned == 0:
        return dict.fromkeys(sizes, 0)
    shared, left = _locate(upper, pruned)

    below: dict[str, int] = {}
    lower: dict[str, Tensor] = {}
    seen = torch.zeros_like(upper)
    for name, bits in _read(scores()):
        histogram = _histogram(bits >> 16)
        seen += histogram
        below[name] = int(histogram[:shared].sum())
        lower[name] = _histogram(bits[bits >> 16 == shared] & (_BINS - 1)).int()
    if list(below) != list(sizes) or not torch.equal(seen, upper):
        raise NumericalError(
            "the scores changed between the two passes of the global selection",
            remedy="score the same weights with the same calibration both times",
        )
    threshold, ties = _locate(torch.stack(list(lower.values())).sum(0), left)
    for name, histogram in lower.items():
        equal = min(int(histogram[threshold]), ties)
        ties -= equal
        below[name] += int(histogram[:threshold].sum()) + equal
    return below


def _read(scores: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The bits of every score tensor, flat int32, checked to be ordered as the scores are."""
    names: set[str] = set()
    for name, score in scores:
        if name in names:
            raise RecipeError(f"two score tensors are named {name!r}")
        names.add(name)
        bits = score.detach().float().reshape(-1).view(torch.int32)
        if len(bits) and int(bits.min()) < 0:  # a sign bit; adding 0 turns -0.0 into 0.0
            bits = (score.detach().float().reshape(-1) + 0.0).view(torch.int32)
        if len(bits) and not 0 <= int(bits.min()) <= int(bits.max()) <= _INFINITY:
            raise NumericalError(
                "a score is negative or not a number, so that it has no place in a global order",
                where=name,
                remedy="use a score that is >= 0, and look for NaN in weights and calibration",
            )
        yield name, bits


def _histogram(values: Tensor) -> Tensor:
    """Counts of the numbers 0 … 65535, int64, on the CPU."""
    return torch.bincount(values, minlength=_BINS).cpu()


def _locate(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the `rank`-th smallest entry (from 1), and its rank within that bin."""
    cumulative = histogram.cumsum(0)
    held = int(torch.searchsorted(cumulative, rank))
    return held, rank - int(cumulative[held] - histogram[held])
