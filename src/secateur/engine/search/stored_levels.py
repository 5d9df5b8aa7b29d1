"""Chooses how each matrix is stored, from measurements on the model.

The candidates are checkpoints of one model whose linears were rounded or pruned to several levels.
Level 0 is the model itself. A candidate takes each linear from one of the levels. Activations are
rounded where the kernels will round them.

`choose_levels` finds the smallest files whose loss stays within a bound; each further level is
smaller:

1. All linears on one level. The smallest level within the bound is the base. If it is the last
   level, it is the answer.
2. From the base, the linears of one decoder layer at a time go one level further. The rise of the
   loss is shared out among the linears of the layer by their output errors.
3. The linears go one level further in the order of rise per saved byte. Bisection finds how many
   can go within the bound.

So the answer is a candidate whose loss was measured. It need not be the smallest one of all.

`FitSearch` finds the best candidate within a budget:

1. Every level is measured alone: all linears on it. These are the single techniques.
2. The linears of one decoder layer at a time go to the probe level. The layer's divergence, divided
   by the output errors of its linears, says what an error costs there:

   rise(linear, level) = slope(layer) · error(linear, level) · correction(level)

   Errors are squared and relative: ‖(W − Ŵ)X‖² / ‖WX‖². The correction of a level makes the rises
   of all linears on it add up to what was measured in step 1.
3. For some budgets, the best candidate by these rises (`knapsack.Knapsack`) is measured: the
   frontier.
4. From the best one for the given budget, an evolutionary search measures its mutants.

Divergence is the mean KL(dense ‖ candidate) of the next-token probabilities, in nats per token.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.engine.search.candidate_evaluator import (
    FitnessCache,
    WeightVariants,
    cut_windows,
)
from secateur.engine.search.knapsack import Cost, Knapsack, fits
from secateur.engine.stream.embedding_and_head import EmbeddingAndHead
from secateur.engine.stream.targets import CheckpointTarget
from secateur.models.architecture import Linear
from secateur.models.checkpoint import CheckpointReader
from secateur.progress import Progress
from secateur.sparsity.evolution import Candidate, Evolution

RANKING_TOKENS = 2048
"""Tokens on which a layer's rise of the loss is measured; the whole text decides in the end."""

LEAST_RISE = 1e-6
"""A rise of the loss in nats below which the measurement says nothing."""


@dataclass(frozen=True)
class Level:
    """A form in which all linears are stored.

    Attributes:
        reader: the checkpoint whose linears have these values.
        bytes_of: the size of each linear when stored, by its name.
        error_of: the squared relative error of each linear's outputs, ‖(W − Ŵ)X‖² / ‖WX‖²; empty
            for level 0.
        rounds_inputs: whether the values are integers, so that kernels round the inputs.
    """

    reader: CheckpointReader
    bytes_of: Mapping[str, int]
    error_of: Mapping[str, float]
    rounds_inputs: bool = False


@dataclass(frozen=True)
class ChosenLevels:
    """The result of a choice.

    Attributes:
        level_of: the level of each linear, by its name.
        loss: mean loss of the next token with these levels, in nats.
        source_loss: that of level 0, on the same text.
        uniform_loss: the loss with all linears on one level, for each level.
    """

    level_of: dict[str, int]
    loss: float
    source_loss: float
    uniform_loss: tuple[float, ...]


@torch.no_grad()
def choose_levels(
    target: CheckpointTarget,
    levels: Sequence[Level],
    windows: Tensor,
    bound: float,
    file: Path | None,
    progress: Progress,
) -> ChosenLevels:
    """Choose the level of every linear.

    Args:
        target: the model of level 0.
        levels: at least two; each is stored in fewer bytes than the one before.
        windows: tokens to measure the loss on [windows, length].
        bound: how much the loss may rise above that of level 0, in nats per token.
        file: file of the measured values, which a stopped run resumes from; None for none.
        progress: receives the steps.
    """
    names = list(levels[0].bytes_of)
    tokens = windows.numel()
    outer = EmbeddingAndHead(target, cut_windows(windows, tokens))
    variants = StoredVariants(outer, names, levels)
    fitness = variants.fitness("loss", tokens, file, progress, levels=len(levels))
    progress.start("choosing values", len(levels) + len(target.layers) + len(names).bit_length())
    every = [(level,) * len(names) for level in range(len(levels))]
    losses = tuple(fitness(every, tokens, 0))
    progress.step(len(levels))
    allowed = losses[0] + bound
    base = max(level for level, loss in enumerate(losses) if level == 0 or loss <= allowed)
    best, loss = every[base], losses[base]
    if base + 1 < len(levels):
        order = _further_order(fitness, variants, levels, base, progress)
        best, loss = _furthest(fitness, best, loss, order, allowed, tokens, progress)
    progress.finish()
    return ChosenLevels(dict(zip(names, best, strict=True)), loss, losses[0], losses)


def _further_order(
    fitness: FitnessCache,
    variants: StoredVariants,
    levels: Sequence[Level],
    base: int,
    progress: Progress,
) -> list[int]:
    """The places of linears, by the rise of the loss per byte saved on the level after `base`."""
    names = variants.names
    here, further = levels[base], levels[base + 1]
    (reference,) = fitness([(base,) * len(names)], RANKING_TOKENS, 0)
    rise_per_byte = {}
    for places in variants.places:
        tried = tuple(base + (place in places) for place in range(len(names)))
        (loss,) = fitness([tried], RANKING_TOKENS, 0)
        rise = max(loss - reference, LEAST_RISE)
        errors = {place: further.error_of[names[place]] for place in places}
        total = sum(errors.values()) or 1.0
        for place, error in errors.items():
            saved = here.bytes_of[names[place]] - further.bytes_of[names[place]]
            rise_per_byte[place] = rise * error / total / max(saved, 1)
        progress.step()
    return sorted(rise_per_byte, key=rise_per_byte.__getitem__)


def _furthest(
    fitness: FitnessCache,
    base: Candidate,
    loss: float,
    order: Sequence[int],
    allowed: float,
    tokens: int,
    progress: Progress,
) -> tuple[Candidate, float]:
    """The base with as many linears one level further, in order, as the bound allows."""
    best, low, high = base, 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        raised = set(order[:middle])
        tried = tuple(level + (place in raised) for place, level in enumerate(base))
        (found,) = fitness([tried], tokens, 0)
        if found <= allowed:
            best, loss, low = tried, found, middle
        else:
            high = middle
        progress.step()
    return best, loss


class StoredVariants(WeightVariants):
    """Decoder layers whose linears come from several checkpoints.

    Args:
        outer: embedding and head of the model of level 0.
        names: names of the linears; a candidate has a level for each.
        levels: the checkpoints.
    """

    def __init__(
        self, outer: EmbeddingAndHead, names: Sequence[str], levels: Sequence[Level]
    ) -> None:
        super().__init__(outer, names)
        self.levels = levels

    def source(self, number: int) -> AbstractContextManager[Any]:
        """Nothing to open: readers read single tensors."""
        return nullcontext()

    def rounds_inputs(self, level: int | None) -> bool:
        """Whether the values of a level are integers."""
        return bool(level) and self.levels[level or 0].rounds_inputs

    def weight_of(self, linear: Linear, level: int | None, source: Any) -> Tensor | None:
        """The weight of a level above 0."""
        if not level:
            return None
        target = self.outer.target
        assert isinstance(target, CheckpointTarget)
        weight = self.levels[level].reader.read(target.stored[f"{linear.name}.weight"])
        return weight.to(target.device, target.dtype)


SURVEY_TOKENS = 2048
FRONTIER = 8
"""Budgets of the frontier, evenly spaced between the smallest and the largest cost."""

LEAST_ERROR = 1e-9


@dataclass(frozen=True)
class FitLevel:
    """A level with its name and family.

    Attributes:
        name: such as `50 % int4`.
        family: `quantize`, `prune` or `both`.
        level: the checkpoint, the sizes and the errors.
    """

    name: str
    family: str
    level: Level


@dataclass(frozen=True)
class Point:
    """A measured candidate.

    Attributes:
        candidate: the level of each linear.
        cost: of the linears, of each kind.
        divergence: from the dense model, in nats per token.
        predicted: what the survey predicted.
        families: the families of the levels it may use: `quantize`, `prune` or `all`.
        name: of a single level; empty for a mix.
    """

    candidate: Candidate
    cost: Cost
    divergence: float
    predicted: float
    families: str
    name: str = ""

    def format_levels(self, levels: Sequence[str]) -> str:
        """The levels of the linears, such as `int4 in 120 of 210 linear layers, int8 in the rest`.

        Args:
            levels: the names of all levels.
        """
        counts = Counter(levels[level] for level in self.candidate).most_common()
        (most, count), *others = counts
        if not others:
            return f"{most} in all linear layers"
        rest = [f"{name} in {number}" for name, number in others]
        if len(others) == 1:
            rest = [f"{others[0][0]} in the rest"]
        return ", ".join([f"{most} in {count} of {len(self.candidate)} linear layers", *rest])


def unbeaten(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in cost and divergence, by cost."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.divergence)):
        if not found or point.divergence < found[-1].divergence:
            found.append(point)
    return found


class FitSearch:
    """The search on one model.

    Args:
        target: the dense model.
        levels: the levels; 0 is the dense model itself.
        costs: of each linear on each level, by the name of the linear.
        windows: tokens to measure on [windows, length].
        file: file of the measured values, which a stopped run resumes from.
        progress: receives the steps.
    """

    def __init__(
        self,
        target: CheckpointTarget,
        levels: Sequence[FitLevel],
        costs: Mapping[str, Sequence[Cost]],
        windows: Tensor,
        file: Path | None,
        progress: Progress,
    ) -> None:
        self.levels, self.progress = list(levels), progress
        self.names = list(costs)
        self.costs = tuple(tuple(costs[name]) for name in self.names)
        self.tokens = windows.numel()
        outer = EmbeddingAndHead(target, cut_windows(windows, self.tokens))
        self.variants = StoredVariants(outer, self.names, [one.level for one in levels])
        labels = [one.name for one in levels]
        self.fitness = self.variants.fitness(
            "divergence", self.tokens, file, progress, levels=labels
        )
        self.knapsack = Knapsack(self.costs, tuple((0.0,) * len(levels) for _ in self.names))

    @torch.no_grad()
    def singles(self) -> list[Point]:
        """Every level alone, measured."""
        count = len(self.levels)
        self.progress.start("measuring single levels", count)
        points = []
        for number, one in enumerate(self.levels):
            candidate = (number,) * len(self.names)
            (found,) = self.fitness([candidate], self.tokens, 0)
            points.append(self.point(candidate, found, one.family, one.name))
            self.progress.step(note=one.name)
        self.progress.finish()
        return points

    @torch.no_grad()
    def survey(self, probe: int) -> None:
        """Measure what errors cost in each layer, and fill the knapsack.

        Args:
            probe: the level that layers go to, one at a time.
        """
        layers = [places for places in self.variants.places if places]
        self.progress.start("measuring layers", len(layers))
        rises: list[tuple[float, ...]] = [()] * len(self.names)
        for places in layers:
            tried = tuple(probe if place in places else 0 for place in range(len(self.names)))
            (found,) = self.fitness([tried], min(SURVEY_TOKENS, self.tokens), 0)
            whole = sum(self.error(place, probe) for place in places)
            slope = max(found, 0.0) / max(whole, LEAST_ERROR)
            for place in places:
                count = range(len(self.levels))
                rises[place] = tuple(slope * self.error(place, n) for n in count)
            self.progress.step()
        self.progress.finish()
        self.knapsack = Knapsack(self.costs, self.corrected(rises))

    def corrected(self, rises: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
        """Rises scaled so that those of each level add up to what the level alone measured."""
        corrections = []
        for level in range(len(self.levels)):
            total = sum(rise[level] for rise in rises)
            (found,) = self.fitness([(level,) * len(self.names)], self.tokens, 0)
            corrections.append(max(found, 0.0) / total if total > 0 else 0.0)
        return tuple(
            tuple(one * correction for one, correction in zip(rise, corrections, strict=True))
            for rise in rises
        )

    @property
    def is_surveyed(self) -> bool:
        """Whether rises are known."""
        return any(map(any, self.knapsack.rise))

    def error(self, place: int, level: int) -> float:
        """The squared relative error of a linear's outputs on a level."""
        return self.levels[level].level.error_of.get(self.names[place], 0.0)

    def allowed(self, families: str) -> list[int]:
        """The levels of some families; the dense model belongs to all."""
        allowed = {"all": ("quantize", "prune", "both")}.get(families, (families,))
        return [n for n, one in enumerate(self.levels) if n == 0 or one.family in allowed]

    def budgets(self, axis: int) -> list[Cost]:
        """Budgets of the frontier, in one kind of cost; the other kinds have none."""
        totals = [
            self.knapsack.total((n,) * len(self.names))[axis] for n in range(1, len(self.levels))
        ]
        least, most = self.knapsack.least[axis], max(totals)
        values = [least + (most - least) * n / (FRONTIER - 1) for n in range(FRONTIER)]
        free = [math.inf] * len(self.knapsack.least)
        return [(*free[:axis], value, *free[axis + 1 :]) for value in values]

    @torch.no_grad()
    def frontier(self, budgets: Sequence[Cost], families: str) -> list[Point]:
        """The best predicted candidate for each budget that can be kept, measured."""
        self.progress.start(f"measuring the frontier ({families})", len(budgets))
        points, seen = [], set()
        for budget in budgets:
            candidate = self.knapsack.best(budget, self.allowed(families))
            if candidate is not None and candidate not in seen:
                seen.add(candidate)
                (found,) = self.fitness([candidate], self.tokens, 0)
                points.append(self.point(candidate, found, families))
            self.progress.step()
        self.progress.finish()
        return points

    def between(self, budget: Cost) -> list[Candidate]:
        """Mixes of two levels each, one too large for a budget and one that fits.

        They stay near a single level, so they do not depend on the survey as much as others.
        """
        count = range(len(self.levels))
        totals = [self.knapsack.total((n,) * len(self.names)) for n in count]
        inside = [fits(total, budget) for total in totals]
        pairs = [(a, b) for a in count for b in count if inside[b] and not inside[a]]
        found = (self.knapsack.best(budget, pair) for pair in pairs)
        return list(dict.fromkeys(candidate for candidate in found if candidate is not None))

    @torch.no_grad()
    def refined(
        self,
        starts: Sequence[Candidate],
        budget: Cost,
        evolution: Callable[[int], Evolution],
        go_on: Callable[[], bool] = lambda: True,
    ) -> Point:
        """The best candidate within a budget: the starts, and mutants of the best of them.

        Args:
            starts: candidates within the budget.
            budget: of each kind of cost.
            evolution: returns the parameters for so many tokens.
            go_on: whether there is time for another generation.
        """
        search = evolution(self.tokens)
        self.progress.start("searching", search.generations + 1)
        best = None
        for best in search.climb(starts, self.knapsack.mutation(budget), self.fitness):
            self.progress.step(note=f"divergence {best.fitness:.4f}")
            if best.generation < search.generations and not go_on():
                break
        self.progress.finish()
        assert best is not None
        return self.point(best.candidate, best.fitness, "all")

    @torch.no_grad()
    def measured(self, candidate: Candidate) -> float:
        """The divergence of a candidate on all windows."""
        (found,) = self.fitness([candidate], self.tokens, 0)
        return found

    def point(self, candidate: Candidate, found: float, families: str, name: str = "") -> Point:
        """A measured candidate."""
        predicted = self.knapsack.predicted(candidate)
        return Point(candidate, self.knapsack.total(candidate), found, predicted, families, name)
