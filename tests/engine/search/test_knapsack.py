"""A level for each unit within budgets, against trying everything."""

from __future__ import annotations

import math
from itertools import product
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from secateur.engine.search.knapsack import Cost, Knapsack, fits


def menu_of(seed: int, units: int, levels: int, kinds: int = 1) -> Knapsack:
    """Random costs and rises; the first level is the dearest and loses nothing."""
    random = Random(seed)
    costs, rises = [], []
    for _ in range(units):
        each = [
            sorted((float(random.randint(1, 40)) for _ in range(levels)), reverse=True)
            for _ in range(kinds)
        ]
        rest = [[one[level] for one in each] for level in range(1, levels)]
        for row in rest:
            random.shuffle(row)
        costs.append((tuple(one[0] for one in each), *map(tuple, rest)))
        rises.append((0.0, *(random.random() for _ in range(levels - 1))))
    return Knapsack(tuple(costs), tuple(rises))


def everything(knapsack: Knapsack) -> list[tuple[int, ...]]:
    """All candidates."""
    return list(product(*(range(len(cost)) for cost in knapsack.cost)))


def between(knapsack: Knapsack, shares: list[float]) -> Cost:
    """A budget between the least and the most of every kind."""
    bounds = zip(knapsack.least, knapsack.most, shares, strict=True)
    return tuple(least + share * (most - least) for least, most, share in bounds)


@settings(deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.integers(2, 4),
    st.lists(st.floats(0, 1), min_size=1, max_size=3),
)
def test_the_answer_for_few_units_is_the_best_of_all(
    seed: int, units: int, levels: int, shares: list[float]
) -> None:
    """There is none only where nothing fits; the costs of different kinds are unrelated."""
    knapsack = menu_of(seed, units, levels, len(shares))
    budget = between(knapsack, shares)
    found = knapsack.best(budget)
    fitting = [c for c in everything(knapsack) if fits(knapsack.total(c), budget)]
    assert (found is not None) == bool(fitting)
    if found is not None:
        assert found in fitting
        assert knapsack.predicted(found) == pytest.approx(min(map(knapsack.predicted, fitting)))


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 2), st.floats(0.1, 1), st.floats(0.1, 1))
def test_the_least_of_a_cost_within_a_rise(
    seed: int, wanted: int, share: float, lost: float
) -> None:
    knapsack = menu_of(seed, 4, 4, 3)
    budget = between(knapsack, [math.inf if n == wanted else share for n in range(3)])
    every = everything(knapsack)
    rise = lost * max(map(knapsack.predicted, every))
    found = knapsack.cheapest(wanted, (*budget, rise))
    fitting = [
        knapsack.total(c)[wanted] for c in every
        if fits((*knapsack.total(c), knapsack.predicted(c)), (*budget, rise))
    ]  # fmt: skip
    assert (found is not None) == bool(fitting)
    if found is not None:
        assert knapsack.total(found)[wanted] == pytest.approx(min(fitting))


def whole_model(seed: int, kinds: int, related: bool) -> Knapsack:
    """150 units with 20 levels: bits and zeros of matrices, or costs that have nothing in common.

    Related costs are the bytes of a matrix in the files, in memory and in time.
    """
    random = Random(seed)
    costs, rises = [], []
    for _ in range(150):
        size, harm = random.choice([1.0, 3.0, 8.0]), random.lognormvariate(0, 1.5)
        levels, lost = [], []
        for bits, zeros in product((16, 8, 4, 3, 2), (0.0, 0.3, 0.5, 0.7)):
            stored = size * bits * (1 - zeros) + (size if zeros else 0.0)
            slowed = size * max(bits, 4) * (1.1 - zeros if zeros else 1.0)
            own = stored, slowed, size * max(bits, 4) * (1 - zeros)
            levels.append(own[:kinds] if related else tuple(random.random() for _ in range(kinds)))
            rise = harm * (4.0**-bits + math.exp(9 * zeros) / 1e4 * (zeros > 0))
            lost.append(rise * random.uniform(0.8, 1.25))
        costs.append(tuple(levels))
        rises.append(tuple(lost))
    return Knapsack(tuple(costs), tuple(rises))


def least_by_highs(knapsack: Knapsack, budget: Cost, *, whole: bool) -> float:
    """The least rise by a solver of integer programs; a bound on it if fractions are allowed."""
    units, levels = len(knapsack.rise), len(knapsack.rise[0])
    one_each = np.kron(np.eye(units), np.ones(levels))
    costs = np.array(knapsack.cost).reshape(units * levels, -1).T
    rises = np.array(knapsack.rise).ravel()
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(costs, -np.inf, budget)]
    found = milp(
        rises * 1e4 / rises.sum(), integrality=int(whole), bounds=Bounds(0, 1), constraints=limits
    )
    return float(found.fun) * float(rises.sum()) / 1e4


@pytest.mark.parametrize("shares", [(0.1,), (0.115, 0.1), (0.21, 0.197), (0.115, 0.1, 0.1)])
def test_the_answer_for_150_units_is_within_a_thousandth_of_the_bound(
    shares: tuple[float, ...],
) -> None:
    for seed in range(3):
        knapsack = whole_model(seed, len(shares), related=True)
        budget = between(knapsack, list(shares))
        found = knapsack.best(budget)
        assert found is not None
        assert fits(knapsack.total(found), budget)
        bound = least_by_highs(knapsack, budget, whole=False)
        assert bound * (1 - 1e-6) <= knapsack.predicted(found) <= 1.001 * bound
        for alone in ([1.0, shares[-1]], [shares[0], 1.0]) if len(shares) == 2 else ():
            loose = least_by_highs(knapsack, between(knapsack, alone), whole=False)
            assert loose < 0.9998 * bound  # both budgets count


@pytest.mark.parametrize("shares", [(0.2,), (0.2, 0.3)])
def test_costs_without_relation_are_chosen_as_well_as_by_a_solver(
    shares: tuple[float, ...],
) -> None:
    for seed in range(2):
        knapsack = whole_model(seed, len(shares), related=False)
        budget = between(knapsack, list(shares))
        found = knapsack.best(budget)
        assert found is not None
        assert fits(knapsack.total(found), budget)
        assert knapsack.predicted(found) <= 1.002 * least_by_highs(knapsack, budget, whole=True)


def test_a_choice_is_found_near_the_edge_of_what_is_possible() -> None:
    """Budgets with little room beyond the cost of one certain choice, of costs without relation."""
    for seed in range(20):
        random = Random(seed)
        knapsack = menu_of(seed, 20, 5, 2 + seed % 2)
        kinds = range(len(knapsack.cost[0][0]))
        weights = [random.uniform(0.5, 2) for _ in kinds]
        cheapest = tuple(
            min(range(5), key=lambda n: sum(w * x for w, x in zip(weights, unit[n], strict=True)))
            for unit in knapsack.cost
        )
        budget = tuple(1.02 * cost for cost in knapsack.total(cheapest))
        found = knapsack.best(budget)
        assert found is not None
        assert fits(knapsack.total(found), budget)


def test_an_impossible_budget_has_no_answer() -> None:
    knapsack = menu_of(0, 4, 3)
    (least,) = knapsack.least
    assert knapsack.best((least - 0.5,)) is None
    assert knapsack.best((least,)) is not None
    assert knapsack.best((math.inf,)) == tuple(
        min(range(3), key=lambda n: rise[n]) for rise in knapsack.rise
    )


def test_only_allowed_levels_are_taken() -> None:
    knapsack = menu_of(3, 6, 4)
    found = knapsack.best((math.inf,), [2, 3])
    assert found is not None
    assert set(found) <= {2, 3}
