"""The survey of a fit: what it predicts is exact where divergence is linear in squared errors."""

from __future__ import annotations

from typing import Any

import pytest

from secateur.engine.search.knapsack import Knapsack
from secateur.engine.search.stored_levels import FitSearch, Level
from secateur.progress import Silent

ERRORS = ((0.0, 0.01, 0.04), (0.0, 0.02, 0.03), (0.0, 0.005, 0.05))
"""Squared relative errors of three linears on three levels."""

PRICES = (2.0, 2.0, 5.0)
"""What a squared error costs; the first two linears share a layer."""


def truth(candidate: tuple[int, ...]) -> float:
    """The divergence of an imaginary model."""
    return sum(
        price * errors[level]
        for price, errors, level in zip(PRICES, ERRORS, candidate, strict=True)
    )


def imaginary(measure: Any) -> FitSearch:
    """A search that measures an imaginary model."""
    search = FitSearch.__new__(FitSearch)
    search.names, search.tokens, search.progress = ["a", "b", "c"], 8, Silent()
    levels = []
    for level in range(3):
        errors = {name: ERRORS[place][level] for place, name in enumerate(search.names) if level}
        levels.append(Level(str(level), None, {}, errors))  # type: ignore[arg-type]
    search.levels, search.layers = levels, [[0, 1], [2]]
    search.fitness = lambda candidates, *_: list(map(measure, candidates))  # type: ignore[assignment]
    search.knapsack = Knapsack((((3.0,), (2.0,), (1.0,)),) * 3, ((0.0,) * 3,) * 3)
    return search


def test_the_survey_predicts_every_candidate() -> None:
    search = imaginary(truth)
    search.survey(1)
    for candidate in [(0, 1, 2), (2, 2, 2), (2, 0, 1), (0, 0, 0)]:
        assert search.knapsack.predicted(candidate) == pytest.approx(truth(candidate))


def test_whole_levels_correct_the_predictions() -> None:
    """Where levels together do less harm than layer by layer, the sum is what was measured."""
    search = imaginary(
        lambda candidate: truth(candidate) * (0.8 if len(set(candidate)) == 1 else 1)
    )
    search.survey(1)
    assert search.knapsack.predicted((2, 2, 2)) == pytest.approx(0.8 * truth((2, 2, 2)))
    assert search.knapsack.predicted((1, 1, 1)) == pytest.approx(0.8 * truth((1, 1, 1)))
