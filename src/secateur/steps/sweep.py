"""`secateur sweep` prunes one model in many ways and evaluates all results on the same text.

The points share the calibration windows, the tokenised texts, and the evaluation of the dense
model. They do not share statistics: the inputs of a layer depend on the pruning of the layers
before it, so every point gathers its own. Points know nothing of each other, so a Ray cluster can
take some at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.calibration.documents import read_text
from secateur.calibration.windows import evaluation_windows, load_windows, stored_extra
from secateur.engine.prepared import allocation_of, method_of, prepare, windows_needed
from secateur.errors import RecipeError, SecateurError
from secateur.evaluation.perplexity import computed_by, perplexity, window_progress
from secateur.evaluation.perplexity import protocol as describe_protocol
from secateur.models.checkpoint import shard_files
from secateur.models.configuration import read_configuration
from secateur.models.opening import load_whole
from secateur.models.tokenizer import load_tokenizer, start_tokens
from secateur.parallel.ray_launcher import each
from secateur.progress import Labelled, Progress, Silent
from secateur.recipes.measure import SweepRecipe
from secateur.recipes.prune import PruneRecipe, presets
from secateur.recipes.reading import build_recipe
from secateur.reporting.charts import save_plots
from secateur.reporting.sweep import SweepResult, curve_charts
from secateur.runs.environment import choose_device, environment
from secateur.runs.folder import NOTES, STATE, Lock, holder, in_use, what_counts
from secateur.runs.output import (
    cannot_write,
    check_apart,
    check_own,
    check_writable,
    write_json,
    write_text,
)
from secateur.runs.records import Manifest, read_record
from secateur.runs.records.measured import PointKey, Sweep, SweepDense, SweepPoint
from secateur.sparsity.methods import methods
from secateur.sparsity.patterns import parse_pattern
from secateur.steps.runner import (
    carry_out,
    model_digests,
    recipe_identity,
    source_of,
    step_of,
)

Outcome = tuple[PointKey, SweepPoint | SecateurError]
"""A point, and what was measured or why it failed."""

CONDITIONS = (
    "model",
    "calibration",
    "windows",
    "sequence_length",
    "seed",
    "text",
    "text_sequence_length",
    "text_windows",
    "device",
    "trust_remote_code",
)
"""The options that must not change when a sweep resumes. New points are allowed."""

BY_CONTENT = {"model", "calibration", "text"}
"""Conditions that may be spelled in another way: their content is compared."""


def sweep_recipe(recipe: SweepRecipe, progress: Progress) -> SweepResult:
    """Prune and evaluate a model with several methods at several sparsities.

    A point that fails is recorded as a failure, and the sweep continues. The next call with the
    same output resumes the sweep, and tries failed points again. `sweep.json` is written after
    every point, a table and a plot at the end.

    Args:
        recipe: the recipe.
        progress: receives every step.

    Raises:
        SecateurError: the recipe is invalid, or the folder holds another sweep.
    """
    if recipe.output is None:
        raise RecipeError("no output folder", remedy="add --output DIR")
    folder = Path(recipe.output)
    check_writable(folder / "sweep.json", file=True)
    check_own(folder, "sweep", "sweep.json")
    for read in (recipe.model, recipe.calibration, *recipe.text):
        check_apart(read, folder, folder)
    with _locked(folder):
        run = SweepRun(recipe, folder, progress)
        run.check_points()
        run.begin()
        run.judge_dense()
        done = {point.key: point for point in run.record.points}
        for point in done.values():
            run.drop_weights(point)
        left = [key for key in run.grid if key not in done]
        for key, found in run.on_ray(left) if recipe.cluster.ray is not None else run.in_turn(left):
            run.note(key, found)
        result = SweepResult(run.record, folder)
        write_text(folder / "sweep.md", result.markdown())
        write_text(folder / "sweep.csv", result.csv())
        charts = curve_charts(result.curve_points())
        if charts:  # a chart needs two points
            save_plots(charts, folder / "sweep")
    return result


def _grid(recipe: SweepRecipe) -> list[PointKey]:
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


def _point_name(key: PointKey) -> str:
    """The name of a point's folder: `wanda-50`, `wanda-2-4`, `wanda-16x1-50`."""
    method, pattern, sparsity = key
    implied = parse_pattern(pattern).sparsity
    kind = [] if pattern == "unstructured" else [pattern.replace(":", "-")]
    share = [f"{100 * sparsity:g}"] if implied is None else []
    return "-".join([method, *kind, *share])


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder of a sweep. A new folder that stays empty is removed afterwards.

    Raises:
        RecipeError: another process uses the folder, or it is not writable.
        MemoryBudgetError: the disk is full.
    """
    lock, who = Lock(folder), folder / "run.json"
    try:
        if not lock.take():
            record = json.loads(who.read_text(encoding="utf-8")) if who.exists() else None
            raise in_use(record, folder)
        write_json(who, holder("sweep"))
        yield
    except OSError as error:
        raise cannot_write(error, folder) from error
    finally:
        if lock.descriptor is not None:
            who.unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()
            lock.release()


class SweepRun:
    """A running sweep: its folder, its measurements so far, and the data that all points share.

    Raises:
        SecateurError: a recipe is invalid. Nothing is written in this case.
    """

    def __init__(self, recipe: SweepRecipe, folder: Path, progress: Progress) -> None:
        self.recipe, self.folder, self.progress = recipe, folder, progress
        self.windows_file = folder / "windows.safetensors"
        self.grid = _grid(recipe)
        self.device = choose_device(recipe.device)
        self.calibrated = [key for key in self.grid if self.needs_windows(key)]
        self.source = source_of(recipe, progress)
        folder_of_model, trust = self.source.folder, recipe.trust_remote_code
        tokenizer = load_tokenizer(folder_of_model, trust_remote_code=trust)
        self.start = start_tokens(tokenizer)
        config = read_configuration(folder_of_model)
        longest = {**config, **config.get("text_config", {})}.get("max_position_embeddings") or 2048
        length = recipe.text_sequence_length or min(2048, longest)
        self.texts = {text: read_text(text) for text in recipe.text}
        self.windows = {
            text: evaluation_windows(one.text, tokenizer, length, max_windows=recipe.text_windows)
            for text, one in self.texts.items()
        }
        self.record = self.found_or_new()

    def found_or_new(self) -> Sweep:
        """The record of the sweep in the folder, or an empty one.

        Raises:
            RecipeError: the folder holds another sweep, or points that are not in this recipe.
        """
        conditions = {name: getattr(self.recipe, name) for name in CONDITIONS}
        conditions |= {
            "text": list(self.recipe.text),
            "texts_sha256": {text: _digest(windows) for text, windows in self.windows.items()},
            "model_sha256": model_digests(shard_files(self.source.folder), self.progress),
            "calibration_sha256": what_counts(recipe_identity(self.recipe, ())["calibration"]),
        }
        file = self.folder / "sweep.json"
        if not file.exists():
            return Sweep(
                model=self.recipe.model,
                dense=SweepDense(),
                environment=environment(self.device),
                conditions=conditions,
                protocol={},
                calibration=None,
                points=(),
                failures=(),
            )
        found = read_record(Sweep, file)
        # texts are compared in their order, whatever they are called
        one, other = (
            {**x, "texts_sha256": [*x.get("texts_sha256", {}).values()]}
            for x in (found.conditions, conditions)
        )
        names = sorted({*one, *other} - BY_CONTENT)
        pairs = ((name, one.get(name), other.get(name)) for name in names)
        differing = [f"{n}: {then!r} then, {now!r} now" for n, then, now in pairs if then != now]
        missing = [_point_name(p.key) for p in found.points if p.key not in self.grid]
        if missing:
            differing.append(f"measured, but not asked for now: {', '.join(missing)}")
        if differing:
            raise RecipeError(
                f"the sweep in the folder is another one ({'; '.join(differing)})",
                where=str(file),
                remedy="repeat the options of the first call (methods, sparsities and patterns "
                "may be added), or choose another --output",
            )
        names = found.conditions["text"]  # its numbers have the names of its first call
        self.texts = dict(zip(names, self.texts.values(), strict=True))
        self.windows = dict(zip(names, self.windows.values(), strict=True))
        return found.model_copy(update={"failures": ()})

    def save(self, **changes: Any) -> None:
        """Change fields of the record and write it, with the points in the order of the recipe."""
        record = self.record.model_copy(update=changes)
        points = sorted(record.points, key=lambda point: self.grid.index(point.key))
        self.record = record.model_copy(update={"points": tuple(points)})
        write_json(self.folder / "sweep.json", self.record.to_json())

    def check_points(self) -> None:
        """Refuse a point that the shapes of the model do not allow, before any work.

        Raises:
            SecateurError: as its prune would, before it begins.
        """
        done = {point.key for point in self.record.points}
        for key in self.grid:
            if key not in done:
                recipe = self.recipe_of(key, self.recipe.calibration)
                prepare(recipe, self.source, only_plan=True).tasks()

    def begin(self) -> None:
        """Make the folder, and cut the calibration windows of all points.

        Raises:
            RecipeError: the windows differ from the windows at the start of the sweep.
        """
        (self.folder / "points").mkdir(parents=True, exist_ok=True)
        if self.calibrated and self.record.calibration is None:
            recipe = self.recipe_of(self.calibrated[0], self.recipe.calibration)
            windows = prepare(recipe, source_of(recipe, Silent())).windows
            assert windows is not None
            windows.save_tokens(self.windows_file)
            self.save(calibration=windows.record)
            return
        if self.record.calibration is not None:
            stored = load_windows(self.windows_file)
            own = stored[: len(stored) - stored_extra(self.windows_file)]
            if _digest(own) != self.record.calibration["sha256"]:
                raise RecipeError(
                    "the calibration windows are not those that the sweep began with",
                    where=str(self.windows_file),
                    remedy="choose another --output",
                )
        self.save()

    def recipe_of(self, key: PointKey, calibration: str | None = None) -> PruneRecipe:
        """The recipe of a point. By default it uses the calibration windows of the sweep.

        Raises:
            SecateurError: the recipe is invalid.
        """
        method, pattern, sparsity = key
        shared = self.recipe
        implied = parse_pattern(pattern).sparsity
        return build_recipe(
            PruneRecipe,
            {
                "model": shared.model,
                "output": str(self.place(key)),
                "effort" if method in presets and method not in methods else "method": method,
                "pattern": pattern,
                "sparsity": sparsity if implied is None else None,
                "calibration": {
                    "source": calibration or str(self.windows_file),
                    "windows": shared.windows,
                    "sequence_length": shared.sequence_length,
                    "seed": shared.seed,
                },
                "device": shared.device,
                "trust_remote_code": shared.trust_remote_code,
            },
        )

    def needs_windows(self, key: PointKey) -> bool:
        """Whether a point needs calibration. This also checks its recipe."""
        recipe = self.recipe_of(key)
        method, _ = method_of(recipe)
        return windows_needed(recipe, method, allocation_of(recipe, method))

    def place(self, key: PointKey) -> Path:
        """The folder of a point."""
        return self.folder / "points" / _point_name(key)

    def judge(self, folder: Path, progress: Progress) -> tuple[dict[str, float], dict[str, str]]:
        """The mean loss on every text, in nats per token, and how the model computed."""
        loaded = load_whole(folder, self.device, trust_remote_code=self.recipe.trust_remote_code)
        losses = {}
        for text, windows in self.windows.items():
            with window_progress(progress, f"judging on {text}", len(windows)) as report:
                result = perplexity(loaded, windows, start_tokens=len(self.start), progress=report)
            losses[text] = result.mean_loss
        return losses, computed_by(loaded)

    def judge_dense(self) -> None:
        """Evaluate the dense model once, as the reference of all points."""
        if self.record.dense.perplexity:
            return
        losses, computed = self.judge(self.source.folder, Labelled(self.progress, "dense"))
        protocol = {
            text: describe_protocol(
                self.windows[text],
                dataset=self.texts[text].dataset,
                join=self.texts[text].join,
                computed=computed,
                start=self.start,
            )
            for text in losses
        }
        dense = {text: math.exp(loss) for text, loss in losses.items()}
        self.save(dense=SweepDense(perplexity=dense), protocol=protocol)

    def in_turn(self, keys: list[PointKey]) -> Iterator[Outcome]:
        """Measure points one after the other."""
        for key in keys:
            place = f"{1 + self.grid.index(key)}/{len(self.grid)} {_point_name(key)}"
            try:
                yield key, self.measure(key, Labelled(self.progress, place))
            except SecateurError as error:
                yield key, error

    def on_ray(self, keys: list[PointKey]) -> Iterator[Outcome]:
        """Measure points in processes of a Ray cluster, in the order in which they end."""
        address, processes = self.recipe.cluster.ray, self.recipe.cluster.processes
        assert address is not None
        work = partial(_measure_alone, self.recipe, self.folder.absolute())
        on_gpu = self.device.type == "cuda"
        self.progress.start("points", len(keys))
        for key, found in each(address, processes, on_gpu, work, keys):
            self.progress.step(note=_point_name(key))
            yield key, found
        self.progress.finish()

    def note(self, key: PointKey, found: SweepPoint | SecateurError) -> None:
        """Record a measured point and delete its weights unless kept, or record its failure."""
        if isinstance(found, SweepPoint):
            self.save(points=(*self.record.points, found))
            self.drop_weights(found)
            return
        named = dict(zip(("method", "pattern", "sparsity"), key, strict=True))
        failure = {**named, "what": found.what, "where": found.where}
        self.save(failures=(*self.record.failures, failure))

    def measure(self, key: PointKey, progress: Progress) -> SweepPoint:
        """Prune or resume a point, and evaluate it."""
        place = self.place(key)
        begun = place.with_name(place.name + ".partial")
        if begun.exists() or not place.exists():  # else it is pruned but not evaluated
            carry_out(step_of("prune"), self.recipe_of(key), progress, resume=True)
        manifest = read_record(Manifest, place / NOTES / "manifest.json")
        losses, _ = self.judge(place, progress)
        dense = self.record.dense.perplexity
        notes = place.relative_to(self.folder).as_posix()
        return SweepPoint(
            **dict(zip(("method", "pattern", "sparsity"), key, strict=True)),
            perplexity={text: math.exp(loss) for text, loss in losses.items()},
            excess={text: loss - math.log(dense[text]) for text, loss in losses.items()},
            zeros=manifest.result.decoder_sparsity,
            seconds=manifest.cost.seconds,
            peak_resident_bytes=manifest.cost.peak_resident_bytes,
            notes=notes,
            folder=notes if self.recipe.keep_models else None,
        )

    def drop_weights(self, point: SweepPoint) -> None:
        """Keep only the notes of a finished point, unless its weights must stay."""
        place = self.folder / point.notes
        if point.folder is not None or not place.is_dir():
            return
        for entry in place.iterdir():
            if entry.is_dir() and entry.name != NOTES:
                shutil.rmtree(entry)
            elif entry.is_file():
                entry.unlink()
        for name in ("windows.safetensors", STATE):  # without weights, no run is finished here
            (place / NOTES / name).unlink(missing_ok=True)


def _measure_alone(recipe: SweepRecipe, folder: Path, key: PointKey) -> SweepPoint:
    """Measure a point in a process of its own. The process that began the sweep records it."""
    return SweepRun(recipe, folder, Silent()).measure(key, Silent())


def _digest(windows: Tensor) -> str:
    """A digest that identifies a set of windows."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()
