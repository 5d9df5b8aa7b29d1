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
3. The linears go one level further in the order of rise per saved byte (`knapsack.Knapsack`).
   Bisection finds how many can go within the bound.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.engine.search.candidate_evaluator import (
    WeightVariants,
    cut_windows,
)
from secateur.engine.search.knapsack import Cost, Knapsack, fits
from secateur.engine.stream.hidden_states import EmbeddingAndHead
from secateur.engine.stream.targets import CheckpointTarget
from secateur.models.architecture import Linear
from secateur.models.checkpoint import CheckpointReader
from secateur.progress import Progress
from secateur.quantization.activations import Shares
from secateur.sparsity.evolution import Candidate, Evolution

SURVEY_TOKENS = 2048
"""Tokens on which single layers are measured; the whole text decides in the end."""

LEAST_RISE = 1e-6
"""A rise of the loss in nats below which the measurement says nothing."""


@dataclass(frozen=True)
class Level:
    """A form in which all linears are stored.

    Attributes:
        name: such as `50 % int4`.
        reader: the checkpoint whose linears have these values.
        bytes_of: the size of each linear when stored, by its name.
        error_of: the squared relative error of each linear's outputs, ‖(W − Ŵ)X‖² / ‖WX‖²; empty
            for level 0.
        rounded_inputs: how kernels round the inputs, if the values are integers.
        family: `quantize`, `prune` or `both`.
    """

    name: str
    reader: CheckpointReader
    bytes_of: Mapping[str, int]
    error_of: Mapping[str, float]
    rounded_inputs: Shares | None = None
    family: str = "quantize"


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

    def rounded_inputs(self, level: int | None) -> Shares | None:
        """How a level rounds the inputs of its linears; None if it does not."""
        return self.levels[level].rounded_inputs if level else None

    def weight_of(self, linear: Linear, level: int | None, source: Any) -> Tensor | None:
        """The weight of a level above 0."""
        if not level:
            return None
        target = self.outer.target
        assert isinstance(target, CheckpointTarget)
        weight = self.levels[level].reader.read(target.stored[f"{linear.name}.weight"])
        return weight.to(target.device, target.dtype)


class LevelEvaluator:
    """Measures candidates that take each linear from one of the levels.

    Args:
        target: the model of level 0.
        levels: the levels.
        names: names of the linears; a candidate has a level for each.
        windows: tokens to measure on [windows, length].
        objective: `divergence` or `loss` (`CandidateEvaluator`).
        file: file of the measured values, which a stopped run resumes from; None for none.
        progress: receives the steps.
    """

    def __init__(
        self,
        target: CheckpointTarget,
        levels: Sequence[Level],
        names: Sequence[str],
        windows: Tensor,
        objective: str,
        file: Path | None,
        progress: Progress,
    ) -> None:
        self.levels, self.names = list(levels), list(names)
        self.tokens, self.progress = windows.numel(), progress
        variants = StoredVariants(EmbeddingAndHead(target, windows), self.names, self.levels)
        self.layers = [places for places in variants.places if places]
        labels = [level.name for level in self.levels]
        self.fitness = variants.fitness(objective, self.tokens, file, progress, levels=labels)

    def measured(self, *candidates: Candidate) -> list[float]:
        """The loss or divergence of candidates on all windows."""
        return self.fitness(candidates, self.tokens, 0)

    def single(self, level: int) -> Candidate:
        """The candidate with all linears on one level."""
        return (level,) * len(self.names)

    def by_layer(self, base: int, probe: int) -> Iterator[tuple[list[int], float]]:
        """The linears of each layer, and what is measured if only they go from base to probe."""
        for places in self.layers:
            tried = tuple(probe if n in places else base for n in range(len(self.names)))
            (found,) = self.fitness([tried], SURVEY_TOKENS, 0)
            yield places, found
            self.progress.step()


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
    windows = cut_windows(windows, windows.numel())
    model = LevelEvaluator(target, levels, names, windows, "loss", file, progress)
    steps = len(levels) + len(model.layers) + len(names).bit_length()
    progress.start("choosing values", steps)
    losses = model.measured(*map(model.single, range(len(levels))))
    progress.step(len(levels))
    allowed = losses[0] + bound
    base = max(level for level, loss in enumerate(losses) if level == 0 or loss <= allowed)
    best, loss = model.single(base), losses[base]
    if base + 1 < len(levels):
        # bisect the candidates between the base and the next level
        raised = _raised_in_order(model, base)
        low, high = 0, len(raised) - 1
        while high - low > 1:
            middle = (low + high) // 2
            (found,) = model.measured(raised[middle])
            if found <= allowed:
                best, loss, low = raised[middle], found, middle
            else:
                high = middle
            progress.step()
    progress.finish()
    return ChosenLevels(dict(zip(names, best, strict=True)), loss, losses[0], tuple(losses))


def _raised_in_order(model: LevelEvaluator, base: int) -> list[Candidate]:
    """Candidates from the base to the next level, one linear after the other, cheapest first."""
    names, pair = model.names, (base, base + 1)
    here, further = (model.levels[level] for level in pair)
    (reference,) = model.fitness([model.single(base)], SURVEY_TOKENS, 0)
    rises = [0.0] * len(names)
    for places, loss in model.by_layer(*pair):
        rise = max(loss - reference, LEAST_RISE)
        total = sum(further.error_of[names[n]] for n in places) or 1.0
        for n in places:
            rises[n] = max(rise * further.error_of[names[n]] / total, 1e-300)
    cost = tuple(((float(here.bytes_of[n]),), (float(further.bytes_of[n]),)) for n in names)
    knapsack = Knapsack(cost, tuple((0.0, rise) for rise in rises))
    price = [[level[0] for level in unit] for unit in cost]
    return [
        tuple(base + level for level in chosen) for chosen, _ in knapsack.descent(price, (0, 1))
    ]


FRONTIER = 8
"""Budgets of the frontier, evenly spaced between the smallest and the largest cost."""

BISECTIONS = 6
"""Sizes that `FitSearch.smallest_within` tries."""

LEAST_ERROR = 1e-9


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


class FitSearch(LevelEvaluator):
    """The search on one model, by the divergence.

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
        levels: Sequence[Level],
        costs: Mapping[str, Sequence[Cost]],
        windows: Tensor,
        file: Path | None,
        progress: Progress,
    ) -> None:
        cut = cut_windows(windows, windows.numel())
        super().__init__(target, levels, list(costs), cut, "divergence", file, progress)
        rise = ((0.0,) * len(levels),) * len(costs)
        self.knapsack = Knapsack(tuple(map(tuple, costs.values())), rise)

    def singles(self) -> list[Point]:
        """Every level alone, measured."""
        self.progress.start("measuring single levels", len(self.levels))
        points = []
        for number, level in enumerate(self.levels):
            points.append(self.point(self.single(number), level.family, level.name))
            self.progress.step(note=level.name)
        self.progress.finish()
        return points

    def survey(self, probe: int) -> None:
        """Measure what errors cost in each layer, and fill the knapsack.

        The rises are scaled so that those of each level add up to what the level alone measured.

        Args:
            probe: the level that layers go to, one at a time.
        """
        self.progress.start("measuring layers", len(self.layers))
        errors = [[x.error_of.get(name, 0.0) for x in self.levels] for name in self.names]
        rises: list[list[float]] = [[]] * len(self.names)
        for places, found in self.by_layer(0, probe):
            whole = sum(errors[place][probe] for place in places)
            slope = max(found, 0.0) / max(whole, LEAST_ERROR)
            for place in places:
                rises[place] = [slope * error for error in errors[place]]
        self.progress.finish()
        corrections = []
        for level in range(len(self.levels)):
            total = sum(rise[level] for rise in rises)
            (found,) = self.measured(self.single(level))
            corrections.append(max(found, 0.0) / total if total > 0 else 0.0)
        corrected = (tuple(r * c for r, c in zip(rise, corrections, strict=True)) for rise in rises)
        self.knapsack = replace(self.knapsack, rise=tuple(corrected))

    @property
    def is_surveyed(self) -> bool:
        """Whether rises are known."""
        return any(map(any, self.knapsack.rise))

    def allowed(self, families: str) -> list[int]:
        """The levels of some families; the dense model belongs to all."""
        allowed = {"all": ("quantize", "prune", "both")}.get(families, (families,))
        return [n for n, level in enumerate(self.levels) if n == 0 or level.family in allowed]

    def budgets(self, axis: int) -> list[Cost]:
        """Budgets of the frontier, in one kind of cost; the other kinds have none."""
        totals = [self.knapsack.total(self.single(n))[axis] for n in range(1, len(self.levels))]
        least, most = self.knapsack.least[axis], max(totals)
        values = [least + (most - least) * n / (FRONTIER - 1) for n in range(FRONTIER)]
        free = [math.inf] * len(self.knapsack.least)
        return [(*free[:axis], value, *free[axis + 1 :]) for value in values]

    def frontier(self, budgets: Sequence[Cost], families: str) -> list[Point]:
        """The best predicted candidate for each budget that can be kept, measured."""
        self.progress.start(f"measuring the frontier ({families})", len(budgets))
        points: dict[Candidate, Point] = {}
        for budget in budgets:
            candidate = self.knapsack.best(budget, self.allowed(families))
            if candidate is not None and candidate not in points:
                points[candidate] = self.point(candidate, families)
            self.progress.step()
        self.progress.finish()
        return list(points.values())

    def smallest_within(self, losses: LevelEvaluator, aim: Cost, bound: float) -> float:
        """The smallest size found, by bisection, whose loss rises by no more than a bound.

        Args:
            losses: measures the loss of the next token, on the same levels.
            aim: the budget; size is the first kind. Predictions choose a candidate for each size.
            bound: in nats per token.

        Returns:
            Bytes of all linears.
        """
        low, high = self.knapsack.least[0], min(aim[0], self.knapsack.most[0])
        self.progress.start("finding the smallest size", BISECTIONS)
        for _ in range(BISECTIONS):
            middle, rise = (low + high) / 2, math.inf
            candidate = self.knapsack.best((middle, *aim[1:]))
            if candidate is not None:
                ((found,), (dense,)) = losses.measured(candidate), losses.measured(self.single(0))
                rise = found - dense
            low, high = (low, middle) if rise <= bound else (middle, high)
            self.progress.step(note=f"{middle / 2**20:.1f} MiB of linears: {rise:+.4f}")
        self.progress.finish()
        return high

    def between(self, budget: Cost) -> list[Candidate]:
        """Mixes of two levels each, one too large for a budget and one that fits.

        They stay near a single level, so they do not depend on the survey as much as others.
        """
        count = range(len(self.levels))
        inside = [fits(self.knapsack.total(self.single(n)), budget) for n in count]
        pairs = [(a, b) for a in count for b in count if inside[b] and not inside[a]]
        found = (self.knapsack.best(budget, pair) for pair in pairs)
        return list(dict.fromkeys(candidate for candidate in found if candidate is not None))

    def refined(
        self,
        starts: Sequence[Candidate],
        budget: Cost,
        search: Evolution,
        go_on: Callable[[], bool] = lambda: True,
    ) -> Point:
        """The best candidate within a budget: the starts, and mutants of the best of them.

        Args:
            starts: candidates within the budget.
            budget: of each kind of cost.
            search: the parameters.
            go_on: whether there is time for another generation.
        """
        self.progress.start("searching", search.generations + 1)
        for best in search.climb(starts, self.knapsack.mutation(budget), self.fitness):
            self.progress.step(note=f"divergence {best.fitness:.4f}")
            if best.generation < search.generations and not go_on():
                break
        self.progress.finish()
        return self.point(best.candidate, "all")

    def point(self, candidate: Candidate, families: str, name: str = "") -> Point:
        """A candidate, measured."""
        (found,) = self.measured(candidate)
        predicted = self.knapsack.predicted(candidate)
        return Point(candidate, self.knapsack.total(candidate), found, predicted, families, name)
