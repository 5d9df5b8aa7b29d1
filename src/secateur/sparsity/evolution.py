"""Evolutionary search over candidates of any kind, with a selection in stages.

This is the pure part: who mutates, who survives, and in what order. Candidates are tuples of
integers, and the caller says what they mean. A function measures how good they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Annotated, NamedTuple

from pydantic import Field

from secateur.errors import RecipeError
from secateur.registry import CheckedPart, Count

Candidate = tuple[int, ...]

Stages = tuple[tuple[int, int], ...]
"""(survivors, tokens) of each stage of a selection."""

Fitness = Callable[[Sequence[Candidate], int, int], Sequence[float]]
"""(candidates, tokens, draw) → the fitness of each candidate, lower = better.

The last stage sees all its tokens. An earlier stage sees a part of them, and `draw` chooses it."""

Mutation = Callable[[Candidate, Random], Candidate]
"""(candidate, random) → a candidate like it; the same one if nothing can change."""


TRIES = 4
"""Mutations to try for each mutant."""


class Leader(NamedTuple):
    """The best candidate after a generation.

    Attributes:
        generation: number of generations that are done.
        candidate: the best one so far.
        fitness: of the best one, on the tokens of the last stage.
    """

    generation: int
    candidate: Candidate
    fitness: float


@dataclass(frozen=True)
class Evolution(CheckedPart):
    """An evolutionary search.

    Each generation makes mutants of the best candidate. Stages of selection keep fewer of them on
    more tokens. The last survivor replaces the best candidate if its fitness on the tokens of the
    last stage is lower, so the result is never worse than the best start.

    The last stage has the same tokens in every generation. So nothing is measured again, and the
    result depends on the parameters and the fitness alone.

    Paper: Sieberling et al. 2024, "EvoPress: Accurate Dynamic Model Compression via Evolutionary
    Search", arXiv:2410.14649.

    Args:
        generations: how many; 0 takes the best start.
        offspring: mutants in a generation.
        stages: (survivors, tokens) of each stage of selection; the last keeps 1.
        seed: of the mutations.

    Raises:
        RecipeError: a parameter is out of range, or the stages do not narrow down to one.
    """

    generations: Annotated[int, Field(ge=0)]
    offspring: Count
    stages: Stages
    seed: int

    def __post_init__(self) -> None:
        super().__post_init__()
        survivors, tokens = [s for s, _ in self.stages], [t for _, t in self.stages]
        falling = survivors == sorted(survivors, reverse=True) and survivors[-1:] == [1]
        if not (falling and tokens == sorted(tokens) and tokens[0] > 0):
            raise RecipeError(
                f"stages are {self.stages}",
                remedy="give (survivors, tokens): fewer survivors on more tokens in each stage, "
                "and 1 survivor in the last one; for example ((2, 512), (1, 2048))",
            )

    @property
    def full_tokens(self) -> int:
        """The tokens of the last stage."""
        return self.stages[-1][1]

    @property
    def tokens(self) -> int:
        """Tokens that pass the model in all generations."""
        total, entering = 0, self.offspring
        for survivors, seen in self.stages:
            total += self.generations * entering * seen
            entering = survivors
        return total

    def climb(
        self, starts: Sequence[Candidate], mutate: Mutation, fitness: Fitness
    ) -> Iterator[Leader]:
        """Search generation by generation; yields the best start, then the best of each.

        The mutations of a generation depend on the seed, the number of the generation and the best
        candidate alone. So a stopped search can be repeated from the values that it measured.

        Args:
            starts: candidates to begin with; of equally good ones the first is taken.
            mutate: makes a mutant.
            fitness: measures candidates.
        """
        starts = list(dict.fromkeys(starts))  # each once, in their order
        values = fitness(starts, self.full_tokens, 0)
        # Of equally good starts the first.
        first = ordered(values)[0]
        best = Leader(0, starts[first], values[first])
        yield best
        for generation in range(self.generations):
            random = Random(f"{self.seed} {generation}")  # no state from the generation before
            mutants = self._mutants(best.candidate, mutate, random)
            candidate, value = best.candidate, best.fitness
            if mutants:
                survivor, lowest = self._select(mutants, fitness, generation)
                if lowest < value:
                    candidate, value = survivor, lowest
            best = Leader(generation + 1, candidate, value)
            yield best

    def _mutants(self, parent: Candidate, mutate: Mutation, random: Random) -> list[Candidate]:
        """Different mutants; fewer if not enough are found."""
        found: list[Candidate] = []
        for _ in range(TRIES * self.offspring):
            mutant = mutate(parent, random)
            if mutant not in (parent, *found):
                found.append(mutant)
            if len(found) == self.offspring:
                break
        return found

    def _select(
        self, candidates: Sequence[Candidate], fitness: Fitness, draw: int
    ) -> tuple[Candidate, float]:
        """The survivor of all stages, and its fitness on the tokens of the last one."""
        survivors, values = list(candidates), list[float]()
        for keep, tokens in self.stages:
            # A stage that removes nobody is skipped, but the last must measure on all tokens.
            if len(survivors) > keep or tokens == self.full_tokens:
                values = list(fitness(survivors, tokens, draw))
                order = ordered(values)[:keep]
                survivors, values = [survivors[i] for i in order], [values[i] for i in order]
        return survivors[0], values[0]


def ordered(values: Sequence[float]) -> list[int]:
    """Indices from the lowest value to the highest; a value that is not a number comes last."""
    return sorted(range(len(values)), key=lambda i: (math.isnan(values[i]), values[i]))
