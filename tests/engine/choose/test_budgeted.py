"""A level for each unit within a budget, against trying everything."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.engine.choose.budgeted import Menu


def menu_of(seed: int, units: int, levels: int) -> Menu:
    """Random costs and rises; the first level is the dearest and loses nothing."""
    random = Random(seed)
    costs, rises = [], []
    for _ in range(units):
        cost = sorted((float(random.randint(1, 40)) for _ in range(levels)), reverse=True)
        rise = [0.0] + [random.random() for _ in range(levels - 1)]
        costs.append(tuple(cost))
        rises.append(tuple(rise))
    return Menu(tuple(costs), tuple(rises))


def everything(menu: Menu) -> list[tuple[int, ...]]:
    """All candidates."""
    return list(product(*(range(len(cost)) for cost in menu.cost)))


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 4), st.floats(0, 1))
def test_the_budget_holds_and_the_answer_is_near_the_best(
    seed: int, units: int, levels: int, share: float
) -> None:
    menu = menu_of(seed, units, levels)
    most = menu.total((0,) * units)
    budget = menu.least + share * (most - menu.least)
    found = menu.best(budget)
    assert found is not None
    assert menu.total(found) <= budget
    best = min(menu.predicted(c) for c in everything(menu) if menu.total(c) <= budget)
    # the greedy answer misses the best one by less than the largest step of one unit
    step = max(max(rise) for rise in menu.rise)
    assert menu.predicted(found) <= best + step + 1e-9


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 5))
def test_hulls_hold_the_best_level_for_every_price(seed: int, units: int, levels: int) -> None:
    menu = menu_of(seed, units, levels)
    for unit in range(units):
        hull = menu.hull(unit, range(levels))
        costs, rises = menu.cost[unit], menu.rise[unit]
        for price in (0.0, 0.001, 0.01, 0.03, 0.1, 1.0, 10.0):
            least = min(rises[n] + price * costs[n] for n in range(levels))
            assert min(rises[n] + price * costs[n] for n in hull) == pytest.approx(least)
        assert [costs[n] for n in hull] == sorted((costs[n] for n in hull), reverse=True)


def test_an_impossible_budget_has_no_answer() -> None:
    menu = menu_of(0, 4, 3)
    assert menu.best(menu.least - 0.5) is None
    assert menu.best(menu.least) is not None
    assert menu.best(float("inf")) == tuple(
        min(range(3), key=lambda n: rise[n]) for rise in menu.rise
    )


def test_only_allowed_levels_are_taken() -> None:
    menu = menu_of(3, 6, 4)
    found = menu.best(float("inf"), [2, 3])
    assert found is not None
    assert set(found) <= {2, 3}


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(2, 4))
def test_mutants_stay_within_the_budget(seed: int, units: int, levels: int) -> None:
    menu = menu_of(seed, units, levels)
    budget = (menu.least + menu.total((0,) * units)) / 2
    start = menu.best(budget)
    assert start is not None
    mutate, random = menu.mutation(budget), Random(seed)
    for _ in range(20):
        mutant = mutate(start, random)
        assert menu.total(mutant) <= budget
        assert len(mutant) == units


def test_mutations_reach_other_candidates() -> None:
    menu = menu_of(1, 8, 4)
    budget = (menu.least + menu.total((0,) * 8)) / 2
    start = menu.best(budget)
    assert start is not None
    mutate, random = menu.mutation(budget), Random(0)
    assert len({mutate(start, random) for _ in range(50)}) > 10
