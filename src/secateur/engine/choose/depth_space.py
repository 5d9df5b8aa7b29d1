"""Which sets of layers or sub-blocks can be dropped, and how the best of them is looked for.

The pure part: what a set costs, the greedy removal, the mutations and selections of the search.
What a set is worth is told by a function; `engine.choose.depth_judge` measures it on the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

__all__ = [
    "ATTENTION",
    "FFN",
    "WHOLE",
    "Candidate",
    "Fitness",
    "Space",
    "Stages",
    "Standing",
    "Unit",
    "evolve",
    "greedy",
    "lowest",
]

ATTENTION, FFN = 1, 2
WHOLE = ATTENTION | FFN
"""Which sub-blocks, as bits."""

Candidate = tuple[int, ...]
"""The units that are dropped: ascending indices into `Space.units`."""

Stages = tuple[tuple[int, int], ...]
"""(survivors, tokens) of each stage of a selection."""

Fitness = Callable[[Sequence[Candidate], int, int], Sequence[float]]
"""(candidates, tokens, draw) → what each is worth, lower = better.

Of the tokens that the last stage sees all of, earlier stages see a part; `draw` says which."""

_TRIES = 8  # mutations tried for each mutant that is wanted


@dataclass(frozen=True)
class Unit:
    """What is dropped or kept as one.

    Attributes:
        layer: index of the decoder layer.
        parts: ATTENTION, FFN or WHOLE.
        parameters: how many go with it.
        cost: how far it brings a candidate towards the budget.
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
class Space:
    """All candidates: sets of units whose costs reach the budget.

    Attributes:
        units: what can be dropped, in the order of the layers.
        budget: the sum of costs that has to be reached.
        layers: how many decoder layers there are.
    """

    units: tuple[Unit, ...]
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
        """What a candidate brings towards the budget."""
        return sum(self.units[i].cost for i in candidate)

    def kept(self, candidate: Candidate) -> tuple[int, ...]:
        """The sub-blocks that each layer keeps."""
        kept = [WHOLE] * self.layers
        for i in candidate:
            kept[self.units[i].layer] &= ~self.units[i].parts
        return tuple(kept)

    def names(self, candidate: Candidate) -> list[str]:
        """The names of the units that are dropped."""
        return [self.units[i].name for i in candidate]

    def spare(self, candidate: Candidate) -> list[int]:
        """Dropped units of which one could come back without missing the budget."""
        beyond = self.cost(candidate) - self.budget
        return [i for i in candidate if self.units[i].cost <= beyond]


@dataclass(frozen=True)
class Standing:
    """Where greedy removal or a search stands.

    Attributes:
        candidate: what is dropped so far, or the best so far.
        fitness: of that, on the tokens of the last stage.
        order: all units, those that seem best to drop first.
    """

    candidate: Candidate
    fitness: float
    order: tuple[int, ...]


def lowest(space: Space, scores: Sequence[float]) -> Standing:
    """Drop the units of lowest score per cost until the budget is reached, and no more.

    Where units differ in cost the last may bring more than was missing; then those of the highest
    score that can come back do.
    """
    worth = [score / unit.cost for score, unit in zip(scores, space.units, strict=True)]
    order = _order(worth)
    dropped: Candidate = ()
    for i in order:
        if space.cost(dropped) < space.budget:
            dropped = tuple(sorted((*dropped, i)))
    while spare := space.spare(dropped):
        back = max(spare, key=lambda i: scores[i])
        dropped = tuple(i for i in dropped if i != back)
    return Standing(dropped, math.nan, tuple(order))


def greedy(space: Space, stages: Stages, fitness: Fitness) -> Iterator[Standing]:
    """Drop one unit after the other, each time the one whose loss hurts least; yields every step.

    Of all units that are left each is tried; stages keep fewer of them on more tokens. Where units
    differ in cost, what counts is the fitness lost per cost, of which no more counts than is still
    missing; and what turns out not to be needed at the end comes back.
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
            ranked = _order([(v - base) / c for v, c in zip(values, counted, strict=True)])
            tried = tried or [rest[j] for j in ranked]
            rest, fitnesses = [rest[j] for j in ranked[:keep]], [values[j] for j in ranked[:keep]]
        dropped = tuple(sorted((*dropped, rest[0])))
        step += 1
        order = (*dropped, *(i for i in tried if i != rest[0]))
        yield Standing(dropped, fitnesses[0], order)
    while spare := space.spare(dropped):
        without = [tuple(i for i in dropped if i != back) for back in spare]
        worth = fitness(without, stages[-1][1], step)
        best = _order(worth)[0]
        dropped = without[best]
        yield Standing(dropped, worth[best], order)


def evolve(
    space: Space,
    start: Standing,
    generations: int,
    offspring: int,
    stages: Stages,
    seed: int,
    fitness: Fitness,
) -> Iterator[Standing]:
    """Exchange dropped units for kept ones as long as the model gains; yields every generation.

    Each generation makes mutants of the best that were not seen before, stages keep fewer of them
    on more tokens, and the last survivor replaces the best if its fitness is lower.

    Args:
        space: what can be dropped.
        start: the best so far, and the order in which units seem worth dropping.
        generations: at most so many; fewer if there are no mutants left.
        offspring: mutants in a generation.
        stages: (survivors, tokens).
        seed: of the mutations.
        fitness: what candidates are worth.
    """
    best = start
    seen = {start.candidate}
    for generation in range(generations):
        random = Random(f"{seed} {generation}")
        mutants: list[Candidate] = []
        for _ in range(_TRIES * offspring):
            mutant = mutate(best, space, random)
            if mutant not in seen and len(mutants) < offspring:
                mutants.append(mutant)
                seen.add(mutant)
        if not mutants:
            return
        values: Sequence[float] = []
        for keep, tokens in stages:
            if len(mutants) > keep or tokens == stages[-1][1]:
                values = fitness(mutants, tokens, generation)
                order = _order(values)[:keep]
                mutants, values = [mutants[i] for i in order], [values[i] for i in order]
        if values[0] < best.fitness:
            best = Standing(mutants[0], values[0], best.order)
        yield best


def mutate(best: Standing, space: Space, random: Random) -> Candidate:
    """One to three exchanges, fewer more often; the budget stays reached.

    Any dropped unit comes back. Others are dropped instead until the budget is reached: the unit
    of place r in the order, among those that can be, with a probability in proportion to 1/(r+1).
    Where units differ in cost, dropped ones that are not needed any more come back.
    """
    dropped = set(best.candidate)
    for _ in range(min(random.randint(1, 3), random.randint(1, 3))):
        back = random.choice(sorted(dropped))
        dropped.discard(back)
        while space.cost(tuple(dropped)) < space.budget:
            eligible = [i for i in best.order if i not in dropped and i != back]
            if not eligible:
                return best.candidate
            weights = [1 / (place + 1) for place in range(len(eligible))]
            dropped.add(random.choices(eligible, weights)[0])
        while spare := space.spare(tuple(sorted(dropped))):
            dropped.discard(random.choice(spare))
    return tuple(sorted(dropped))


def _order(values: Sequence[float]) -> list[int]:
    """Indices from the lowest value up; what is not a number comes last."""
    return sorted(range(len(values)), key=lambda i: (math.isnan(values[i]), values[i]))
