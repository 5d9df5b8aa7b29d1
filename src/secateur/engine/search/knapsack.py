"""Chooses a level for each unit within budgets. The integer problem alone, without a model.

    minimise Σ rise[i][level_i]    subject to    Σ cost[i][level_i][k] ≤ budget[k]    for every k

A cost has several kinds, such as bytes and seconds. A mix of weights μ makes one price of them:

    price[i][level] = Σ μ[k] · cost[i][level][k] / range[k]        Σ μ[k] = 1

The levels of a unit that can be best for some multiple of this price lie on the lower convex hull
of (price, rise). From the level with the least rise, the unit whose next level on the hull adds the
least rise for what it saves goes on, until all budgets hold (the greedy solution of the Lagrangian;
Shoham and Gersho, IEEE Trans. ASSP 36(9), 1988). What is left of the budgets is spent on the units
that gain the most. With several budgets this is done for a grid of mixes, and the best answer is
taken. With one budget there is one mix.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from secateur.sparsity.evolution import Candidate

Cost = tuple[int | float, ...]
"""A number for each kind of cost; bytes are whole. As a budget: the most of each, or infinite."""

GRID = {1: 1, 2: 8}
"""Steps from 0 to 1 of a weight in the grid of mixes, by the number of budgets; 4 for more."""

SLACK = 1e-9
"""What rounding may add to a sum of costs, as a fraction of the budget."""


def fits(cost: Cost, budget: Cost) -> bool:
    """Whether a cost is within a budget, in every kind."""
    return all(x <= most + abs(most) * SLACK for x, most in zip(cost, budget, strict=True))


@dataclass(frozen=True)
class Knapsack:
    """The levels of every unit.

    Attributes:
        cost: of each unit on each level.
        rise: how much each unit adds to the loss on each level, in nats.
    """

    cost: tuple[tuple[Cost, ...], ...]
    rise: tuple[tuple[float, ...], ...]

    def total(self, candidate: Candidate) -> Cost:
        """The cost of a candidate."""
        chosen = [cost[level] for cost, level in zip(self.cost, candidate, strict=True)]
        return tuple(map(sum, zip(*chosen, strict=True)))

    def predicted(self, candidate: Candidate) -> float:
        """The rise of the loss that its units add up to."""
        return sum(rise[level] for rise, level in zip(self.rise, candidate, strict=True))

    @property
    def least(self) -> Cost:
        """The smallest cost that is possible, of each kind alone."""
        return tuple(sum(map(min, unit)) for unit in self.by_kind)

    @property
    def most(self) -> Cost:
        """The largest cost that is possible, of each kind alone."""
        return tuple(sum(map(max, unit)) for unit in self.by_kind)

    @property
    def by_kind(self) -> list[list[list[float]]]:
        """Costs of each kind, unit and level."""
        kinds = range(len(self.cost[0][0]))
        return [[[level[kind] for level in unit] for unit in self.cost] for kind in kinds]

    def best(self, budget: Cost, allowed: Sequence[int] | None = None) -> Candidate | None:
        """The candidate with the smallest predicted rise that was found; None if none fits.

        Args:
            budget: the largest cost of each kind.
            allowed: the levels to use; None for all.
        """
        levels = list(allowed) if allowed is not None else list(range(len(self.cost[0])))
        found = [self.descended(price, budget, levels) for price in self.prices(budget)]
        fitting = [candidate for candidate in found if candidate is not None]
        return min(fitting, key=self.predicted, default=None)

    def prices(self, budget: Cost) -> list[list[list[float]]]:
        """The price of every unit on every level, for each mix of the kinds with a budget."""
        bounded = [kind for kind, most in enumerate(budget) if math.isfinite(most)] or [0]
        steps = GRID.get(len(bounded), 4)
        ranges = [high - low or 1.0 for high, low in zip(self.most, self.least, strict=True)]
        grid = product(range(steps + 1), repeat=len(bounded))
        mixes = [dict(zip(bounded, mix, strict=True)) for mix in grid if sum(mix) == steps]

        def price(level: Cost, mix: dict[int, int]) -> float:
            return sum(part / steps * level[kind] / ranges[kind] for kind, part in mix.items())

        return [[[price(level, mix) for level in unit] for unit in self.cost] for mix in mixes]

    def descended(
        self, price: Sequence[Sequence[float]], budget: Cost, levels: Sequence[int]
    ) -> Candidate | None:
        """The greedy candidate for one price; None if it does not come within the budget."""
        for chosen, total in self.descent(price, levels):
            if fits(total, budget):
                self._spend(chosen, budget, levels)
                return tuple(chosen)
        return None

    def descent(
        self, price: Sequence[Sequence[float]], levels: Sequence[int]
    ) -> Iterator[tuple[list[int], Cost]]:
        """The levels after each greedy step, and what they cost. The list of levels is reused."""
        hulls = [hull(p, rise, levels) for p, rise in zip(price, self.rise, strict=True)]
        chosen = [steps[0] for steps in hulls]
        total = self.total(tuple(chosen))
        place = [0] * len(hulls)
        queue = [(self.slope(unit, price, hulls, 0), unit) for unit in range(len(hulls))]
        heapq.heapify(queue)
        yield chosen, total
        while queue[0][0] < math.inf:
            unit = queue[0][1]
            place[unit] += 1
            level = hulls[unit][place[unit]]
            total = self.exchanged(total, unit, chosen[unit], level)
            chosen[unit] = level
            heapq.heapreplace(queue, (self.slope(unit, price, hulls, place[unit]), unit))
            yield chosen, total

    def slope(
        self,
        unit: int,
        price: Sequence[Sequence[float]],
        hulls: Sequence[Sequence[int]],
        place: int,
    ) -> float:
        """The rise for what the next level of a unit saves; infinite if there is none."""
        if place + 1 >= len(hulls[unit]):
            return math.inf
        here, then = hulls[unit][place], hulls[unit][place + 1]
        saved = price[unit][here] - price[unit][then]
        return (self.rise[unit][then] - self.rise[unit][here]) / saved

    def exchanged(self, total: Cost, unit: int, here: int, then: int) -> Cost:
        """A total after a unit went from one level to another."""
        old, new = self.cost[unit][here], self.cost[unit][then]
        return tuple(t - x + y for t, x, y in zip(total, old, new, strict=True))

    def _spend(self, chosen: list[int], budget: Cost, levels: Sequence[int]) -> None:
        """Improve units, in place, while something is left of the budget; most gain first."""
        total = self.total(tuple(chosen))
        while True:
            gain, best = 0.0, (-1, -1)
            for unit, here in enumerate(chosen):
                for level in levels:
                    less = self.rise[unit][here] - self.rise[unit][level]
                    if less > gain and fits(self.exchanged(total, unit, here, level), budget):
                        gain, best = less, (unit, level)
            if best[0] < 0:
                return
            unit, level = best
            total = self.exchanged(total, unit, chosen[unit], level)
            chosen[unit] = level


def hull(price: Sequence[float], rise: Sequence[float], levels: Sequence[int]) -> list[int]:
    """Levels on the lower convex hull of a unit, from the least rise to the lowest price."""
    ordered = sorted(levels, key=lambda level: (price[level], rise[level]))
    found: list[int] = []
    for level in ordered:
        if found and rise[level] >= rise[found[-1]]:
            continue  # dearer and no better
        while len(found) > 1:
            before, last = found[-2], found[-1]
            slope = (rise[last] - rise[before]) * (price[level] - price[before])
            if slope < (rise[level] - rise[before]) * (price[last] - price[before]):
                break
            found.pop()
        found.append(level)
    return found[::-1]
