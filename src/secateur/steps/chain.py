"""A chain runs several verbs in order (cut, prune, train, compress) and reports each step.

All steps are checked before the first one runs. Each reads the folder of the previous one. A step's
folder is complete, or it does not exist. So a killed chain resumes with its unfinished step, and
that step resumes where it stopped.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from secateur.calibration.documents import check_text
from secateur.diagnostics.audit import audit_checkpoint
from secateur.errors import RecipeError, SecateurError, SourceError
from secateur.models.checkpoint import shard_files
from secateur.models.hub import kind_of_name
from secateur.models.skeleton import build_skeleton
from secateur.models.sources import LocalCheckpoint
from secateur.progress import Labelled, Progress
from secateur.recipes.keywords import plain
from secateur.recipes.options import Recipe
from secateur.recipes.prune import ChainRecipe, PruneRecipe
from secateur.recipes.reading import build_recipe, nested
from secateur.recipes.recipe_files import dump_recipe
from secateur.recipes.shared import texts_of
from secateur.recipes.verbs import VERBS, imported
from secateur.registry import did_you_mean
from secateur.reporting import plan as plans
from secateur.reporting.cards import made_again, shown_place
from secateur.reporting.models import ChainResult
from secateur.runs import records
from secateur.runs.folder import NOTES, STATE, check_output, differences, refuse_another
from secateur.runs.output import write_json, write_text
from secateur.runs.records import read_record
from secateur.steps import runner
from secateur.structured.cut import Cut
from secateur.structured.cut_plan import count, plan_cut
from secateur.structured.design import accounting

CHAIN, RECIPE = "chain.json", "recipe.yaml"
BEGUN = "begun.json"

PLACEHOLDERS = {"model": "model", "output": "output"}
"""Placeholders for required recipe keys whose values are unknown during the check."""

OPTIONS_OF_CHAIN = {
    *PLACEHOLDERS,
    "resume",
    "restart",
    "overwrite",
    "progress",
    "trust_remote_code",
}
"""Options of a verb that the chain sets itself."""


STEPS = ("structure", "prune", "train", "compress")
"""The verbs that can be a step."""


@dataclass(frozen=True)
class _PlannedStep:
    """One step of a chain.

    Attributes:
        number: its number, from 1.
        verb: the verb it runs.
        recipe: the recipe, with placeholders for the model and the output.
    """

    number: int
    verb: str
    recipe: Any

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.number:02d}-{self.verb}"

    @cached_property
    def options(self) -> dict[str, Any]:
        """Everything that affects the step's model, apart from the model before it."""
        return {self.verb: runner.recipe_identity(self.recipe, {"trust_remote_code"})}

    def run(
        self, outer: runner.RunContext, recipe: Any, source: LocalCheckpoint, **call: Any
    ) -> None:
        """Carry out the step on a source, as a part of the run of the recipe."""
        shown = {name: getattr(recipe, name) for name in ("model", "output", "trust_remote_code")}
        with _named_step(self.number, self.verb):
            runner.carry_out(
                runner.step_of(self.verb),
                self.recipe.model_copy(update=shown),
                outer.progress,
                at=outer.folder.work / self.name,
                source=source,
                **call,
            )

    def planned(self, recipe: ChainRecipe, progress: Any) -> plans.ChainPlanStep:
        """The plan of the step on the model of the chain; and why, where there is none.

        Raises:
            SecateurError: the first step, which reads that model, would be refused.
        """
        row, step = VERBS[self.verb], plans.ChainPlanStep(self.verb)
        if not row.plan:
            return step
        shown = {"model": recipe.model, "output": None}
        own = self.recipe.model_copy(
            update={**shown, "trust_remote_code": recipe.trust_remote_code}
        )
        try:
            with _named_step(self.number, self.verb):
                plan = imported(row.plan)(own, Labelled(progress, self.verb), {})
        except SecateurError as error:
            if self.number == 1:
                raise
            return replace(step, unknown=error.what)
        if isinstance(plan, plans.TrainPlanResult):
            return replace(step, peak_bytes=plan.memory["peak"])
        after = plan.after if isinstance(plan, plans.CutPlanResult) and self.number == 1 else None
        pruning = plan.plan if isinstance(plan, plans.CutPlanResult) else plan
        return replace(
            step,
            parameters=None if after is None else after.parameters,
            file_bytes=None if after is None else after.file_bytes,
            peak_bytes=None if pruning is None else pruning.peak_bytes,
            seconds=plan.seconds if isinstance(plan, plans.PlanResult) else None,
        )


@contextmanager
def _named_step(number: int, verb: str) -> Iterator[None]:
    """Name the step in an error: `step 2, distill`."""
    try:
        yield
    except SecateurError as error:
        where = f"step {number}, {verb}" + (f": {error.where}" if error.where else "")
        raise type(error)(error.what, where=where, remedy=error.remedy) from error


def plan_chain(
    recipe: ChainRecipe, progress: Progress, call: Mapping[str, Any]
) -> plans.ChainPlanResult:
    """Check all steps, and show what each of them would leave and need.

    Args:
        recipe: recipe of the chain.
        progress: receives the download of the model.
        call: the other options of the call.

    Raises:
        SecateurError: as the chain would.
    """
    steps = checked_steps(recipe.steps, recipe.model)
    source = runner.source_of(recipe, progress)
    _check_cuts(steps, source.folder)
    whole = accounting(build_skeleton(source.folder), Cut()).before
    rows = [plans.ChainPlanStep("source", whole.parameters, whole.file_bytes)]
    rows += [step.planned(recipe, progress) for step in steps]
    known = sum(row.file_bytes or whole.file_bytes for row in rows[1:])
    check_output(recipe.output, "chain", known, (recipe.model, source.folder), call)
    return plans.ChainPlanResult(steps=tuple(rows))


class ChainSteps(runner.Step[Any, ChainResult]):
    """Carry out several verbs. Each reads the result of the previous one.

    All are checked before the first one runs. A stopped chain can resume with different steps if
    its finished steps are the same.
    """

    verb = "chain"

    def __init__(self, recipe: Any, run: runner.RunContext) -> None:
        super().__init__(recipe, run)
        self.steps: list[_PlannedStep] = run.checked
        _check_cuts(self.steps, run.source.folder)

    @classmethod
    def check(cls, recipe: Any) -> list[_PlannedStep]:
        """Read and check all steps."""
        return checked_steps(recipe.steps, recipe.model)

    def identity(self) -> dict[str, Any]:
        """The model."""
        files = shard_files(self.run.source.folder)
        return {"source_files": runner.model_digests(files, self.run.progress)}

    def settled(self) -> dict[str, Any]:
        """The steps. They may change while the chain is stopped."""
        return {"steps": [step.options for step in self.steps]}

    @classmethod
    def result(cls, output: Path) -> ChainResult:
        """Read the result of a finished chain from its notes."""
        found = read_record(ChainResult, output / NOTES / CHAIN)
        return found.model_copy(update={"output": output})

    def work(self) -> ChainResult:
        """Run the steps that no earlier run finished; the last one's folder becomes the result.

        The options of a step are noted before it begins. Its report is written when its folder is
        complete.
        """
        folder, progress, begun = self.run.folder, self.run.progress, self.begun_steps()
        source = self.run.source
        links = [_describe("source", source.folder, 0.0, progress)]
        for step in self.steps:
            made = folder.work / step.name
            record = made.with_suffix(".json")
            if not record.exists():
                started = time.perf_counter()
                labelled = Labelled(progress, f"{step.number}/{len(self.steps)} {step.verb}")
                if not made.exists():
                    before_it = begun[step.number - 1 :][:1]
                    another = bool(before_it) and bool(differences(before_it, [step.options]))
                    begun = [*begun[: step.number - 1], step.options]
                    write_json(folder.work / BEGUN, begun)
                    outer = replace(self.run, progress=labelled)
                    step.run(outer, self.recipe, source, resume=not another, restart=another)
                seconds = time.perf_counter() - started
                described = _describe(step.verb, made, seconds, labelled)
                write_json(record, described.to_json())
            links.append(read_record(records.ChainStep, record))
            source = replace(source, folder=made)
        if made.exists():  # not after a kill between this rename and the last one
            shutil.rmtree(folder.model)
            made.rename(folder.model)
        self.write_notes()
        result = ChainResult(links=tuple(links), output=folder.output)
        write_json(folder.notes / CHAIN, result.to_json())
        return result

    def begun_steps(self) -> list[Any]:
        """Return the recorded options of all steps that have begun. Refuse other finished steps."""
        folder = self.run.folder
        file = folder.work / BEGUN
        begun = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        for number, options in enumerate(begun, start=1):
            now = self.steps[number - 1].options if number <= len(self.steps) else {}
            [verb] = options
            made = folder.work / f"{number:02d}-{verb}"
            if made.exists() or made.with_suffix(".json").exists():
                try:
                    refuse_another(options, now, folder.partial)
                except RecipeError as error:
                    where = f"step {number}, {verb}"
                    raise RecipeError(error.what, where=where, remedy=error.remedy) from None
        return begun

    def write_notes(self) -> None:
        """Gather the notes of all steps, and write the recipe, also into the card."""
        folder, whole = self.run.folder, dump_recipe(self.recipe)
        for step in sorted(folder.work.iterdir()):
            if (step / NOTES).is_dir():
                shutil.copytree(
                    step / NOTES,
                    folder.notes / "steps" / step.name,
                    ignore=shutil.ignore_patterns("*.safetensors", STATE),
                    dirs_exist_ok=True,
                )
        write_text(folder.notes / RECIPE, whole)
        card, place = folder.model / "README.md", shown_place(self.recipe.output)
        text = card.read_text(encoding="utf-8")
        section = made_again(self.verb, whole, place)
        if section not in text:
            write_text(card, f"{text.rstrip()}\n\n{section}\n")


class PruneAndCompress(ChainSteps):
    """Prunes, and compresses the result: the two steps of `secateur prune --compress`."""

    verb = "prune"

    @classmethod
    def check(cls, recipe: PruneRecipe) -> list[_PlannedStep]:
        """The two steps, checked."""
        of_both = {"model", "output", "compress", "gate", "trust_remote_code"}
        options = recipe.model_dump(mode="json", exclude=of_both, exclude_none=True)
        packing = {"values": recipe.compress}
        return checked_steps([{"prune": options}, {"compress": packing}], recipe.model)

    @classmethod
    def result(cls, output: Path) -> Any:
        """Read the result of a finished run from its notes."""
        return runner.step_of("prune").result(output)

    def work(self) -> Any:
        """Run both steps."""
        super().work()
        made: Any = runner.step_of("prune")
        return made.result(self.run.folder.model, self.run.place)


def _describe(step: str, folder: Path, seconds: float, progress: Progress) -> records.ChainStep:
    """Describe the contents of a folder."""
    audit = audit_checkpoint(folder, progress=progress)
    zeros = sum(linear.zeros for linear in audit.linears)
    return records.ChainStep(
        step=step,
        parameters=audit.parameters,
        zeros=zeros,
        file_bytes=audit.file_bytes,
        seconds=seconds,
        kept=audit.parameters - zeros,
    )


def checked_steps(steps: Sequence[Any], model: str) -> list[_PlannedStep]:
    """Read and check all steps, without opening the model.

    Args:
        steps: each maps one verb to its options.
        model: the model of the chain. A sample brings the texts of all steps.

    Raises:
        SecateurError: a step cannot be carried out; the message says which one and why.
    """
    found = [_checked(number, step, model) for number, step in enumerate(steps, start=1)]
    for before, after in pairwise(found):
        if before.verb == "compress":
            raise RecipeError(
                f"step {before.number} compresses the model, and {after.verb} needs a dense one",
                where=f"step {after.number}, {after.verb}",
                remedy="put compress last",
            )
    return found


def _checked(number: int, step: Any, model: str) -> _PlannedStep:
    """One step."""
    where = f"step {number}"
    if not isinstance(step, Mapping) or len(step) != 1:
        raise RecipeError(
            "a step is one verb with its options", where=where, remedy="prune: {sparsity: 0.5}"
        )
    verb, given = next(iter(step.items()))
    if verb not in STEPS:
        raise RecipeError(
            f"{verb!r} is not a step", where=where, remedy=did_you_mean(str(verb), [*STEPS])
        )
    where = f"{where}, {verb}"
    if given is not None and not isinstance(given, Mapping):
        raise RecipeError(
            f"the options are {str(given)[:40]!r}, not keys and values",
            where=where,
            remedy=f"{verb}: {{key: value}}",
        )
    options = {str(key): plain(value) for key, value in (given or {}).items()}
    own = sorted(OPTIONS_OF_CHAIN & options.keys())
    if own:
        raise RecipeError(
            f"{own[0]!r} is an option of the chain", where=where, remedy="remove it from the step"
        )
    kind: type[Recipe] = imported(VERBS[verb].recipe)
    with _named_step(number, verb):
        recipe: Any = build_recipe(kind, nested(kind, {**PLACEHOLDERS, "model": model, **options}))
        if verb == "prune" and recipe.compress is not None:
            raise RecipeError(
                "compression is a step of its own", where="compress", remedy="add a compress step"
            )
        runner.step_of(verb).check(recipe)
        runner.judge_of(recipe)
        _check_reads(recipe)
    return _PlannedStep(number, str(verb), recipe)


def _check_reads(recipe: Any) -> None:
    """Check that the texts, masks and teacher of a step can be found; reads none."""
    texts = [*getattr(recipe, "text", ())]
    texts += [getattr(recipe, name, None) for name in ("validation_text", "vocabulary")]
    calibration = getattr(recipe, "calibration", None)
    if calibration is not None and calibration.source is not None:
        texts += texts_of(calibration.source)
    for text in filter(None, texts):
        check_text(text)
    mask, teacher = getattr(recipe, "mask", None), getattr(recipe, "teacher", None)
    if mask is not None and not Path(mask).expanduser().exists():
        raise SourceError("there is no such file", where=str(mask), remedy="check --mask")
    if teacher is not None and kind_of_name(teacher) is None:
        raise SourceError(
            f"no such file or folder, and not a hub id: {teacher!r}",
            where="teacher",
            remedy="check the path; hub ids look like org/name",
        )


def _check_cuts(steps: Sequence[_PlannedStep], source: Path) -> None:
    """Check cuts on the configuration of the model, before any step runs.

    The first cut is checked whole, and of a later one the number of layers.
    """
    layers = None
    for step in steps:
        if step.verb != "structure":
            continue
        with _named_step(step.number, step.verb):
            if layers is None:
                skeleton = build_skeleton(source)
                aim = plan_cut(step.recipe, skeleton)
                layers = aim.sizes.layers - aim.drop_layers
            elif step.recipe.keep_layers is not None:
                layers = count(step.recipe.keep_layers, layers, "decoder layers")
