"""The steps of a chain: the possible verbs, and the checks before the first step runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from secateur.calibration.documents import check_text, texts_of
from secateur.errors import RecipeError, SecateurError, SourceError
from secateur.models.hub import kind_of_name
from secateur.models.skeleton import build_skeleton
from secateur.recipes.compress import CompressRecipe
from secateur.recipes.keywords import plain
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe, nested
from secateur.recipes.section import Recipe
from secateur.recipes.structure import StructureRecipe
from secateur.recipes.train import TrainRecipe
from secateur.registry import did_you_mean
from secateur.sparsity.allocation import allocations
from secateur.sparsity.patterns import parse_pattern
from secateur.sparsity.schedules import schedules
from secateur.sparsity.scores import scores
from secateur.sparsity.solvers import solvers
from secateur.training.training_plan import TrainingPlan
from secateur.workflows.compress.options import check_compression
from secateur.workflows.compress.pack import compress_recipe
from secateur.workflows.prune.checkpoint import run_recipe
from secateur.workflows.prune.composition import allocation_of, method_of, own_methods
from secateur.workflows.prune.order import refuse_cluster
from secateur.workflows.prune.prepare import choose_device, settings_of
from secateur.workflows.structure.cut_plan import check_together, count, plan_cut
from secateur.workflows.structure.run import structure_recipe
from secateur.workflows.train.checkpoint import run_training

ENDS = {"model": "model", "output": "output"}
"""Placeholders for required recipe keys whose values are unknown during the check."""

GIVEN = {*ENDS, "resume", "restart", "overwrite", "progress", "trust_remote_code"}
"""Options of a verb that the chain sets itself."""


@dataclass(frozen=True)
class StepKind:
    """A verb that can be a step.

    Attributes:
        recipe: the class of its recipe.
        run: carries out a recipe; takes the recipe, a progress and the options of the call.
        check: checks everything in a recipe that does not need its model.
    """

    recipe: type[Recipe]
    run: Callable[..., Any]
    check: Callable[[Any], None]


@dataclass(frozen=True)
class PlannedStep:
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
    def asked(self) -> dict[str, Any]:
        """Everything that affects the step's model, apart from the model before it."""
        return {
            self.verb: self.recipe.model_dump(mode="json", exclude={*ENDS, "trust_remote_code"})
        }

    def run(self, model: str | Path, output: Path, progress: Any, trust: bool, **call: Any) -> None:
        """Carry out the step, from one folder to another."""
        ends = {"model": str(model), "output": str(output), "trust_remote_code": trust}
        with named_step(self.number, self.verb):
            STEPS[self.verb].run(self.recipe.model_copy(update=ends), progress, **call)


@contextmanager
def named_step(number: int, verb: str) -> Iterator[None]:
    """Name the step in an error: `step 2, distill`."""
    try:
        yield
    except SecateurError as error:
        where = f"step {number}, {verb}" + (f": {error.where}" if error.where else "")
        raise type(error)(error.what, where=where, remedy=error.remedy) from error


def check_prune(recipe: PruneRecipe) -> None:
    """Check the parts of a pruning recipe, and that they fit together."""
    if recipe.compress.values is not None:
        raise RecipeError(
            "compression is a step of its own", where="compress", remedy="add a compress step"
        )
    refuse_cluster(recipe)
    method, _ = method_of(recipe)
    own_methods(recipe)
    allocation_of(recipe, method)
    choose_device(recipe.device)
    settings_of(recipe, "memory", None)


def check_structure(recipe: StructureRecipe) -> None:
    """Check the parts of a structured cut, and that it cuts something."""
    check_together(recipe)
    for registry, name in (
        (scores, recipe.score),
        (solvers, recipe.solver),
        (allocations, recipe.allocation),
    ):
        if name is not None:
            registry[name]
    choose_device(recipe.device)


def check_training(recipe: TrainRecipe) -> None:
    """Check the optimizer, the device, and the parts of gradual pruning."""
    TrainingPlan(steps=1, optimizer=recipe.optimizer)
    choose_device(recipe.device)
    if recipe.gradual is not None:
        scores[recipe.gradual.score]
        schedules[recipe.gradual.schedule]
        parse_pattern(recipe.gradual.pattern, recipe.gradual.scope)


STEPS: Mapping[str, StepKind] = {
    "structure": StepKind(StructureRecipe, structure_recipe, check_structure),
    "prune": StepKind(PruneRecipe, run_recipe, check_prune),
    "train": StepKind(TrainRecipe, run_training, check_training),
    "compress": StepKind(CompressRecipe, compress_recipe, check_compression),
}
"""The possible steps, by verb."""


def checked_steps(steps: Sequence[Any]) -> list[PlannedStep]:
    """Read and check all steps, without the model.

    Args:
        steps: each maps one verb to its options.

    Raises:
        SecateurError: a step cannot be carried out; the message says which one and why.
    """
    found = [checked(number, step) for number, step in enumerate(steps, start=1)]
    for before, after in pairwise(found):
        if before.verb == "compress":
            raise RecipeError(
                f"step {before.number} compresses the model, and {after.verb} needs a dense one",
                where=f"step {after.number}, {after.verb}",
                remedy="put compress last",
            )
    return found


def check_cuts(steps: Sequence[PlannedStep], source: Path, trust_remote_code: bool) -> None:
    """Check cuts on the configuration of the model, before any step runs.

    The first cut is checked whole, and of a later one the number of layers.

    Args:
        steps: all steps.
        source: folder of the model before the first step.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        SecateurError: the model has no such sizes; the message names the step.
    """
    layers = None
    for step in steps:
        if step.verb != "structure":
            continue
        with named_step(step.number, step.verb):
            if layers is None:
                skeleton = build_skeleton(source, trust_remote_code=trust_remote_code)
                aim = plan_cut(step.recipe, skeleton)
                layers = aim.sizes.layers - aim.drop_layers
            elif step.recipe.keep_layers is not None:
                layers = count(step.recipe.keep_layers, layers, "decoder layers")


def check_reads(recipe: Any) -> None:
    """Check that the texts, masks and teacher of a step can be found; reads none.

    Raises:
        SourceError: one is missing.
    """
    learned = getattr(recipe, "learned", None)
    texts = [*getattr(recipe, "text", ()), *(learned.domains if learned else ())]
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


def checked(number: int, step: Any) -> PlannedStep:
    """One step.

    Raises:
        SecateurError: the step cannot be carried out; the message says why.
    """
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
    own = sorted(GIVEN & options.keys())
    if own:
        raise RecipeError(
            f"{own[0]!r} is an option of the chain", where=where, remedy="remove it from the step"
        )
    kind = STEPS[verb]
    with named_step(number, verb):
        recipe = build_recipe(kind.recipe, nested(kind.recipe, {**ENDS, **options}))
        kind.check(recipe)
        check_reads(recipe)
    return PlannedStep(number, str(verb), recipe)
