"""What every registered schedule must do."""

from __future__ import annotations

import pytest

from oracles import schedules as oracles
from secateur.errors import RecipeError
from secateur.sparsity.schedules import Schedule, levels, schedules

SPANS = [(0.0, 0.8), (0.3, 0.95), (0.5, 0.5), (0.0, 0.0), (0.1, 0.7)]


@pytest.mark.parametrize("name", list(schedules))
@pytest.mark.parametrize(("first", "last"), SPANS)
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_equals_its_formula(name, first, last, steps):
    schedule = schedules[name](last, first)
    oracle = getattr(oracles, name.replace("-", "_"))
    for step in range(steps + 1):
        assert schedule(step / steps) == pytest.approx(oracle(first, last, step, steps), abs=1e-12)


@pytest.mark.parametrize("name", list(schedules))
@pytest.mark.parametrize(("first", "last"), SPANS)
def test_rises_within_its_span_and_ends_exactly(name, first, last):
    schedule = schedules[name](last, first)
    assert isinstance(schedule, Schedule)
    assert (schedule.first, schedule.last) == (first, last)
    values = [schedule(i / 97) for i in range(98)]
    assert values == sorted(values)
    assert all(first - 1e-12 <= s <= last for s in values)
    assert values[-1] == last


@pytest.mark.parametrize("name", list(schedules))
def test_levels_of_rounds(name):
    schedule = schedules[name](0.8)
    assert levels(schedule, 1) == [0.8]
    assert levels(schedule, 4) == [schedule(0.25), schedule(0.5), schedule(0.75), 0.8]


@pytest.mark.parametrize("name", list(schedules))
@pytest.mark.parametrize(
    ("first", "last", "said"),
    [
        (0.0, 1.0, "last is 1.0"),
        (-0.1, 0.5, "first is -0.1"),
        (0.6, 0.5, "down to 0.5"),
        (0.0, 80.0, "last is 80.0"),
    ],
)
def test_refuses_what_cannot_be(name, first, last, said):
    with pytest.raises(RecipeError, match=said):
        schedules[name](last, first)


def test_refuses_no_rounds():
    with pytest.raises(RecipeError, match="0 rounds"):
        levels(schedules["linear"](0.5), 0)
