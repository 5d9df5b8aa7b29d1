"""The candidates of a fit, made as real models, packed, and measured as they run.

What every unit costs and is predicted to lose is known (`survey`). For a budget the knapsack
chooses a mix: of all formats, or of those without zeros where zeros promise little. It is made,
and may learn from the dense model on its own grids and masks (`healed`).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

from secateur.engine.search.candidate_evaluator import cut_windows
from secateur.engine.search.knapsack import Knapsack
from secateur.progress import Labelled
from secateur.recipes.prune import ChainRecipe
from secateur.recipes.reading import build_recipe
from secateur.recipes.recipe_files import dump_recipe
from secateur.reporting.fit import FitFinalist
from secateur.reporting.models import CompressResult
from secateur.runs.folder import NOTES, STATE
from secateur.runs.output import write_text
from secateur.sparsity.evolution import Candidate
from secateur.steps.fitting.costs import Costs
from secateur.steps.fitting.models import (
    FitContext,
    Formats,
    ModelEvaluator,
    chain_steps,
    heal_model,
    make_model,
)
from secateur.steps.fitting.survey import survey_model
from secateur.steps.runner import RunContext, step_of

RECIPE, WINDOWS = "recipe.yaml", "windows.safetensors"

LESS = 0.95
"""A mix has zeros only if it is predicted to lose less than so much of what the best one without
zeros loses: predictions err by more than a smaller gain."""

TRIES = (LESS, LESS, math.inf, math.inf)
"""A mix is chosen again if it became larger than predicted; at last, zeros need no gain."""

HEALABLE = 1.3
"""With a bound on the loss, smaller candidates that exceed it by at most so much are healed too."""


@dataclass(frozen=True)
class BuiltCandidate:
    """A model that was made.

    Attributes:
        sparse: the model before rounding; the source where nothing was pruned.
        packed: the model, packed: what is measured.
        formats: how every unit is stored.
        row: its numbers, for the result.
    """

    sparse: Path
    packed: Path
    formats: Formats
    row: FitFinalist

    @property
    def rise(self) -> float:
        """Of the loss, cautiously, where the recipe bounds it."""
        assert self.row.rise is not None
        return self.row.rise


class Workshop:
    """Makes candidates and measures them.

    Args:
        context: of the fit.

    Attributes:
        predictions: what every unit is predicted to lose; scaled by what the last model lost.
    """

    def __init__(self, context: FitContext) -> None:
        self.context = context
        windows = context.choosing.windows
        self.evaluator = ModelEvaluator(context, cut_windows(windows, windows.numel()), "chosen")
        self.predictions = survey_model(context, self.evaluator)

    def mix(self, name: str, costs: Costs) -> BuiltCandidate | None:
        """Make the best mix within a budget; None if there is none that keeps it."""
        most = limit = costs.kinds[0].limit
        seen = set[Candidate]()
        for less in TRIES:
            own = costs.limited(0, limit)
            knapsack = self.predictions.knapsack(own)
            candidate = chosen_mix(knapsack, own, less)
            if candidate is None or candidate in seen:
                continue
            seen.add(candidate)
            made = self.made(name, knapsack, candidate, own)
            if made.row.file_bytes <= most:
                return made
            limit -= made.row.file_bytes - most
        return None

    def made(
        self, name: str, knapsack: Knapsack, candidate: Candidate, costs: Costs
    ) -> BuiltCandidate:
        """Make a candidate, unless an earlier run has, and measure it.

        Args:
            name: for people.
            knapsack: the choice that it is of.
            candidate: the formats of all units.
            costs: the formats and units of the choice.
        """
        context, predicted = self.context, knapsack.predicted(candidate)
        formats = {n: costs.formats[x] for n, x in zip(costs.units, candidate, strict=True)}
        label = Labelled(context.progress, f"a model, {name}")
        with context.time.phase("making"):
            sparse, packed = make_model(context, formats, self._place(formats), label)
            divergence = self.evaluator.packed(packed)
        if predicted > 0 and divergence > 0:
            self.predictions = self.predictions.scaled(divergence, predicted)
        size = context.costs.files.finish(packed, context.progress)
        rise = self.evaluator.rise(packed)
        row = FitFinalist(name, size, predicted, divergence, rise=rise)
        return BuiltCandidate(sparse, packed, formats, row)

    def healed(self, candidates: Iterable[BuiltCandidate]) -> list[BuiltCandidate]:
        """The candidates, and those that may win after they have learned from the dense model.

        One that is worse then, or too large, because fewer weights round to zero, stays as it was.
        """
        context, all_of_them = self.context, [*candidates]
        bound = context.recipe.max_loss_increase
        best, found = best_of(all_of_them, bound), []
        for one in all_of_them:
            may_win = one is best or (
                bound is not None
                and one.row.file_bytes < best.row.file_bytes
                and one.rise <= HEALABLE * bound
            )
            heals = context.recipe.tokens_to_heal and may_win
            if heals and context.time.allows("healing", "healing"):
                one = self._healed(one)
            found.append(one)
        return found

    def _healed(self, candidate: BuiltCandidate) -> BuiltCandidate:
        context, formats = self.context, candidate.formats
        label = Labelled(context.progress, f"healing the model, {candidate.row.name}")
        with context.time.phase("healing"):
            packed = heal_model(context, candidate.sparse, formats, self._place(formats), label)
            divergence = self.evaluator.packed(packed)
        size = context.costs.files.finish(packed, context.progress)
        if divergence >= candidate.row.divergence or size > context.costs.kinds[0].limit:
            return candidate
        rise = self.evaluator.rise(packed)
        row = replace(candidate.row, file_bytes=size, healed=divergence, rise=rise)
        return replace(candidate, packed=packed, row=row)

    def _place(self, formats: Formats) -> Path:
        """The folder of a model, by its formats."""
        lines = "\n".join(f"{linear} {stored.name}" for linear, stored in sorted(formats.items()))
        return self.context.work / "mixes" / f"{crc32(lines.encode()):08x}"


def chosen_mix(knapsack: Knapsack, costs: Costs, less: float) -> Candidate | None:
    """The best formats within a budget, without zeros where these promise too little."""
    bare = [n for n, stored in enumerate(costs.formats) if not stored.sparsity]
    rounded, mixed = knapsack.best(costs.aim, bare), knapsack.best(costs.aim)
    if rounded is None or mixed is None:
        return mixed
    pays = knapsack.predicted(mixed) < less * knapsack.predicted(rounded)
    return mixed if pays else rounded


def best_of(candidates: Sequence[BuiltCandidate], bound: float | None = None) -> BuiltCandidate:
    """The candidate that diverges least from the dense model.

    Args:
        candidates: that were made.
        bound: on the rise of the loss. With one it is the smallest candidate within the bound, or
            the one whose loss rises least where none is.
    """
    if bound is None:
        return min(candidates, key=lambda one: one.row.last)
    within = [one for one in candidates if one.rise <= bound]
    smallest = min(within, key=lambda one: one.row.file_bytes, default=None)
    return smallest or min(candidates, key=lambda one: one.rise)


def pack_winner(run: RunContext, context: FitContext, winner: BuiltCandidate) -> CompressResult:
    """Put the packed winner into the folder of the run, with the recipe that makes it again."""
    recipe, folder = context.recipe, run.folder
    text = f"{recipe.output}/{NOTES}/{WINDOWS}"
    teacher = None if winner.row.healed is None else recipe.model
    shutil.copytree(winner.packed, folder.fresh_model(), dirs_exist_ok=True)
    (folder.notes / STATE).unlink(missing_ok=True)
    shutil.copyfile(context.calibration_file, folder.notes / WINDOWS)
    chain = {
        "model": recipe.model,
        "output": f"{recipe.output}-again",
        "steps": chain_steps(recipe, winner.formats, text, teacher),
        "trust_remote_code": recipe.trust_remote_code,
    }
    write_text(folder.notes / RECIPE, dump_recipe(build_recipe(ChainRecipe, chain)))
    # the card and the notes name places of the result, and none among the work of the run
    places = {str(context.calibration_file): text, str(winner.packed): str(recipe.output)}
    if winner.sparse != context.source.folder:
        places[str(winner.sparse)] = str(recipe.output)
    if not Path(recipe.model).exists():  # a hub id or a sample, which others can read too
        places[str(context.source.folder)] = recipe.model
    notes = [file for file in folder.notes.rglob("*") if file.suffix in (".json", ".yaml")]
    for file in (folder.model / "README.md", *notes):
        content = file.read_text(encoding="utf-8")
        for work, result in places.items():
            content = content.replace(work, result)
        write_text(file, content)
    packed: CompressResult = step_of("compress").result(folder.model)
    return packed.model_copy(update={"output": folder.output})
