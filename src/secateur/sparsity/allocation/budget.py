"""The budget: every allocation removes exactly as many weights as uniform sparsity."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from secateur.errors import RecipeError

_BLENDS = (1.0, 0.75, 0.5, 0.25, 0.0)  # shares of the proposal; the rest is uniform
_SNAP = 1e-6  # of a unit: a share within this of a whole number counts as that number


class Granularity(NamedTuple):
    """How finely, and how far, a linear can be pruned.

    Attributes:
        units: in how many units it is pruned: columns (scope row), weights, or blocks.
        weights: weights in a unit.
        uniform: units that uniform sparsity prunes.
        lowest: units that must be pruned, at most `uniform`.
        highest: units that may be pruned, at least `uniform`.
    """

    units: int
    weights: int
    uniform: int
    lowest: int
    highest: int

    @classmethod
    def around(
        cls, shape: tuple[int, int], step: int, pruned: int, sparsity: float, reach: float
    ) -> Granularity:
        """The granularity of a matrix whose sparsity may differ from the target by `reach`.

        Args:
            shape: (out, in).
            step: weights in a unit, `Pattern.step(shape)`.
            pruned: weights that uniform sparsity prunes, `Pattern.pruned(shape, sparsity)`.
            sparsity: the target.
            reach: how far the sparsity may differ from it. Nothing is pruned whole unless the reach
                is 1 or more.
        """
        units, uniform = shape[0] * shape[1] // step, pruned // step
        # _SNAP: 0.07 · 100 is 7.000000000000001, and must not round up to 8.
        low = math.ceil(max(0.0, sparsity - reach) * units - _SNAP)
        high = math.floor(min(1.0, sparsity + reach) * units + _SNAP)
        if reach < 1:
            high = min(high, units - 1)
        return cls(units, step, uniform, min(low, uniform), max(high, uniform))

    @property
    def total(self) -> int:
        """Weights of the matrix."""
        return self.units * self.weights


def settle(proposed: Mapping[str, float], grains: Mapping[str, Granularity]) -> dict[str, float]:
    """The sparsities nearest to the proposed ones that prune exactly the uniform budget.

    The same t shifts all proposals, within the bounds of each linear, until their sum is the
    budget:  Σ clip(proposed_i + t, lowest_i, highest_i) · weights_i = Σ uniform_i. Then the largest
    remainder rounds them to whole units. If units have several sizes (scope row) and a rest
    remains, the fewest units that cancel it are added and removed. If no such units are free, the
    proposal moves towards uniform, which always fits.

    Args:
        proposed: a sparsity for each linear in `grains`.
        grains: how finely each linear can be pruned, by name.

    Returns:
        The sparsity of each linear; `pattern.pruned(shape, sparsity)` adds up to the budget.

    Raises:
        RecipeError: a proposal is missing, is no number, or is for an unknown linear.

    Example:
        >>> from secateur.sparsity.allocation.budget import Granularity, settle
        >>> grain = Granularity.around((4, 8), 1, 16, 0.5, 0.3)
        >>> settle({"q_proj": 0.4, "k_proj": 0.5}, {"q_proj": grain, "k_proj": grain})
        {'q_proj': 0.4375, 'k_proj': 0.5625}
    """
    unknown = sorted(set(proposed) ^ set(grains))
    if unknown or not all(math.isfinite(share) for share in proposed.values()):
        raise RecipeError(
            f"the allocation gives no sparsity for {unknown[0]!r}"
            if unknown
            else "the allocation gives a sparsity that is not a number",
            remedy="this is a fault of the allocation or its plug-in",
        )
    names, ordered = list(grains), list(grains.values())
    proposals = [proposed[name] for name in names]
    for blend in _BLENDS:  # ends: uniform itself is whole units within all bounds
        shares = [
            blend * proposal + (1 - blend) * grain.uniform / grain.units
            for proposal, grain in zip(proposals, ordered, strict=True)
        ]
        counts = _whole(_shifted(shares, ordered), ordered)
        if counts is not None:
            break
    else:
        counts = [grain.uniform for grain in ordered]
    return {
        name: count / grain.units for name, grain, count in zip(names, ordered, counts, strict=True)
    }


def _budget(grains: Sequence[Granularity]) -> int:
    """Weights that uniform sparsity prunes."""
    return sum(grain.uniform * grain.weights for grain in grains)


def _shifted(shares: Sequence[float], grains: Sequence[Granularity]) -> list[float]:
    """The units of each linear after the shift that meets the budget; not whole numbers."""

    def moved(shift: float) -> list[float]:
        return [
            float(min(max((share + shift) * g.units, g.lowest), g.highest))
            for share, g in zip(shares, grains, strict=True)
        ]

    # With these shifts every linear is at its lowest, or at its highest. 100 halvings leave less
    # than the last bit of a double.
    budget, low, high = _budget(grains), -1 - max(shares), 2 - min(shares)
    for _ in range(100):
        middle = (low + high) / 2
        # The total rises with the shift, so the shift is found by halving.
        total = sum(x * g.weights for x, g in zip(moved(middle), grains, strict=True))
        low, high = (middle, high) if total < budget else (low, middle)
    return moved(high)


def _whole(targets: Sequence[float], grains: Sequence[Granularity]) -> list[int] | None:
    """Whole units near the targets that prune exactly the budget, or None."""
    counts = [math.floor(target + _SNAP) for target in targets]
    rest = _budget(grains) - sum(c * g.weights for c, g in zip(counts, grains, strict=True))
    # Largest remainder: the linear that rounding down has robbed most is first.
    by_remainder = sorted(range(len(counts)), key=lambda i: counts[i] - targets[i])
    for i in by_remainder:
        if grains[i].weights <= rest and counts[i] < grains[i].highest:
            counts[i] += 1
            rest -= grains[i].weights
    # A rest remains where units have several sizes, or where bounds stopped the rounding.
    for move in _route(rest, sorted({g.weights for g in grains})):
        # A removal makes room for an addition of another size; the nearest to its target moves.
        sign = 1 if move > 0 else -1
        free = [
            i
            for i, g in enumerate(grains)
            if g.weights == abs(move) and g.lowest <= counts[i] + sign <= g.highest
        ]
        if not free:
            return None
        i = max(free, key=lambda i: sign * (targets[i] - counts[i]) / grains[i].units)
        counts[i] += sign
        rest -= move
    return counts if rest == 0 else None


def _route(rest: int, sizes: Sequence[int]) -> list[int]:
    """The fewest units, added (+size) or removed (−size), that add up to `rest`; [] if none."""
    # Breadth first over sums; beyond this limit no shortest way goes.
    limit = abs(rest) + max(sizes)
    came: dict[int, int] = {0: 0}
    queue = deque([0])
    while queue and rest not in came:
        here = queue.popleft()
        for move in (*sizes, *(-size for size in sizes)):
            there = here + move
            if abs(there) <= limit and there not in came:
                came[there] = move
                queue.append(there)
    path: list[int] = []
    while rest and rest in came:
        path.append(came[rest])
        rest -= came[rest]
    return path
