"""Search: levels of sparsity are traded between linears as long as the model gains by it.

The pure part: which levels there are, which trades keep the budget, who survives. What a
candidate is worth is told by a function; `engine.choose.tournament` measures it on the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import RecipeError
from secateur.sparsity.allocation import DenseLayer, Kept, allocations
from secateur.sparsity.allocation.budget import Granularity
from secateur.sparsity.allocation.layer_sensitivity import ranks
from secateur.sparsity.hessian import relative_output_error

__all__ = [
    "Candidate",
    "Fitness",
    "Ladder",
    "Search",
    "Standing",
    "check_stages",
    "climb",
    "ladders",
    "mutate",
]

Candidate = tuple[int, ...]
"""A level for each linear, in the order of the ladders; 0 is the target sparsity."""

Fitness = Callable[[Sequence[Candidate], int, int], Sequence[float]]
"""(candidates, tokens, draw) → what each is worth, lower = better.

Of the tokens that the last stage sees all of, earlier stages see a part; `draw` says which."""

_MOST_MOVES = 16  # linears one trade may touch
_TRIES = 50


@dataclass(frozen=True)
class Ladder:
    """The levels of one linear.

    Attributes:
        grain: how finely it can be pruned.
        unit: weights that one level is worth.
        lowest: the lowest legal level, at most 0.
        highest: the highest legal level, at least 0.
    """

    grain: Granularity
    unit: int
    lowest: int
    highest: int

    def sparsity(self, level: int) -> float:
        """The sparsity of a level: (uniform + level · unit) / size."""
        return (self.grain.uniform + level * self.unit // self.grain.weights) / self.grain.units


def ladders(grains: Mapping[str, Granularity], levels: int, step: float) -> dict[str, Ladder]:
    """The levels of every linear, such that linears of different size can trade.

    A level is worth about `step` of a linear: a multiple of what a level of the smallest linear
    is worth, where the units of all linears allow that; then 8 levels of a small linear may be
    exactly 1 of a large one. Otherwise each linear has levels of its own whole units, and trades
    find those that match. Where one linear has very coarse units (a KV group is worth hundreds of
    neurons), the levels of finer ones are such that a few of them are one of those.

    Args:
        grains: of every linear that competes.
        levels: how many to each side.
        step: the sparsity that a level changes.
    """
    smallest = step * min(g.total for g in grains.values())
    common = math.lcm(*(g.weights for g in grains.values()))
    common *= max(1, round(smallest / common))
    coarsest = max(g.weights for g in grains.values())
    found = {}
    for name, grain in grains.items():
        base = common if common <= 2 * smallest else grain.weights
        unit = base * max(1, round(step * grain.total / base))
        if coarsest > 2 * smallest:
            unit = nearest_part(coarsest // grain.weights, unit // grain.weights) * grain.weights
        down = (grain.uniform - grain.lowest) * grain.weights // unit
        up = (grain.highest - grain.uniform) * grain.weights // unit
        found[name] = Ladder(grain, unit, -min(levels, down), min(levels, up))
    return found


def nearest_part(whole: int, wished: int) -> int:
    """The divisor of `whole` nearest to what is wished, by ratio."""
    parts = [d for d in range(1, whole + 1) if whole % d == 0]
    return min(parts, key=lambda d: abs(math.log(d / wished)))


@allocations.register("search")
@dataclass(frozen=True)
class Search:
    """Evolutionary search over levels of sparsity, judged on the whole model.

    Every linear of the dense model is solved at each of its levels by the run's own method. From
    the better of the uniform candidate and one informed by sensitivity, each generation makes
    `offspring` mutants of the best; stages of selection keep fewer and fewer of them on more and
    more tokens; the last survivor replaces the best if its fitness on the tokens of the last
    stage is lower. So the result is never worse than uniform by that fitness:

        fitness = mean over tokens of KL( softmax(dense logits) ‖ softmax(candidate logits) )

    Paper: Sieberling et al. 2024, "EvoPress: Accurate Dynamic Model Compression via Evolutionary
    Search", arXiv:2410.14649. Deviations: levels lie a step of sparsity apart, not one number of
    weights for all linears, and a trade moves as many levels as keep the number of zeros; the
    start is informed; the last stage has the same tokens in every generation, so that the best is
    not judged again; defaults are for two cores (the paper: 64 offspring, 400 generations, 2 048
    to 65 536 tokens).

    Args:
        levels: levels above and below the target.
        step: sparsity between levels.
        generations: how many; 0 takes the better start.
        offspring: mutants in a generation.
        stages: (survivors, tokens) of each stage of selection; the last keeps 1.
        seed: of the mutations.

    Raises:
        RecipeError: a parameter is out of range.
    """

    levels: int = 3
    step: float = 0.05
    generations: int = 16
    offspring: int = 8
    stages: tuple[tuple[int, int], ...] = ((2, 512), (1, 2048))
    seed: int = 0
    requires: ClassVar[frozenset[str]] = frozenset({"gram"})
    uses: ClassVar[frozenset[str]] = frozenset({"score", "solver"})

    def __post_init__(self) -> None:
        whole = self.levels >= 1 and self.offspring >= 1 and self.generations >= 0
        if not (whole and 0 < self.step < 0.5):
            raise RecipeError(
                f"a search with {self.levels} levels of {self.step}, {self.offspring} offspring "
                f"and {self.generations} generations cannot be made",
                remedy="give levels and offspring of 1 or more, and a step in (0, 0.5)",
            )
        check_stages(self.stages, "((2, 512), (1, 2048))")

    @property
    def reach(self) -> float:
        """Half a step beyond the outermost level, for levels that were rounded."""
        return (self.levels + 0.5) * self.step

    @property
    def judged_tokens(self) -> int:
        """Tokens that the last stage judges by."""
        return self.stages[-1][1]

    def working_bytes(self, weights: int, itemsize: int) -> int:
        """Every level that is kept of it."""
        return self.disk_bytes(weights, itemsize)

    def tokens(self, calibration: int) -> int:
        """One pass for the levels; then the dense model, two starts, and every stage."""
        tokens, entering = 3 * self.judged_tokens, self.offspring
        for survivors, seen in self.stages:
            tokens += self.generations * entering * seen
            entering = survivors
        return calibration + tokens

    def ladders(self, grains: Mapping[str, Granularity]) -> dict[str, Ladder]:
        """The levels of every linear."""
        return ladders(grains, self.levels, self.step)

    def look(self, layer: DenseLayer) -> dict[str, Tensor]:
        """The weight of each linear at each level (`name/level`), and its error at level 0."""
        kept = {}
        all_ladders = self.ladders(layer.grains) if layer.weights else {}
        for name, weight in layer.weights.items():
            ladder = all_ladders[name]
            for level in range(ladder.lowest, ladder.highest + 1):
                kept[f"{name}/{level}"] = layer.solve(name, ladder.sparsity(level))
            error = relative_output_error(weight, kept[f"{name}/0"], layer.statistics[name]["gram"])
            kept[f"{name}/error"] = torch.tensor(error, dtype=torch.float64)
        for name, sparsity in layer.fixed.items():
            kept[f"{name}/0"] = layer.solve(name, sparsity)
        return kept

    def informed(self, errors: Mapping[str, float], rungs: Mapping[str, Ladder]) -> Candidate:
        """A start by sensitivity: of linears of one size, the lower the error the higher the level.

        The linear of rank r among n gets the level `top · (1 − 2r/(n−1))`, rounded, and the one of
        rank n−1−r its negative, so the budget is kept. The top is two thirds of the levels: by
        default ±0.1, as far as the allocation `layer-sensitivity` goes.
        """
        top = max(1, round(2 * self.levels / 3))
        level = dict.fromkeys(rungs, 0)
        for unit in {ladder.unit for ladder in rungs.values()}:
            same = {n: errors[n] for n, ladder in rungs.items() if ladder.unit == unit}
            order = ranks(same)
            ordered = sorted(same, key=lambda n: order[n])
            for index in range(len(ordered) // 2):
                robust, tender = ordered[index], ordered[-1 - index]
                wanted = round(top * (1 - 2 * index / (len(ordered) - 1)))
                wanted = min(wanted, rungs[robust].highest, -rungs[tender].lowest)
                if errors[robust] < errors[tender]:
                    level[robust], level[tender] = wanted, -wanted
        return tuple(level.values())

    def wish(
        self, kept: Kept, grains: Mapping[str, Granularity], sparsity: float
    ) -> dict[str, float]:
        """Where the search starts: the candidate informed by sensitivity."""
        rungs = self.ladders(grains)
        errors = {
            key.removesuffix("/error"): float(error)
            for key, error in kept()
            if key.endswith("/error")
        }
        levels = zip(rungs.items(), self.informed(errors, rungs), strict=True)
        return {name: ladder.sparsity(level) for (name, ladder), level in levels}

    def disk_bytes(self, weights: int, itemsize: int) -> int:
        """Every level of every weight."""
        return (2 * self.levels + 1) * weights * itemsize


def mutate(candidate: Candidate, rungs: Sequence[Ladder], random: Random) -> Candidate:
    """One to three trades, fewer more often; each keeps the number of zeros.

    A trade takes a levels down of linears whose level is worth u weights, and b up of linears
    whose level is worth v, with a·u = b·v; a = b = 1 for linears of one size.
    """
    levels = list(candidate)
    for _ in range(min(random.randint(1, 3), random.randint(1, 3))):
        for _ in range(_TRIES):
            if _trade(levels, rungs, random):
                break
    return tuple(levels)


def _trade(levels: list[int], rungs: Sequence[Ladder], random: Random) -> bool:
    """Make one trade in place; False if the pair that was drawn cannot trade."""
    down, up = random.randrange(len(rungs)), random.randrange(len(rungs))
    worth_down, worth_up = rungs[down].unit, rungs[up].unit
    shared = math.gcd(worth_down, worth_up)
    count_down, count_up = worth_up // shared, worth_down // shared
    if down == up or count_down + count_up > _MOST_MOVES:
        return False
    fallers = [
        i
        for i, ladder in enumerate(rungs)
        if ladder.unit == worth_down and levels[i] > ladder.lowest and i not in (down, up)
    ]
    risers = [
        i
        for i, ladder in enumerate(rungs)
        if ladder.unit == worth_up and levels[i] < ladder.highest and i not in (down, up)
    ]
    fits = levels[down] > rungs[down].lowest and levels[up] < rungs[up].highest
    if not fits or len(fallers) < count_down - 1 or len(risers) < count_up - 1:
        return False
    for i in (down, *random.sample(fallers, count_down - 1)):
        levels[i] -= 1
    for i in (up, *random.sample(risers, count_up - 1)):
        levels[i] += 1
    return True


@dataclass(frozen=True)
class Standing:
    """Where a search stands.

    Attributes:
        generation: how many are done.
        best: the best candidate so far.
        fitness: of the best, on the tokens of the last stage.
        uniform: fitness of the uniform candidate, on the same tokens.
    """

    generation: int
    best: Candidate
    fitness: float
    uniform: float


def climb(
    search: Search,
    rungs: Sequence[Ladder],
    informed: Candidate,
    fitness: Fitness,
    standing: Standing | None = None,
) -> Iterator[Standing]:
    """Search generation by generation; yields the standing after the start and after each.

    The mutations of a generation depend on the seed, its number and the best alone, so a search
    that goes on from a standing ends as one that was never stopped.

    Args:
        search: the parameters.
        rungs: the levels of each linear.
        informed: a start to try besides uniform.
        fitness: what candidates are worth.
        standing: where a stopped search stood.
    """
    if standing is None:
        uniform = (0,) * len(rungs)
        starts = [uniform, informed] if informed != uniform else [uniform]
        worth = fitness(starts, search.judged_tokens, 0)
        better = _order(worth)[0]
        standing = Standing(0, starts[better], worth[better], worth[0])
        yield standing
    for generation in range(standing.generation, search.generations):
        random = Random(f"{search.seed} {generation}")
        survivors = _offspring(search, standing.best, rungs, random)
        values: Sequence[float] = []
        for keep, tokens in search.stages:
            if len(survivors) > keep or tokens == search.judged_tokens:
                values = fitness(survivors, tokens, generation) if survivors else []
                order = _order(values)[:keep]
                survivors, values = [survivors[i] for i in order], [values[i] for i in order]
        best, value = standing.best, standing.fitness
        if survivors and values[0] < value:
            best, value = survivors[0], values[0]
        standing = Standing(generation + 1, best, value, standing.uniform)
        yield standing


def _offspring(
    search: Search, parent: Candidate, rungs: Sequence[Ladder], random: Random
) -> list[Candidate]:
    """Different mutants of the best; fewer than asked where a small model has no more."""
    found: dict[Candidate, None] = {}
    for _ in range(4 * search.offspring):
        mutant = mutate(parent, rungs, random)
        if mutant != parent:
            found[mutant] = None
        if len(found) == search.offspring:
            break
    return list(found)


def _order(values: Sequence[float]) -> list[int]:
    """Indices from the lowest value up; what is not a number comes last."""
    return sorted(range(len(values)), key=lambda i: (math.isnan(values[i]), values[i]))


def check_stages(stages: tuple[tuple[int, int], ...], example: str) -> None:
    """Refuse stages of a selection that do not narrow down to one, on ever more tokens.

    Args:
        stages: (survivors, tokens that they are judged by).
        example: of good ones, for the remedy.

    Raises:
        RecipeError: they do not.
    """
    survivors, tokens = [s for s, _ in stages], [t for _, t in stages]
    falling = survivors == sorted(survivors, reverse=True) and survivors[-1:] == [1]
    if not (falling and tokens == sorted(tokens) and tokens[0] > 0):
        raise RecipeError(
            f"stages are {stages}",
            remedy="give (survivors, tokens) with ever fewer survivors on ever more tokens, "
            f"1 at last; for example {example}",
        )
