"""`secateur fit`: a bound in, the best packed model within it out.

    survey ─► knapsack ─► a mix, made and measured ─► healed ─► judged

| target    | what a fit does                                         |
|-----------|---------------------------------------------------------|
| cpu       | all formats: our kernels, timed on this machine         |
| llama.cpp | what a GGUF file holds; bounds on size and loss         |
| a file    | the types of a GGUF file (`--like`)                     |

With a bound on the loss, mixes of several sizes are made, and the smallest within it wins.

The choice is corrected where the winner decodes more slowly than the table of times predicts.
Seconds of a token are predicted as a sum over matrices, each timed in a loop of equal ones. A whole
model can be up to 30 % slower. So the packed winner and dense int8 are timed in turns. If the
winner misses the speed-up, models are chosen once more with a bound that is tighter by the same
factor:

    seconds' = seconds · measured speed-up / predicted speed-up

The new winner stays only if it is faster by more than the error of timing; it has lost more. What
was measured is kept, so a resumed run decides the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from secateur.errors import VerificationError
from secateur.evaluation.divergence import among_kept
from secateur.exporting.gguf.like import layout_of
from secateur.models.gguf_file import GGUFSource
from secateur.models.skeleton import build_skeleton
from secateur.models.sources import LocalCheckpoint
from secateur.models.targets import CheckpointTarget
from secateur.progress import Progress
from secateur.recipes.compress import FitRecipe
from secateur.recipes.shared import texts_of
from secateur.reporting.charts import save_plots
from secateur.reporting.fit import FitCorrection, FitCost, FitLoss, FitPoint, FitResult
from secateur.reporting.plan import FitPlanResult
from secateur.runs.environment import choose_device
from secateur.runs.folder import NOTES, check_output
from secateur.runs.output import write_json
from secateur.runs.records import read_record
from secateur.runtime.storage_plan import PackableCheckpoint
from secateur.steps.fitting import problem as problems
from secateur.steps.fitting.bench import (
    TIMING_ERROR,
    BuiltCandidate,
    FitBench,
    best_of,
    open_model,
    trimming_of,
)
from secateur.steps.fitting.cuts import costs_of_fewest, with_cuts
from secateur.steps.fitting.like import LikeFolder
from secateur.steps.fitting.survey import survey_model
from secateur.steps.runner import RunContext, Step, identity_of, judge_of, source_of

FIT = "fit.json"

MOST = 2
"""How often models are chosen again, at most."""

MIX = "the mix"
"""The name of a candidate."""


def plan_fit(recipe: FitRecipe, progress: Progress, call: Mapping[str, Any]) -> FitPlanResult:
    """Check a recipe and whether its bounds can be kept, and show what the fit would do.

    Args:
        recipe: recipe of the fit.
        progress: receives the matrices that are timed for a bound on speed.
        call: the other options of the call.

    Raises:
        SecateurError: as the fit would.
    """
    judge_of(recipe)
    source = source_of(recipe, progress)
    model = open_model(recipe, source)
    if recipe.vocabulary is None:
        costs = _costs_of(recipe, model, progress)
    else:  # tokens go first, and nobody knows yet how many
        costs = problems.costs_of(recipe, model, progress)
    read = [recipe.model, str(source.folder), *Fit.reads(recipe)]
    check_output(recipe.output, "fit", 0, read, call)
    bounds = {}
    for place, kind in enumerate(costs.kinds):
        least = costs.least(place, alone=True)
        if math.isfinite(kind.limit) and least is not None:
            name = problems.OPTION_OF[kind.name]
            bounds[name] = f"{getattr(recipe, name)}", problems.as_option(costs, kind.name, least)
    if recipe.max_loss_increase is not None:
        bounds["max_loss_increase"] = f"{recipe.max_loss_increase}", ""
    return FitPlanResult(
        linears=len(costs.shapes),
        file_bytes=model.file_bytes,
        bounds=bounds,
        formats=tuple(stored.name for stored in costs.formats),
        tokens_to_heal=recipe.tokens_to_heal,
        minutes=recipe.minutes,
    )


class Fit(Step[FitRecipe, FitResult]):
    """Find the best compressed model within a budget, and make it.

    Every linear may stay as it is, be rounded to 8, 4, 3 or 2 bits, be pruned to 30 to 70 %, or
    both; embedding and head are rounded to 8, 4 or 3 bits. One survey of the model predicts what
    each of these loses. The best choices are made, healed and measured.
    """

    verb, measured_in = "fit", FIT

    def __init__(self, recipe: FitRecipe, run: RunContext) -> None:
        super().__init__(recipe, run)
        self.model = open_model(recipe, run.source)
        if recipe.vocabulary is not None:
            from secateur.structured.vocabulary import check_vocabulary

            check_vocabulary(trimming_of(recipe), run.source, build_skeleton(run.source.folder))

    @cached_property
    def dense(self) -> tuple[LocalCheckpoint, PackableCheckpoint]:
        """The model that is fitted, with its matrices: without the tokens that may go."""
        recipe, run = self.recipe, self.run
        if recipe.vocabulary is None:
            return run.source, self.model
        from secateur.structured.vocabulary import trimmed_source

        how, device = trimming_of(recipe), choose_device(recipe.device)
        compare = partial(among_kept, device=device, progress=run.progress)
        source, _ = trimmed_source(how, run.source, run.folder.work, run.progress, compare)
        return source, open_model(recipe, source)

    @classmethod
    def reads(cls, recipe: FitRecipe) -> Iterable[str]:
        """The texts, and the file whose types it takes."""
        named = [recipe.calibration.source, *filter(None, [recipe.vocabulary])]
        texts = (text for each in named for text in texts_of(each))
        return [*texts, *filter(None, [recipe.like])]

    def identity(self) -> dict[str, Any]:
        """Everything that affects the result."""
        return {
            **identity_of(self.recipe, {"minutes"}, self.model.reader.files, self.run.progress),
            "formats": [stored.name for stored in problems.FILES[self.recipe.target].formats],
            "like": GGUFSource.read(self.recipe.like).identity() if self.recipe.like else None,
        }

    def read_back(self) -> CheckpointTarget | None:
        """The layers of the winner as the target's file has them."""
        if self.recipe.target == "cpu" and self.recipe.like is None:
            return None
        _, model = self.dense
        files = _costs_of(self.recipe, model, self.run.progress).files
        reader = files.read_back(self.run.folder.model, model)
        assert reader is not None  # of a GGUF file
        device = choose_device(self.recipe.device)
        return CheckpointTarget(reader, None, device, dtype=files.dtype)

    @classmethod
    def result(cls, output: Path) -> FitResult:
        """Read the result of a finished fit from its notes."""
        return read_record(FitResult, output / NOTES / FIT)

    def work(self) -> FitResult:
        """Survey the model, make and heal candidates, judge the best one.

        Raises:
            RecipeError: no model can keep the bounds.
            VerificationError: no model that was made keeps them.
        """
        (source, model), bound = self.dense, self.recipe.max_loss_increase
        run, folder = replace(self.run, source=source), self.run.folder
        costs = _costs_of(self.recipe, model, run.progress)
        bench, files = FitBench(self.recipe, model, costs, run), costs.files
        frontier, corrections = tuple[FitPoint, ...](), tuple[FitCorrection, ...]()
        if isinstance(files, LikeFolder):
            made = bench.healed([bench.build(f"like {files.name}", files.own_formats)])
        else:
            bench, made, problem = _within_bounds(bench, survey_model(bench))
            made, problem, corrections = _fast_enough(bench, problem, bench.healed(made))
            frontier = problem.frontier
        winner = best_of(made, bound)
        costs, packed = bench.costs, bench.pack(winner)
        size = files.finish(folder.model, run.progress)
        like = files.judged(bench, folder.model) if isinstance(files, LikeFolder) else None
        loss = FitLoss(winner.row.file_bytes, *bench.increase(bench.judging, folder.model))
        result = FitResult(
            output=folder.output,
            kind_of={n: one.name for n, one in winner.formats.items() if n in costs.shapes},
            embeddings=costs.ends_in(winner.formats),
            winner=winner.row,
            finalists=tuple(one.row for one in made),
            frontier=frontier,
            loss=loss,
            types=files.types(folder.model),
            like=like,
            costs=tuple(
                FitCost(kind.name, kind.rest, kind.limit if math.isfinite(kind.limit) else None)
                for kind in costs.kinds
            ),
            checks=tuple(bench.checks(size, loss)),
            corrections=corrections,
            dropped=tuple(bench.time.dropped),
            packed=packed,
            seconds=time.perf_counter() - run.meter.started,
        )
        write_json(folder.notes / FIT, result.to_json())
        save_plots([result.chart()], folder.notes / "frontier")
        return result


def _costs_of(recipe: FitRecipe, model: PackableCheckpoint, progress: Progress) -> problems.Costs:
    """What a fit pays with, within its bounds, or in the types of a file.

    Raises:
        RecipeError: no model can keep the bounds, or the file was not made from the model.
    """
    if recipe.like is None:
        costs = problems.costs_of(recipe, model, progress)
        least = costs_of_fewest(costs, model.reader.folder) if recipe.structure else costs
        problems.check_feasible(recipe, least, model.file_bytes)
        return costs
    files = LikeFolder(layout_of(GGUFSource.read(recipe.like), model, progress))
    size = problems.CostKind(problems.SIZE, files.layout.file.size_bytes, math.inf, exact=True)
    return problems.Costs((size,), model.shapes, model.ends, files=files)


@dataclass(frozen=True)
class SizeBracket:
    """The sizes between which the smallest model within a loss is looked for, in bytes.

    Attributes:
        low: the largest size that is too small; at first the smallest one that is possible.
        high: of the smallest model within the loss; at first the largest size.
        fails: whether low was tried.
        holds: whether high was made.
    """

    low: float
    high: float
    fails: bool = False
    holds: bool = False

    def next(self, predicted: float) -> float:
        """The size to try: the predicted one, or the middle once both ends were measured."""
        low, high = self.low * (1 + STEP * self.fails), self.high * (1 - STEP * self.holds)
        if low <= predicted <= high and not (self.fails and self.holds):
            return predicted
        return math.sqrt(self.low * self.high)

    def after(self, made: float, *, keeps: bool) -> SizeBracket:
        """The same after a size was tried, and its model has so many bytes and keeps the bound."""
        if keeps and (made < self.high or not self.holds):
            return replace(self, high=made, holds=True)
        return replace(self, low=max(self.low, made) if self.fails else made, fails=True)

    @property
    def wide(self) -> bool:
        """Whether a size that is too small is far below."""
        return self.fails and self.low < self.high * (1 - WIDE)

    @property
    def closed(self) -> bool:
        """Whether nothing worth trying is left."""
        return self.low > self.high * (1 - STEP)


CLOSE, CLOSER = 0.8, 0.95
"""A loss of so much of its bound is near enough; the next size aims at so much of it."""

STEP, WIDE = 0.02, 0.1
"""As fractions of a size. Two sizes nearer than the first count as one. If they are farther apart
than the second, the search goes on although the loss is near its bound."""

MADE, SIZES = 5, 12
"""For how many sizes models are made, and how many are tried, at most: the choice for a size may be
a model that was made before."""


def _within_bounds(
    bench: FitBench, problem: problems.FitProblem
) -> tuple[FitBench, list[BuiltCandidate], problems.FitProblem]:
    """The candidates within the bounds, and the problem of the best size, after what they lost.

    Where it may cut, also the bench of the best cut.

    Raises:
        VerificationError: no model that was made keeps the bounds.
    """
    bound = bench.recipe.max_loss_increase
    if bound is None:
        built, problem = bench.mix(MIX, problem)
        made = [] if built is None else [built]
    else:
        made, problem = _within_loss(bench, problem, bound)
    if bench.recipe.structure:
        bench, made, problem = with_cuts(bench, made, problem)
    if not made:
        raise VerificationError(
            "no model that was made keeps the bounds",
            where=str(bench.recipe.output),
            remedy="give a little more of each bound",
        )
    if bound is not None:
        problem = problem.limited(best_of(made, bound).row.file_bytes)
    return bench, made, problem


def _within_loss(
    bench: FitBench, problem: problems.FitProblem, bound: float
) -> tuple[list[BuiltCandidate], problems.FitProblem]:
    """Models of several sizes, on both sides of the smallest one within a loss.

    The first size is where the survey predicts the bound. A mix is made for it and measured on the
    windows that choose. If the rise of the loss and its standard error exceed the bound, the size
    is too small. Predictions are scaled to what was measured, and give the next size.
    """
    knapsack, rest = problem.knapsack, problem.costs.rest[0]
    most = min(rest + knapsack.most[0], problem.costs.kinds[0].limit)
    bracket, aim = SizeBracket(rest + knapsack.least[0], most), bound
    made = dict[Path, BuiltCandidate]()
    for number in range(SIZES):
        size = bracket.next(problem.smallest(aim))
        built, tried = bench.mix(f"{MIX}, size {number + 1}", problem.limited(size))
        problem = replace(problem, scale=tried.scale)
        rise, found = math.inf, size  # no mix, or one that was made: sizes up to it are known
        if built is not None:
            rise = built.rise
            if built.packed not in made:
                found, made[built.packed] = built.row.file_bytes, built
            aim *= min(max(CLOSER * bound / max(rise, 1e-9), 1 / 8), 8.0)
        bracket = bracket.after(found, keeps=rise <= bound)
        near = CLOSE * bound < rise <= bound and not bracket.wide
        if near or bracket.closed or len(made) == MADE:
            break
        if not bench.time.allows("another size", "making"):
            break
    return [*made.values()], problem


Corrected = tuple[list[BuiltCandidate], problems.FitProblem, tuple[FitCorrection, ...]]
"""The candidates of the last choice that has made the best one faster, the problem after all that
were made, and what each choice has brought."""


def _fast_enough(
    bench: FitBench,
    problem: problems.FitProblem,
    made: list[BuiltCandidate],
    corrections: tuple[FitCorrection, ...] = (),
) -> Corrected:
    """Choose again, and again, where the best candidate decodes more slowly than its bound."""
    best, wanted = best_of(made, bench.recipe.max_loss_increase), bench.recipe.decode_speedup
    speed, error = bench.speedup(best.packed, len(corrections)), 1 + TIMING_ERROR
    if not wanted or speed is None or speed * error >= wanted or len(corrections) == MOST:
        return made, problem, corrections
    predicted = problem.costs.predicted_speedup(best.formats)
    # seconds that make up for what the table promises too much
    tighter = problem.tightened(bench.costs.kinds[-1].limit * (speed / predicted))
    if tighter is None:
        return made, problem, corrections
    built, after = bench.mix(f"{MIX}, again", tighter)
    if built is None:
        return made, after, corrections
    again = bench.healed([built])
    reached = bench.speedup(again[0].packed, len(corrections) + 1)
    wanted = tighter.costs.table.base / tighter.costs.kinds[-1].limit
    correction = FitCorrection(predicted, speed, wanted, reached)
    if reached is None or reached <= speed * error:  # it has lost more, and for nothing
        return made, after, (*corrections, correction)
    return _fast_enough(bench, after, again, (*corrections, correction))
