"""Chooses a level for each unit within a budget. The integer problem alone, without a model.

    minimise Σ rise[i][level_i]    subject to    Σ cost[i][level_i] ≤ budget

The levels of a unit that can be best for some price of a byte lie on the lower convex hull of
(cost, rise). From the level with the least rise, the unit whose next level on the hull adds the
least rise for what it saves goes on, until the budget holds (the greedy solution of the Lagrangian;
Shoham and Gersho, IEEE Trans. ASSP 36(9), 1988). What is left of the budget is spent on the units
that gain the most.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from secateur.sparsity.evolution import Candidate, Mutation

__all__ = ["Menu"]

TRIES = 16
"""Units that a mutation tries to improve with what is left of the budget."""


@dataclass(frozen=True)
class Menu:
    """The levels of every unit.

    Attributes:
        cost: of each unit on each level, in bytes or in nanoseconds.
        rise: how much each unit adds to the loss on each level, in nats.
    """

    cost: tuple[tuple[float, ...], ...]
    rise: tuple[tuple[float, ...], ...]

    def total(self, candidate: Candidate) -> float:
        """The cost of a candidate."""
        return sum(cost[level] for cost, level in zip(self.cost, candidate, strict=True))

    def predicted(self, candidate: Candidate) -> float:
        """The rise of the loss that its units add up to."""
        return sum(rise[level] for rise, level in zip(self.rise, candidate, strict=True))

    @property
    def least(self) -> float:
        """The smallest cost that is possible."""
        return sum(map(min, self.cost))

    def best(self, budget: float, allowed: Sequence[int] | None = None) -> Candidate | None:
        """The candidate with the smallest predicted rise that was found; None if none fits.

        Args:
            budget: the largest cost.
            allowed: the levels to use; None for all.
        """
        levels = list(allowed) if allowed is not None else list(range(len(self.cost[0])))
        hulls = [self.hull(unit, levels) for unit in range(len(self.cost))]
        place = [0] * len(hulls)
        chosen = [hull[0] for hull in hulls]
        total = self.total(tuple(chosen))
        heap = [self.step(unit, hulls[unit], 0) for unit in range(len(hulls))]
        queue = [entry for entry in heap if entry is not None]
        heapq.heapify(queue)
        while total > budget and queue:
            _, unit = heapq.heappop(queue)
            place[unit] += 1
            level = hulls[unit][place[unit]]
            total += self.cost[unit][level] - self.cost[unit][chosen[unit]]
            chosen[unit] = level
            entry = self.step(unit, hulls[unit], place[unit])
            if entry is not None:
                heapq.heappush(queue, entry)
        if total > budget:
            return None
        self.spend(chosen, budget - total, range(len(chosen)), levels)
        return tuple(chosen)

    def hull(self, unit: int, levels: Sequence[int]) -> list[int]:
        """Levels on the lower convex hull, from the least rise to the least cost."""
        cost, rise = self.cost[unit], self.rise[unit]
        ordered = sorted(levels, key=lambda level: (cost[level], rise[level]))
        found: list[int] = []
        for level in ordered:
            if found and rise[level] >= rise[found[-1]]:
                continue  # dearer and no better
            while len(found) > 1:
                before, last = found[-2], found[-1]
                slope = (rise[last] - rise[before]) * (cost[level] - cost[before])
                if slope < (rise[level] - rise[before]) * (cost[last] - cost[before]):
                    break
                found.pop()
            found.append(level)
        return found[::-1]

    def step(self, unit: int, hull: Sequence[int], place: int) -> tuple[float, int] | None:
        """The rise for each saved byte of the next level of a unit, and the unit."""
        if place + 1 >= len(hull):
            return None
        here, then = hull[place], hull[place + 1]
        saved = self.cost[unit][here] - self.cost[unit][then]
        return (self.rise[unit][then] - self.rise[unit][here]) / saved, unit

    def spend(
        self, chosen: list[int], left: float, units: Sequence[int], levels: Sequence[int]
    ) -> None:
        """Improve units, in place, while something is left of the budget; most gain first."""
        while True:
            gain, best = 0.0, (-1, -1)
            for unit in units:
                here = chosen[unit]
                for level in levels:
                    more = self.cost[unit][level] - self.cost[unit][here]
                    less = self.rise[unit][here] - self.rise[unit][level]
                    if more <= left and less > gain:
                        gain, best = less, (unit, level)
            if best[0] < 0:
                return
            unit, level = best
            left -= self.cost[unit][level] - self.cost[unit][chosen[unit]]
            chosen[unit] = level

    def mutation(self, budget: float) -> Mutation:
        """A mutation that stays within a budget.

        One to three units get another level. If the cost is too large then, other units step down
        their hulls; what is left of the budget goes to a few random units.
        """
        levels = range(len(self.cost[0]))
        hulls = [self.hull(unit, levels) for unit in range(len(self.cost))]

        def mutate(candidate: Candidate, random: Random) -> Candidate:
            chosen = list(candidate)
            changed = random.sample(range(len(chosen)), min(random.randint(1, 3), len(chosen)))
            for unit in changed:
                chosen[unit] = random.choice([x for x in hulls[unit] if x != chosen[unit]] or [0])
            others = [unit for unit in range(len(chosen)) if unit not in changed]
            random.shuffle(others)
            for unit in others:
                if self.total(tuple(chosen)) <= budget:
                    break
                cheaper = [x for x in hulls[unit] if self.saves(unit, x, chosen[unit])]
                chosen[unit] = cheaper[0] if cheaper else chosen[unit]
            left = budget - self.total(tuple(chosen))
            if left < 0:
                return candidate
            few = random.sample(range(len(chosen)), min(TRIES, len(chosen)))
            self.spend(chosen, left, [u for u in few if u not in changed], levels)
            return tuple(chosen)

        return mutate

    def saves(self, unit: int, level: int, here: int) -> bool:
        """Whether a level of a unit costs less than another."""
        return self.cost[unit][level] < self.cost[unit][here]
