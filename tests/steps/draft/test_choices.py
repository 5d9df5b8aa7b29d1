"""Which draft is made: that of the largest predicted speed-up among those of least divergence."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
from fixed_times import PARENT, head_time, matrix_times

from secateur.engine.search.knapsack import Knapsack
from secateur.progress import Silent
from secateur.runtime.formats import WeightFormat
from secateur.steps.draft import BOUNDS, Prediction
from secateur.steps.fitting.problem import (
    EMBEDDINGS,
    FORMATS,
    SECONDS,
    SIZE,
    TIMED,
    CostKind,
    Costs,
    as_timed,
)

SHAPES = {"a": (64, 64), "b": (128, 64), "c": (64, 128)}


def costs() -> Costs:
    """Three linears and a head, timed by their bytes."""
    times = matrix_times(None, [*SHAPES.values()], [*map(as_timed, TIMED)], Silent())
    kinds = CostKind(SIZE, 0.0, math.inf), CostKind(SECONDS, times.rest, times.base)
    outer = (96, 64)
    seconds = {x: head_time(outer, as_timed(WeightFormat(x, 0.0))) for x in ("int8", "int4")}
    head = {x: seconds["int4" if x == "int3" else x] - seconds["int8"] for x in (*seconds, "int3")}
    return Costs(kinds, SHAPES, {"embedding": outer}, times, head=head)


def test_the_head_counts_in_seconds() -> None:
    found = costs()
    int8, int4, int3 = (
        found.of(EMBEDDINGS, WeightFormat(x, 0.0)) for x in ("int8", "int4", "int3")
    )
    assert int8[1] == 0.0
    assert int4[1] == int3[1] == pytest.approx(-1e-6 * 96 * 64 / 2)
    assert int3[0] < int4[0] < int8[0]


def levels() -> list[int]:
    """Few enough formats to try all combinations."""
    wanted = ("bfloat16", "int8", "int4", "50% zeros, int8", "50% zeros, int4")
    return [n for n, stored in enumerate(FORMATS) if stored.name in wanted]


@pytest.mark.parametrize("refused", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("slower", [1.0, 1.3])
def test_the_best_choice_against_all_combinations(refused: float, slower: float) -> None:
    whole = costs()
    lost = {"bfloat16": 0.0, "int8": 0.001, "int4": 0.05, "50% zeros, int8": 0.2,
            "50% zeros, int4": 0.3}  # fmt: skip
    weight = {"a": 1.0, "b": 2.5, "c": 0.4, EMBEDDINGS: 1.5}
    rise = tuple(
        tuple(weight[unit] * lost.get(stored.name, 50.0) for stored in FORMATS)
        for unit in whole.units
    )
    cost = tuple(tuple(whole.of(unit, stored) for stored in FORMATS) for unit in whole.units)
    knapsack = Knapsack(cost, rise)
    scale = 1 / whole.table.base  # dense int8 takes a second, as one call of the parent
    parent = [each * 1.5 for each in PARENT]
    problem: Any = SimpleNamespace(costs=whole, knapsack=knapsack)
    prediction = Prediction(problem, parent, refused, slower * scale)
    found = prediction.choices()

    def promise(divergence: float, seconds: float) -> float:
        taken = max(0.0, 1 - refused * math.sqrt(divergence / 2))
        return max(
            (1 + sum(taken**i for i in range(1, k + 1))) * parent[0] / (k * seconds + parent[k])
            for k in range(1, 8)
        )

    for candidate, point in found.items():
        total = knapsack.total(candidate)[1]
        assert point.seconds == pytest.approx(slower * scale * (whole.rest[1] + total))
        assert point.divergence == pytest.approx(knapsack.predicted(candidate))
        expected = promise(point.divergence, point.seconds)
        assert point.expected.speedup == pytest.approx(expected)
    assert 1 < len(found) <= BOUNDS
    seconds = [point.seconds for point in found.values()]
    assert seconds == sorted(seconds)
    every = [
        promise(
            knapsack.predicted(candidate),
            slower * scale * (whole.rest[1] + knapsack.total(candidate)[1]),
        )
        for candidate in itertools.product(levels(), repeat=4)
    ]
    best = max(point.expected.speedup for point in found.values())
    assert 0.95 * max(every) < best <= max(every) + 1e-9
