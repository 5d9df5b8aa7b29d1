"""The sets of layers or sub-blocks that can be dropped, and how to choose among them.

This is the part without a model: the cost of a set, greedy removal, and the mutations of the search
(`sparsity.evolution`). `engine.search.fitness` measures the fitness of a set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from secateur.sparsity.evolution import Candidate, Fitness, Stages, ordered

ATTENTION, FFN = 1, 2
WHOLE = ATTENTION | FFN
"""Sub-blocks as bits."""


@dataclass(frozen=True)
class DepthUnit:
    """A layer or sub-block, dropped or kept as a whole.

    Attributes:
        layer: index of the decoder layer.
        parts: ATTENTION, FFN or WHOLE.
        parameters: number of its parameters.
        cost: its cost in the budget.
    """

    layer: int
    parts: int
    parameters: int
    cost: int

    @property
    def name(self) -> str:
        """`3`, `3.attention` or `3.ffn`."""
        kind = {WHOLE: "", ATTENTION: ".attention", FFN: ".ffn"}[self.parts]
        return f"{self.layer}{kind}"


@dataclass(frozen=True)
class DropSpace:
    """All candidates: sets of units whose costs reach the budget.

    A candidate holds ascending indices into `units`: the units that it drops.

    Attributes:
        units: units that can be dropped, in the order of the layers.
        budget: the sum of costs to reach.
        layers: number of decoder layers.
    """

    units: tuple[DepthUnit, ...]
    budget: int
    layers: int

    @property
    def run_length(self) -> int:
        """The smallest number of consecutive units that reach the budget from any starting unit."""
        costs = [unit.cost for unit in self.units]
        return next(
            n
            for n in range(1, len(costs) + 1)
            if min(sum(costs[i : i + n]) for i in range(len(costs) - n + 1)) >= self.budget
        )

    def cost(self, candidate: Candidate) -> int:
        """The sum of the costs of the units that a candidate drops."""
        return sum(self.units[i].cost for i in candidate)

    def kept(self, candidate: Candidate) -> tuple[int, ...]:
        """The sub-blocks that each layer keeps."""
        kept = [WHOLE] * self.layers
        for i in candidate:
            kept[self.units[i].layer] &= ~self.units[i].parts
        return tuple(kept)

    def names(self, candidate: Candidate) -> list[str]:
        """The names of the units that a candidate drops."""
        return [self.units[i].name for i in candidate]

    def spare(self, candidate: Candidate) -> list[int]:
        """The spare units of a candidate: it reaches the budget without any single one of them."""
        beyond = self.cost(candidate) - self.budget
        return [i for i in candidate if self.units[i].cost <= beyond]

    def mutate(self, candidate: Candidate, random: Random, order: Sequence[int]) -> Candidate:
        """Exchange one to three units, small numbers more often. The result reaches the budget.

        A random dropped unit is restored. Other units are dropped until the sum reaches the budget.
        The unit at position r of the order is drawn with probability proportional to 1/(r+1). If
        units differ in cost, spare units are restored.

        Args:
            candidate: the initial candidate.
            random: source of the draws.
            order: ranking of all units; the best ones to drop come first.
        """
        dropped = set(candidate)
        for _ in range(min(random.randint(1, 3), random.randint(1, 3))):
            back = random.choice(sorted(dropped))
            dropped.discard(back)
            while self.cost(tuple(dropped)) < self.budget:
                eligible = [i for i in order if i not in dropped and i != back]
                if not eligible:
                    return candidate
                weights = [1 / (place + 1) for place in range(len(eligible))]
                dropped.add(random.choices(eligible, weights)[0])
            while spare := self.spare(tuple(sorted(dropped))):
                dropped.discard(random.choice(spare))
        return tuple(sorted(dropped))


@dataclass(frozen=True)
class Removal:
    """A set of dropped units.

    Attributes:
        candidate: the dropped units.
        fitness: fitness of the candidate on the tokens of the last stage; NaN if not measured.
        order: ranking of all units; the best ones to drop come first.
    """

    candidate: Candidate
    fitness: float
    order: tuple[int, ...]


def lowest(space: DropSpace, scores: Sequence[float]) -> Removal:
    """Drop the units of lowest score per cost until the budget is reached, and no more.

    If units differ in cost, the last unit may exceed the budget. Then spare units are restored,
    starting with the highest score.
    """
    ratios = [score / unit.cost for score, unit in zip(scores, space.units, strict=True)]
    order = ordered(ratios)
    dropped: Candidate = ()
    for i in order:
        if space.cost(dropped) < space.budget:
            dropped = tuple(sorted((*dropped, i)))
    while spare := space.spare(dropped):
        back = max(spare, key=lambda i: scores[i])
        dropped = tuple(i for i in dropped if i != back)
    return Removal(dropped, math.nan, tuple(order))


def greedy(space: DropSpace, stages: Stages, fitness: Fitness) -> Iterator[Removal]:
    """Drop one unit at a time, always the least harmful one, and yield every step.

    Each step tries all remaining units. Later stages keep fewer of them on more tokens. If units
    differ in cost, the harm of a unit is divided by its cost; only the part of the cost within the
    budget counts. At the end, spare units are restored.
    """
    dropped: Candidate = ()
    step = 0
    order: tuple[int, ...] = ()
    while (missing := space.budget - space.cost(dropped)) > 0:
        rest = [i for i in range(len(space.units)) if i not in dropped]
        tried: list[int] = []
        fitnesses: list[float] = []
        for keep, tokens in stages:
            if tried and len(rest) <= keep and tokens < stages[-1][1]:
                continue
            with_one = [tuple(sorted((*dropped, i))) for i in rest]
            *values, base = fitness([*with_one, dropped], tokens, step)
            counted = [min(space.units[i].cost, missing) for i in rest]
            ranked = ordered([(v - base) / c for v, c in zip(values, counted, strict=True)])
            tried = tried or [rest[j] for j in ranked]
            rest, fitnesses = [rest[j] for j in ranked[:keep]], [values[j] for j in ranked[:keep]]
        dropped = tuple(sorted((*dropped, rest[0])))
        step += 1
        order = (*dropped, *(i for i in tried if i != rest[0]))
        yield Removal(dropped, fitnesses[0], order)
    while spare := space.spare(dropped):
        without = [tuple(i for i in dropped if i != back) for back in spare]
        values = list(fitness(without, stages[-1][1], step))
        best = ordered(values)[0]
        dropped = without[best]
        yield Removal(dropped, values[best], order)
