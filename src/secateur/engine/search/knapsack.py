"""Chooses a level for each unit within budgets. The integer problem alone, without a model.

    minimise Σ rise[i][level_i]    subject to    Σ cost[i][level_i][k] ≤ budget[k]    for every k

A cost has several kinds, such as bytes and seconds. With a price μ[k] for each kind, every unit
takes the level with the least rise + Σ μ[k] · cost[k], and whatever the prices are,

    Σ min over levels (rise + Σ μ[k] · cost[k])  −  Σ μ[k] · budget[k]

is at most the least rise within the budgets (Lagrange; Everett, Operations Research 11, 1963). The
prices that make this bound largest are found by cutting planes: the bound is concave, each trial
gives a plane above it, and the next prices are where the lowest of the planes is highest.

At these prices some units have a second level that costs hardly more than their best one. Theirs
are combined, unit after unit: of all combinations that can still come within the budgets, those
that the prices like best are kept. For few units these are all combinations, so the answer is the
best one. For many units it is within a thousandth of the bound, measured with 150 of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from secateur.sparsity.evolution import Candidate

Cost = tuple[int | float, ...]
"""A number for each kind of cost; bytes are whole. As a budget: the most of each, or infinite."""

Floats = NDArray[np.float64]
Levels = NDArray[np.intp]

SLACK = 1e-9
"""What rounding may add to a sum of costs, as a fraction of the budget."""

CORE, KEPT = 40, 4000
"""Units whose levels are combined, and combinations of levels that are kept."""

TRIALS, CLOSE = 100, 1e-7
"""Trials of prices, at most; and how near the best bound is to the highest one that is possible, as
a fraction of it, when there are no more."""

MOST = 1e9
"""The largest price, where costs and rises of all units together have a range of 1."""


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

    @cached_property
    def numbers(self) -> Floats:
        """Costs of every kind, then the rise [kinds + 1, units, levels]."""
        costs = np.asarray(self.cost, dtype=np.float64).transpose(2, 0, 1)
        return np.concatenate([costs, np.asarray(self.rise, dtype=np.float64)[None]])

    @property
    def least(self) -> Cost:
        """The smallest cost that is possible, of each kind alone."""
        return tuple(self.numbers[:-1].min(axis=2).sum(axis=1).tolist())

    @property
    def most(self) -> Cost:
        """The largest cost that is possible, of each kind alone."""
        return tuple(self.numbers[:-1].max(axis=2).sum(axis=1).tolist())

    def best(self, budget: Cost, allowed: Sequence[int] | None = None) -> Candidate | None:
        """The candidate with the smallest predicted rise; None if none fits.

        Args:
            budget: the largest cost of each kind.
            allowed: the levels to use; None for all.
        """
        return self.cheapest(len(budget), (*budget, math.inf), allowed)

    def cheapest(
        self, wanted: int, budget: Cost, allowed: Sequence[int] | None = None
    ) -> Candidate | None:
        """The candidate with the least of one kind of cost, or of the rise; None if none fits.

        Args:
            wanted: the kind of cost, counted from 0; after the last one comes the rise.
            budget: the largest cost of each kind, then the largest rise.
            allowed: the levels to use; None for all.
        """
        levels = np.arange(len(self.rise[0])) if allowed is None else np.asarray(allowed)
        numbers = self.numbers[:, :, levels]
        bounded = [kind for kind, most in enumerate(budget) if math.isfinite(most)]
        places = _chosen(numbers[wanted], numbers[bounded], [budget[kind] for kind in bounded])
        if places is None:
            return None
        # of equal levels the first one, and none that another one betters in everything
        own = np.take_along_axis(numbers, places[None, :, None], axis=2)
        places = (numbers <= own).all(axis=0).argmax(axis=1)
        candidate = tuple(levels[places].tolist())
        total = (*self.total(candidate), self.predicted(candidate))
        return candidate if fits(total, budget) else None


def _chosen(goal: Floats, costs: Floats, budgets: Sequence[float]) -> Levels | None:
    """The level of each unit with the least sum of the goal; None if none was found that fits.

    Args:
        goal: what is minimised [units, levels].
        costs: what is bounded [kinds, units, levels].
        budgets: the most of each kind.
    """
    if not budgets:
        return goal.argmin(axis=1)
    least = costs.min(axis=2, keepdims=True)
    # what the budgets leave above the cheapest levels; a rounded sum may exceed one a little
    left = np.asarray(budgets) * (1 + SLACK / 2) - least.sum(axis=(1, 2))
    if (left < 0).any():
        return None
    goal, costs = goal - goal.min(axis=1, keepdims=True), costs - least
    # each kind of cost, and the goal, gets a range of 1, so prices of all kinds are alike
    ranges = costs.max(axis=2).sum(axis=1)
    ranges[ranges == 0] = 1.0
    goal = goal / (goal.max(axis=1).sum() or 1.0)
    costs, left = costs / ranges[:, None, None], left / ranges
    # where nothing fits that the goal likes, prices of the costs alone find more
    for wanted, kept in ((goal, KEPT), (0 * goal, KEPT), (goal, 8 * KEPT)):
        bound, prices = _prices(wanted, costs, left)
        if bound > 1:  # no sum of the goal is that large, so nothing fits
            return None
        found = _combined(wanted, costs, left, prices, kept)
        if found is not None:
            return found
    return None


def _prices(goal: Floats, costs: Floats, left: Floats) -> tuple[float, Floats]:
    """The largest bound on the sum of the goal, and the price of each kind that gives it."""
    units, kinds = np.arange(len(goal)), len(left)
    planes: list[Floats] = []
    found, prices = (-np.inf, np.ones(kinds)), np.ones(kinds)
    for _ in range(TRIALS):
        levels = (goal + np.tensordot(prices, costs, 1)).argmin(axis=1)
        slope = costs[:, units, levels].sum(axis=1) - left
        # bound ≤ goal + slope · prices, for all prices
        planes.append(np.array([*-slope, 1.0, goal[units, levels].sum()]))
        found = max(found, (float(planes[-1][-1] + slope @ prices), prices), key=lambda one: one[0])
        *rows, heights = np.array(planes).T
        limits = [(0, MOST)] * kinds + [(None, None)]  # of the prices, and of the bound
        highest = linprog([0.0] * kinds + [-1.0], np.array(rows).T, heights, bounds=limits)
        before, prices = prices, highest.x[:-1]
        if -highest.fun - found[0] <= CLOSE * abs(found[0]) or np.array_equal(prices, before):
            break
    return found


def _combined(
    goal: Floats, costs: Floats, left: Floats, prices: Floats, most: int
) -> Levels | None:
    """The best levels within the budgets where the nearest choices are combined; None if none fits.

    Args:
        goal: what is minimised [units, levels].
        costs: of each kind [kinds, units, levels].
        left: the most of each kind.
        prices: of each kind.
        most: combinations that are kept.
    """
    priced = goal + np.tensordot(prices, costs, 1)
    chosen, dearer = priced.argmin(axis=1), priced - priced.min(axis=1, keepdims=True)
    second = np.sort(dearer, axis=1)[:, :2].max(axis=1)
    # units whose second level costs least are combined; the others keep their first one
    core, rest = np.split(second.argsort(kind="stable"), [CORE])
    spent = costs[:, rest, chosen[rest]].sum(axis=1)[None]  # [combinations, kinds]
    extra, steps = np.zeros(1), list[Levels]()
    for place, unit in enumerate(core):
        to_come = costs[:, core[place + 1 :]].min(axis=2).sum(axis=1)  # at least, of each kind
        spent = (spent[:, None] + costs[:, unit].T).reshape(-1, len(left))
        extra = (extra[:, None] + dearer[unit]).ravel()
        fitting = np.flatnonzero((spent + to_come <= left).all(axis=1))
        if len(fitting) > most:
            fitting = fitting[extra[fitting].argpartition(most)[:most]]
        steps.append(fitting)  # combination · levels + level
        spent, extra = spent[fitting], extra[fitting]
    if not len(extra):
        return None
    # without the prices this is the goal itself
    combination = int((extra - spent @ prices).argmin())
    for unit, fitting in zip(core[::-1], steps[::-1], strict=True):
        combination, chosen[unit] = divmod(int(fitting[combination]), goal.shape[1])
    return chosen
