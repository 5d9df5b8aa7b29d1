"""A level for each unit within budgets, against trying everything."""

from __future__ import annotations

import math
from itertools import product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.engine.search.knapsack import Cost, Knapsack, fits, hull


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


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 4), st.floats(0, 1))
def test_the_budget_holds_and_the_answer_is_near_the_best(
    seed: int, units: int, levels: int, share: float
) -> None:
    knapsack = menu_of(seed, units, levels)
    budget = between(knapsack, [share])
    found = knapsack.best(budget)
    assert found is not None
    assert fits(knapsack.total(found), budget)
    best = min(
        knapsack.predicted(c) for c in everything(knapsack) if fits(knapsack.total(c), budget)
    )
    # the greedy answer misses the best one by less than the largest step of one unit
    step = max(max(rise) for rise in knapsack.rise)
    assert knapsack.predicted(found) <= best + step + 1e-9


@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.integers(2, 4),
    st.lists(st.floats(0.2, 1), min_size=2, max_size=3),
)
def test_several_budgets_hold_and_the_answer_is_near_the_best(
    seed: int, units: int, levels: int, shares: list[float]
) -> None:
    knapsack = menu_of(seed, units, levels, len(shares))
    budget = between(knapsack, shares)
    found = knapsack.best(budget)
    fitting = [c for c in everything(knapsack) if fits(knapsack.total(c), budget)]
    if found is None:
        # with few units a mix of prices may have no answer between two steps
        tighter = between(knapsack, [share - 1 / units for share in shares])
        assert not any(fits(knapsack.total(c), tighter) for c in fitting)
        return
    assert found in fitting
    best = min(map(knapsack.predicted, fitting))
    step = max(max(rise) for rise in knapsack.rise)
    assert knapsack.predicted(found) <= best + len(shares) * step + 1e-9


def test_a_second_budget_changes_the_answer() -> None:
    # level 1 saves bytes, level 2 saves seconds, level 3 both and loses the most
    unit = ((8.0, 8.0), (4.0, 8.0), (8.0, 4.0), (4.0, 4.0))
    knapsack = Knapsack((unit,) * 3, ((0.0, 0.1, 0.1, 0.5),) * 3)
    assert knapsack.best((12.0, math.inf)) == (1, 1, 1)
    assert knapsack.best((math.inf, 12.0)) == (2, 2, 2)
    assert knapsack.best((12.0, 12.0)) == (3, 3, 3)
    assert knapsack.best((12.0, 11.0)) is None
    both = knapsack.best((20.0, 20.0))
    assert both is not None
    assert knapsack.predicted(both) == pytest.approx(0.2)


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 5))
def test_hulls_hold_the_best_level_for_every_price(seed: int, units: int, levels: int) -> None:
    knapsack = menu_of(seed, units, levels)
    for unit in range(units):
        costs, rises = [cost for (cost,) in knapsack.cost[unit]], knapsack.rise[unit]
        found = hull(costs, rises, range(levels))
        for price in (0.0, 0.001, 0.01, 0.03, 0.1, 1.0, 10.0):
            least = min(rises[n] + price * costs[n] for n in range(levels))
            assert min(rises[n] + price * costs[n] for n in found) == pytest.approx(least)
        assert [costs[n] for n in found] == sorted((costs[n] for n in found), reverse=True)


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
