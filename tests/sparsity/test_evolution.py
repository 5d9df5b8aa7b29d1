"""Evolutionary search on landscapes that are known."""

from __future__ import annotations

import math
from random import Random

import pytest

from secateur.errors import RecipeError
from secateur.sparsity.evolution import Evolution, ordered

STAGES = ((2, 10), (1, 40))


def step(candidate, random: Random):
    """One number moves by one, within 0 to 3."""
    moved = list(candidate)
    place = random.randrange(len(moved))
    moved[place] = min(3, max(0, moved[place] + random.choice([-1, 1])))
    return tuple(moved)


def distance(candidates, tokens, draw):
    return [float(sum((x - 2) ** 2 for x in candidate)) for candidate in candidates]


def test_it_ends_at_the_best_candidate_from_the_better_start():
    evolution = Evolution(30, 4, STAGES, seed=0)
    leaders = list(evolution.climb([(0, 0), (3, 0)], step, distance))
    assert (leaders[0].candidate, leaders[0].fitness) == ((3, 0), 5.0)
    assert (leaders[-1].candidate, leaders[-1].fitness) == ((2, 2), 0.0)
    assert [leader.generation for leader in leaders] == list(range(31))


def test_of_equal_starts_the_first_is_taken_and_equal_mutants_replace_nothing():
    evolution = Evolution(5, 4, STAGES, seed=0)
    flat = evolution.climb([(1, 0), (0, 1)], step, lambda c, t, d: [7.0] * len(c))
    assert {leader.candidate for leader in flat} == {(1, 0)}


def test_tokens_are_those_of_all_stages():
    seen = []

    def counted(candidates, tokens, draw):
        seen.append(len(candidates) * tokens)
        return distance(candidates, tokens, draw)

    evolution = Evolution(6, 3, STAGES, seed=0)
    list(evolution.climb([(1, 1, 1, 1, 1, 1)], step, counted))
    assert sum(seen[1:]) == evolution.tokens == 6 * (3 * 10 + 2 * 40)


def test_what_is_not_a_number_comes_last():
    assert ordered([math.nan, 2.0, math.inf, 1.0]) == [3, 1, 2, 0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"generations": -1}, "generations is -1"),
        ({"offspring": 0}, "offspring is 0"),
        ({"stages": ((2, 10),)}, "stages are"),
        ({"stages": ((1, 10), (2, 40))}, "stages are"),
        ({"stages": ((2, 40), (1, 10))}, "stages are"),
        ({"stages": ((1, 0),)}, "stages are"),
        ({"stages": ()}, "stages are"),
    ],
)
def test_parameters_out_of_range_are_refused(options: dict, said: str):
    good = {"generations": 3, "offspring": 4, "stages": STAGES, "seed": 0}
    with pytest.raises(RecipeError, match=said):
        Evolution(**{**good, **options})
