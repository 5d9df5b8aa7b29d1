"""One threshold for a whole model, found exactly while only one matrix is in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from secateur.errors import NumericalError, PatternError, RecipeError
from secateur.sparsity.allocation import AllocationDefaults, DenseLayer, Kept, allocations
from secateur.sparsity.allocation.budget import Granularity

_BINS = 2**16
_INFINITY = 0x7F800000  # the bits of float32 infinity; those of NaN are above


@allocations.register("global")
@dataclass(frozen=True)
class GlobalThreshold(AllocationDefaults):
    """One threshold for the scores of all linears, with a floor and a cap for each.

    With n_i(θ) the number of scores of linear i at or below θ, linear i loses

        c_i = clip(n_i(θ), floor_i, cap_i)      floor_i, cap_i = (s ∓ reach) · size_i

    of them, for the one θ at which Σ c_i is the budget. Where a unit of one linear costs more than
    one of another (a KV group, a neuron), scores are divided by that cost and counts multiplied;
    what one unit cannot hit, `budget.settle` evens out. What a cap refuses, a lower threshold
    would have taken elsewhere; so it is found by moving the threshold, not by spreading a rest.

    Source: global magnitude pruning (Han et al. 2015, arXiv:1506.02626), whose single threshold
    collapses language models, since scores of different layers are not comparable. Deviation:
    floor and cap, a choice of ours. With a reach of 1 they bind nothing, and this is the plain
    global scope.

    Args:
        reach: how far the sparsity of a linear may differ from the target, from 0 to 1.

    Raises:
        RecipeError: the reach is out of range.
    """

    reach: Annotated[float, Field(ge=0, le=1)] = 0.15
    uses: ClassVar[frozenset[str]] = frozenset({"score"})

    def observe(self, layer: DenseLayer) -> dict[str, Tensor]:
        """The scores of each linear that compete, float32."""
        return {name: layer.score(name) for name in layer.weights}

    def allocate(
        self, kept: Kept, grains: Mapping[str, Granularity], sparsity: float
    ) -> dict[str, float]:
        """c_i / size_i; the scores are streamed three times."""
        sizes = {name: score.numel() for name, score in kept()}
        # How many weights a score stands for, in units of what all of them share.
        # A score is that of one weight, of a block, or of a unit whose removal costs more weights.
        worth = {name: max(1, g.total // sizes[name]) for name, g in grains.items()}
        shared = math.gcd(*worth.values())
        worth = {name: each // shared for name, each in worth.items()}
        budget = sum(g.uniform * g.weights for g in grains.values()) // shared
        bounds = {
            name: (
                math.ceil(grain.lowest * sizes[name] / grain.units),
                math.floor(grain.highest * sizes[name] / grain.units),
            )
            for name, grain in grains.items()
        }

        def by_worth() -> Iterator[tuple[str, Tensor]]:
            for name, score in kept():
                yield name, score / worth[name]

        counts = global_threshold(by_worth, budget, bounds, worth)
        return {name: count / sizes[name] for name, count in counts.items()}

    def disk_bytes(self, weights: int, itemsize: int) -> int:
        """Float32 scores."""
        return 4 * weights

    def working_bytes(self, weights: int, itemsize: int) -> int:
        """The scores that are kept of it."""
        return self.disk_bytes(weights, itemsize)


def global_threshold(
    scores: Callable[[], Iterable[tuple[str, Tensor]]],
    pruned: int,
    bounds: Mapping[str, tuple[int, int]] | None = None,
    worth: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """How many entries each tensor loses when the `pruned` smallest of all tensors are pruned.

    Of equal scores, those of the earlier tensor are pruned first. Within a tensor, pruning its
    count of lowest scores (lower index first, as the patterns do) completes the selection.

    The bits of non-negative float32 numbers, read as integers, are ordered as the numbers. The
    first pass counts the upper 16 bits of all scores and finds those of the threshold; the
    second counts the lower 16 bits among the scores that share them. Memory: the tensor at hand,
    and 512 KiB for each name.

    Args:
        scores: called twice; each time yields the same (name, score) pairs in the same order.
            Any shape, float32, >= 0: weights, or the sums over blocks (`Pattern.units`).
        pruned: how many entries to prune over all tensors.
        bounds: the least and the most entries each tensor loses, by name; None binds nothing.
            The threshold moves until the bounded counts add up to `pruned`.
        worth: what an entry of each tensor counts; None: 1. The entry that would exceed `pruned`
            stays, so that the sum may fall short by less than the largest worth.

    Returns:
        The number of entries to prune by name.

    Raises:
        PatternError: more is to be pruned than there is, or than the bounds allow.
        NumericalError: a score is negative or NaN, or the second pass saw other scores.
        RecipeError: two tensors have the same name.
    """
    sizes: dict[str, int] = {}
    upper: dict[str, Tensor] = {}
    for name, bits in _read(scores()):
        sizes[name] = len(bits)
        # 65 536 counters for each tensor: the scores themselves are not kept.
        upper[name] = _histogram(bits >> 16)
    worth = dict.fromkeys(sizes, 1) if worth is None else worth
    whole = sum(size * worth[name] for name, size in sizes.items())
    if not 0 <= pruned <= whole:
        raise PatternError(f"cannot prune {pruned} of {whole} weights")
    bounds = {name: (0, size) for name, size in sizes.items()} if bounds is None else bounds
    least, most = (sum(bounds[n][end] * worth[n] for n in sizes) for end in (0, 1))
    if not least <= pruned <= most:
        raise PatternError(
            f"cannot prune {pruned} weights within bounds that ask for {least} to {most}"
        )
    if not sizes:
        return {}
    shared, below = _located(upper, dict.fromkeys(sizes, 0), pruned, bounds, worth)

    lower: dict[str, Tensor] = {}
    for name, bits in _read(scores()):
        histogram = _histogram(bits >> 16)
        # A cheap proof that both passes saw the same scores.
        if name not in upper or not torch.equal(histogram, upper[name]):
            break
        # Only scores that share the upper half of the threshold can lie on either side of it.
        lower[name] = _histogram(bits[bits >> 16 == shared] & (_BINS - 1))
    if list(lower) != list(sizes):
        raise NumericalError(
            "the scores changed between the two passes of the global selection",
            remedy="score the same weights with the same calibration both times",
        )
    threshold, below = _located(lower, below, pruned, bounds, worth)
    counts = {n: min(max(below[n], bounds[n][0]), bounds[n][1]) for n in sizes}
    # All scores below the threshold are gone; of those that equal it, the rest goes in this order.
    ties = pruned - sum(count * worth[name] for name, count in counts.items())
    for name, histogram in lower.items():
        most = min(below[name] + int(histogram[threshold]), bounds[name][1])
        equal = min(max(most - counts[name], 0), ties // worth[name])
        counts[name] += equal
        ties -= equal * worth[name]
    return counts


def _located(
    histograms: Mapping[str, Tensor],
    below: Mapping[str, int],
    pruned: int,
    bounds: Mapping[str, tuple[int, int]],
    worth: Mapping[str, int],
) -> tuple[int, dict[str, int]]:
    """The first bin at whose end at least `pruned` is pruned within the bounds.

    Args:
        histograms: counts by bin of each tensor.
        below: entries of each tensor below all bins.
        pruned: how many to prune.
        bounds: the least and the most entries of each tensor.
        worth: what an entry of each tensor counts.

    Returns:
        The bin, and the entries of each tensor below it.
    """
    # What is pruned altogether if the threshold is at the end of each bin.
    total = torch.zeros(_BINS, dtype=torch.int64)
    for name, histogram in histograms.items():
        reached = histogram.cumsum(0, dtype=torch.int64) + below[name]
        total += reached.clamp_(*bounds[name]) * worth[name]
    held = int(torch.searchsorted(total, pruned))
    return held, {n: below[n] + int(h[:held].sum()) for n, h in histograms.items()}


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
    """Counts of the numbers 0 … 65535, int32, on the CPU."""
    return torch.bincount(values, minlength=_BINS).int().cpu()
