"""`secateur sweep` prunes one model in many ways and evaluates all results on the same text.

Every point is a pruning run, and then an evaluation. Points share the recipe of the calibration,
the texts, and the evaluation of the dense model. They do not share statistics: the inputs of a
layer depend on the pruning of the layers before it, so every point gathers its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from secateur.engine.prepared import prepare
from secateur.errors import MemoryBudgetError, RecipeError, SecateurError
from secateur.models.checkpoint import shard_files
from secateur.progress import Labelled, Progress
from secateur.recipes.measure import EvaluateRecipe, SweepRecipe
from secateur.recipes.prune import PruneRecipe, presets
from secateur.recipes.reading import build_recipe
from secateur.recipes.shared import MemoryLimit, texts_of
from secateur.reporting.charts import save_plots
from secateur.reporting.sweep import SweepResult, curve_charts
from secateur.runs import measured
from secateur.runs.environment import choose_device, environment
from secateur.runs.folder import NOTES, STATE
from secateur.runs.output import write_json, write_text
from secateur.runs.records import Manifest, read_record
from secateur.sparsity.methods import methods
from secateur.sparsity.patterns import parse_pattern
from secateur.sparsity.scores import scores
from secateur.steps.evaluate import run_evaluation
from secateur.steps.prune import Prune
from secateur.steps.runner import RunContext, Step, carry_out, identity_of

SWEEP, POINTS = "sweep.json", "points"


class SweepPoints(Step[SweepRecipe, SweepResult]):
    """Prune and evaluate a model with several methods at several sparsities.

    A point that fails is recorded as a failure, and the sweep continues. The result has a table, a
    plot, and the notes of every point.
    """

    verb = "sweep"

    def __init__(self, recipe: SweepRecipe, run: RunContext) -> None:
        super().__init__(recipe, run)
        self.points: dict[measured.PointKey, PruneRecipe] = run.checked
        for point in self.points.values():  # refuses what the shapes do not allow
            prepare(point, run.source, only_plan=True).tasks()

    @classmethod
    def check(cls, recipe: SweepRecipe) -> dict[measured.PointKey, PruneRecipe]:
        """The recipes of all points, checked."""
        points = {key: recipe_of(recipe, key) for key in _grid_of(recipe)}
        for point in points.values():
            Prune.check(point)
        return points

    @classmethod
    def reads(cls, recipe: SweepRecipe) -> Iterable[str]:
        """The texts."""
        return [*texts_of(recipe.calibration.source), *recipe.text]

    def identity(self) -> dict[str, Any]:
        """Everything that the numbers depend on."""
        files = shard_files(self.run.source.folder)
        return identity_of(self.recipe, (), files, self.run.progress)

    @classmethod
    def result(cls, output: Path) -> SweepResult:
        """Read the result of a finished sweep from its record."""
        return SweepResult(sweep=read_record(measured.Sweep, output / SWEEP), folder=output)

    def work(self) -> SweepResult:
        """Measure every point that no earlier run has measured, and write the table."""
        run, recipe = self.run, self.recipe
        dense = self.judged(run.source.folder, "dense", Labelled(run.progress, "dense"))
        before = {one.text: one.mean_loss for one in dense.perplexity}
        points, failures = list[measured.SweepPoint](), list[dict[str, Any]]()
        for number, key in enumerate(self.points, start=1):
            place = f"{number}/{len(self.points)} {_point_name(key)}"
            try:
                points.append(self.measure_point(key, before, Labelled(run.progress, place)))
            except MemoryBudgetError:  # the next call may find more memory or disk
                raise
            except SecateurError as error:
                named = dict(zip(("method", "pattern", "sparsity"), key, strict=True))
                failures.append({**named, "what": error.what, "where": error.where})
        manifests = [run.folder.model / point.notes / NOTES / "manifest.json" for point in points]
        used = (read_record(Manifest, file).calibration for file in manifests)
        sweep = measured.Sweep(
            model=recipe.model,
            dense=measured.SweepDense(perplexity={x.text: x.perplexity for x in dense.perplexity}),
            environment=environment(choose_device(recipe.device)),
            conditions=recipe.model_dump(mode="json", exclude={"output"}),
            protocol={one.text: one.protocol for one in dense.perplexity},
            calibration=next(filter(None, used), None),
            points=tuple(points),
            failures=tuple(failures),
        )
        result, folder = SweepResult(sweep=sweep, folder=run.place), run.folder.model
        write_json(folder / SWEEP, sweep.to_json())
        write_text(folder / "sweep.md", result.markdown())
        charts = curve_charts(result.curve_points())
        if charts:  # a chart needs two points
            save_plots(charts, folder / "sweep")
        return result

    def judged(self, folder: Path, name: str, progress: Progress) -> measured.EvaluationRecord:
        """The evaluation of a model, from the file of an earlier run or now."""
        file, recipe = self.run.folder.work / f"{name}.json", self.recipe
        if file.exists():
            return measured.read_evaluation(file)
        judging = EvaluateRecipe(
            model=str(folder),
            text=recipe.text,
            sequence_length=recipe.text_sequence_length,
            windows=recipe.text_windows,
            device=recipe.device,
            trust_remote_code=recipe.trust_remote_code,
            memory=MemoryLimit(max_memory=recipe.memory.max_memory),
        )
        record = run_evaluation(judging, progress).record
        record.save(file)
        return record

    def measure_point(
        self, key: measured.PointKey, dense: dict[str, float], progress: Progress
    ) -> measured.SweepPoint:
        """Prune a point and evaluate it; from the notes of an earlier run or now."""
        folder, name = self.run.folder, _point_name(key)
        made, kept = folder.work / POINTS / name, folder.model / POINTS / name
        file = folder.work / f"{name}.point.json"
        if file.exists():
            return read_record(measured.SweepPoint, file)
        carry_out(Prune, self.points[key], progress, resume=True, at=made)
        manifest = read_record(Manifest, made / NOTES / "manifest.json")
        found = {one.text: one for one in self.judged(made, name, progress).perplexity}
        point = measured.SweepPoint(
            **dict(zip(("method", "pattern", "sparsity"), key, strict=True)),
            perplexity={text: one.perplexity for text, one in found.items()},
            excess={text: one.mean_loss - dense[text] for text, one in found.items()},
            zeros=manifest.result.decoder_sparsity,
            seconds=manifest.cost.seconds,
            peak_resident_bytes=manifest.cost.peak_resident_bytes,
            notes=kept.relative_to(folder.model).as_posix(),
        )
        without = shutil.ignore_patterns("*.safetensors", STATE)  # no run is finished here
        shutil.copytree(made / NOTES, kept / NOTES, ignore=without, dirs_exist_ok=True)
        write_json(file, point.to_json())
        shutil.rmtree(made)
        return point


def _grid_of(recipe: SweepRecipe) -> list[measured.PointKey]:
    """Method, pattern and sparsity of each point, in order.

    Raises:
        RecipeError: there is no point.
        PatternError: a pattern has the wrong form.
    """
    columns = [("unstructured", sparsity) for sparsity in recipe.sparsities]
    for text in recipe.patterns:
        implied = parse_pattern(text).sparsity
        columns += [(text, s) for s in (recipe.sparsities if implied is None else [implied])]
    grid = [(method, kind, round(s, 6)) for method in recipe.methods for kind, s in columns]
    if not grid or not recipe.text:
        raise RecipeError(
            f"{len(recipe.methods)} methods, {len(columns)} sparsities, {len(recipe.text)} texts "
            "to judge on: nothing to do",
            remedy="for example --methods wanda,sparsegpt --sparsities 0.3,0.5,0.6,0.7",
        )
    return list(dict.fromkeys(grid))


def _point_name(key: measured.PointKey) -> str:
    """The name of a point's folder: `wanda-50`, `wanda-2-4`, `wanda-16x1-50`."""
    method, pattern, sparsity = key
    implied = parse_pattern(pattern).sparsity
    kind = [] if pattern == "unstructured" else [pattern.replace(":", "-")]
    share = [f"{100 * sparsity:g}"] if implied is None else []
    return "-".join([method, *kind, *share])


def recipe_of(recipe: SweepRecipe, key: measured.PointKey) -> PruneRecipe:
    """The recipe of a point.

    Raises:
        SecateurError: the recipe is invalid.
    """
    method, pattern, sparsity = key
    known = {"method": methods, "effort": presets, "score": scores}
    kind = next((kind for kind, names in known.items() if method in names), "method")
    return build_recipe(
        PruneRecipe,
        {
            "model": recipe.model,
            "output": f"{recipe.output}/{POINTS}/{_point_name(key)}",
            kind: method,
            "pattern": pattern,
            "sparsity": sparsity if parse_pattern(pattern).sparsity is None else None,
            "calibration": recipe.calibration.model_dump(),
            "memory": recipe.memory.model_dump(),
            "device": recipe.device,
            "trust_remote_code": recipe.trust_remote_code,
        },
    )
