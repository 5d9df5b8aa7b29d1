"""Search: linears trade levels of sparsity as long as the model gains by it.

The pure part: which levels there are, and which trades keep the number of zeros.
`engine.search.allocation` measures candidates on the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Annotated, ClassVar, NamedTuple, Protocol, runtime_checkable

from pydantic import Field
from torch import Tensor

from secateur.registry import CheckedPart, Count
from secateur.sparsity.allocation import Allocation, DenseLayer, Kept, allocations
from secateur.sparsity.allocation.budget import Granularity
from secateur.sparsity.allocation.layer_sensitivity import ranks
from secateur.sparsity.evolution import Candidate, Evolution, Fitness, Leader, Stages
from secateur.sparsity.hessian import relative_output_error

_MOST_MOVES = 16  # linears that one trade may change
_PAIRS = 50  # pairs of linears that are drawn until one can trade


class Ladder(NamedTuple):
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
    """The levels of every linear, chosen so that linears of different size can trade.

    A level changes the sparsity by about `step`. Where the units of all linears allow it, a level
    of each linear is worth a multiple of the smallest one; then 8 levels of a small linear may be
    exactly 1 level of a large one. Otherwise a level of each linear is worth whole units of its
    own, and trades look for levels that match. Where one linear has very coarse units (a KV group
    is worth hundreds of neurons), a few levels of a finer linear are worth one unit of it.

    Args:
        grains: of every linear that competes.
        levels: how many to each side.
        step: the sparsity that a level changes.
    """
    smallest = step * min(g.total for g in grains.values())  # weights of one step, least of all
    common = math.lcm(*(g.weights for g in grains.values()))
    common *= max(1, round(smallest / common))
    coarsest = max(g.weights for g in grains.values())
    found = {}
    for name, grain in grains.items():
        # A common multiple of all units is of use only if it is about a step of the smallest.
        base = common if common <= 2 * smallest else grain.weights
        unit = base * max(1, round(step * grain.total / base))
        if coarsest > 2 * smallest:
            whole, ideal = coarsest // grain.weights, unit // grain.weights
            # Of the divisors of that unit the one nearest to a step, in the ratio.
            parts = [d for d in range(1, whole + 1) if whole % d == 0]
            unit = min(parts, key=lambda d: abs(math.log(d / ideal))) * grain.weights
        down = (grain.uniform - grain.lowest) * grain.weights // unit
        up = (grain.highest - grain.uniform) * grain.weights // unit
        found[name] = Ladder(grain, unit, -min(levels, down), min(levels, up))
    return found


def is_measured_alone(allocation: Allocation) -> bool:
    """Whether an allocation is given the divergence that pruning each linear alone makes."""
    return allocation.judged_tokens > 0 and not isinstance(allocation, LevelSearch)


@runtime_checkable
class LevelSearch(Allocation, Protocol):
    """The contract of an allocation that searches: it judges candidates on `judged_tokens`.

    `observe` keeps the weight of each linear at each level (`name/level`), and its error at the
    target (`name/error`). `engine.search.allocation` measures candidates on the model.
    """

    @property
    def generations(self) -> int:
        """How many generations there are."""
        ...

    def ladders(self, grains: Mapping[str, Granularity]) -> dict[str, Ladder]:
        """The levels of every linear."""
        ...

    def informed(self, errors: Mapping[str, float], rungs: Mapping[str, Ladder]) -> Candidate:
        """A candidate by the errors of the linears at the target."""
        ...

    def climb(
        self, rungs: Sequence[Ladder], informed: Candidate, fitness: Fitness
    ) -> Iterator[Leader]:
        """The best candidate after the start and after each generation."""
        ...


@allocations.register("search")
@dataclass(frozen=True)
class Search(CheckedPart):
    """Evolutionary search over levels of sparsity, measured on the whole model.

    The run's own method solves every linear of the dense model at each of its levels. The search
    (`Evolution`) begins with the better of two candidates: uniform sparsity, and levels that
    follow the sensitivity of the linears. It minimises

        fitness = mean over tokens of KL( softmax(dense logits) ‖ softmax(candidate logits) )

    so by this measure the result is never worse than uniform sparsity.

    Paper: Sieberling et al. 2024, "EvoPress: Accurate Dynamic Model Compression via Evolutionary
    Search", arXiv:2410.14649. Deviations: neighbouring levels differ by a step of sparsity, in the
    paper by a number of weights; a trade moves as many levels as keep the number of zeros; one
    start follows sensitivity; the last stage has the same tokens in every generation, so the best
    candidate is measured once. The defaults are for two cores (the paper: 64 offspring, 400
    generations, 2 048 to 65 536 tokens).

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

    levels: Count = 3
    step: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    generations: int = 16
    offspring: int = 8
    stages: Stages = ((2, 512), (1, 2048))
    seed: int = 0
    requires: ClassVar[frozenset[str]] = frozenset({"gram"})
    uses: ClassVar[frozenset[str]] = frozenset({"score", "solver"})

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.evolution  # checks the rest

    @property
    def evolution(self) -> Evolution:
        """The search over candidates."""
        return Evolution(self.generations, self.offspring, self.stages, self.seed)

    @property
    def reach(self) -> float:
        """Half a step beyond the outermost level, for levels that were rounded."""
        return (self.levels + 0.5) * self.step

    @property
    def judged_tokens(self) -> int:
        """Tokens that the last stage measures on."""
        return self.evolution.full_tokens

    def working_bytes(self, weights: int, itemsize: int) -> int:
        """Every level that is kept of it."""
        return self.disk_bytes(weights, itemsize)

    def tokens(self, calibration: int, linears: int) -> int:
        """Tokens that pass: once for the levels; then the dense model, two starts, every stage."""
        return calibration + 3 * self.judged_tokens + self.evolution.tokens

    def ladders(self, grains: Mapping[str, Granularity]) -> dict[str, Ladder]:
        """The levels of every linear."""
        return ladders(grains, self.levels, self.step)

    def observe(self, layer: DenseLayer) -> dict[str, Tensor]:
        """The weight of each linear at each level (`name/level`), and its error at level 0."""
        kept = {}
        all_ladders = self.ladders(layer.grains) if layer.weights else {}
        for name, weight in layer.weights.items():
            ladder = all_ladders[name]
            for level in range(ladder.lowest, ladder.highest + 1):
                kept[f"{name}/{level}"] = layer.solve(name, ladder.sparsity(level))
            gram = layer.statistics[name]["gram"]
            kept[f"{name}/error"] = relative_output_error(weight, kept[f"{name}/0"], gram)
        for name, sparsity in layer.fixed.items():
            kept[f"{name}/0"] = layer.solve(name, sparsity)
        return kept

    def informed(self, errors: Mapping[str, float], rungs: Mapping[str, Ladder]) -> Candidate:
        """A candidate by sensitivity: among linears of one size, a lower error gets a higher level.

        The linear of rank r among n gets the level `top · (1 − 2r/(n−1))`, rounded, and the one of
        rank n−1−r its negative, so the number of zeros stays. The top is two thirds of the levels:
        by default ±0.1, as in the allocation `layer-sensitivity`.
        """
        # Pairs of a robust and a tender linear of one size: what one loses more, the other keeps.
        top = max(1, round(2 * self.levels / 3))
        level = dict.fromkeys(rungs, 0)
        for unit in {ladder.unit for ladder in rungs.values()}:
            same = {n: errors[n] for n, ladder in rungs.items() if ladder.unit == unit}
            # Equal errors share a rank; the sort is stable, so their order is that of the model.
            order = ranks(same)
            ordered = sorted(same, key=lambda n: order[n])
            for index in range(len(ordered) // 2):
                robust, tender = ordered[index], ordered[-1 - index]
                wanted = round(top * (1 - 2 * index / (len(ordered) - 1)))
                wanted = min(wanted, rungs[robust].highest, -rungs[tender].lowest)
                if errors[robust] < errors[tender]:
                    level[robust], level[tender] = wanted, -wanted
        return tuple(level.values())

    def climb(
        self, rungs: Sequence[Ladder], informed: Candidate, fitness: Fitness
    ) -> Iterator[Leader]:
        """Search from the better of the uniform candidate and the informed one.

        Args:
            rungs: the levels of each linear.
            informed: from `informed`.
            fitness: measures candidates; a candidate is a level for each linear.
        """
        uniform = (0,) * len(rungs)
        return self.evolution.climb([uniform, informed], partial(mutate, rungs=rungs), fitness)

    def allocate(
        self, kept: Kept, grains: Mapping[str, Granularity], sparsity: float
    ) -> dict[str, float]:
        """The sparsity of each linear in the candidate by sensitivity, where the search starts."""
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


def mutate(candidate: Candidate, random: Random, rungs: Sequence[Ladder]) -> Candidate:
    """Make one to three trades, fewer more often; each keeps the number of zeros.

    A trade takes a levels down of linears whose level is worth u weights, and b up of linears
    whose level is worth v, with a·u = b·v; a = b = 1 for linears of one size.
    """
    levels = list(candidate)
    # The smaller of two throws: one trade 5 times of 9, two 3 times, three once.
    for _ in range(min(random.randint(1, 3), random.randint(1, 3))):
        for _ in range(_PAIRS):
            if _trade(levels, rungs, random):
                break
    return tuple(levels)


def _trade(levels: list[int], rungs: Sequence[Ladder], random: Random) -> bool:
    """Make one trade in place; False if the pair that was drawn cannot trade."""
    down, up = random.randrange(len(rungs)), random.randrange(len(rungs))
    worth_down, worth_up = rungs[down].unit, rungs[up].unit
    shared = math.gcd(worth_down, worth_up)  # the smallest a, b with a·u = b·v
    count_down, count_up = worth_up // shared, worth_down // shared
    if down == up or count_down + count_up > _MOST_MOVES:
        return False
    # The pair itself moves one level; further levels come from other linears of the same worth.
    others = [(i, x, levels[i]) for i, x in enumerate(rungs) if i not in (down, up)]
    fallers = [i for i, x, level in others if x.unit == worth_down and level > x.lowest]
    risers = [i for i, x, level in others if x.unit == worth_up and level < x.highest]
    fits = levels[down] > rungs[down].lowest and levels[up] < rungs[up].highest
    if not fits or len(fallers) < count_down - 1 or len(risers) < count_up - 1:
        return False
    for i in (down, *random.sample(fallers, count_down - 1)):
        levels[i] -= 1
    for i in (up, *random.sample(risers, count_up - 1)):
        levels[i] += 1
    return True
