"""Which sets of layers or sub-blocks can be dropped, and how to choose among them.

The pure part: the cost of a set, greedy removal, and the mutations of the search
(`sparsity.evolution`). A function measures how good a set is: `engine.choose.tournament`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from secateur.sparsity.evolution import Candidate, Fitness, Stages, ordered

__all__ = ["ATTENTION", "FFN", "WHOLE", "DepthUnit", "DropSpace", "Removal", "greedy", "lowest"]

ATTENTION, FFN = 1, 2
WHOLE = ATTENTION | FFN
"""Which sub-blocks, as bits."""


@dataclass(frozen=True)
class DepthUnit:
    """A layer or sub-block, dropped or kept as a whole.

    Attributes:
        layer: index of the decoder layer.
        parts: ATTENTION, FFN or WHOLE.
        parameters: how many it has.
        cost: how much it counts towards the budget.
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
        units: what can be dropped, in the order of the layers.
        budget: the sum of costs to reach.
        layers: how many decoder layers there are.
    """

    units: tuple[DepthUnit, ...]
    budget: int
    layers: int

    @property
    def run_length(self) -> int:
        """The least number of consecutive units that reach the budget wherever they begin."""
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
        """Dropped units; any one of them could come back, and the budget would still be reached."""
        beyond = self.cost(candidate) - self.budget
        return [i for i in candidate if self.units[i].cost <= beyond]

    def mutate(self, candidate: Candidate, random: Random, order: Sequence[int]) -> Candidate:
        """Exchange one to three units, fewer more often; the budget stays reached.

        A random dropped unit comes back. Others are dropped instead until the budget is reached:
        among the units that can be dropped, the one at place r of the order has a probability in
        proportion to 1/(r+1). Where units differ in cost, spare ones come back.

        Args:
            candidate: to begin with.
            random: source of the draws.
            order: all units; the first ones seem best to drop.
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
        candidate: what is dropped.
        fitness: of the candidate, on the tokens of the last stage; NaN if it was not measured.
        order: all units; the first ones seem best to drop.
    """

    candidate: Candidate
    fitness: float
    order: tuple[int, ...]


def lowest(space: DropSpace, scores: Sequence[float]) -> Removal:
    """Drop the units of lowest score per cost until the budget is reached, and no more.

    Where units differ in cost, the last unit may exceed the budget. Then the units of the highest
    score that are spare come back.
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
    """Drop one unit after the other, each time the one that harms least; yields every step.

    Each step tries all units that are left; stages keep fewer of them on more tokens. Where units
    differ in cost, the harm of a unit is divided by its cost, of which only the part up to the
    budget counts. At the end, spare units come back.
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
