"""Prepares a run from a recipe: source, method, windows, and a plan that fits into memory.

A `Job` is what pruning a checkpoint and pruning a loaded model share.

The method and the allocation of a recipe, composed from their names, and back again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.calibration.run_windows import RunWindows, WindowReader
from secateur.engine.plan import fitting_plan
from secateur.engine.plan_memory import PrunePlan, choose_sweeps, plan_run
from secateur.engine.prune.run import CalibratedLayerPass, LayerPass, Run
from secateur.engine.prune.tasks import (
    LinearTask,
    Reconstruction,
    Selection,
    Settings,
    Tasks,
    gathering,
    tasks_of,
)
from secateur.engine.stream.calibration_stream import CalibrationStream
from secateur.engine.stream.calls import LayerLayout, layouts, refuse_unknown
from secateur.engine.stream.targets import CheckpointTarget, Target
from secateur.errors import PatternError, RecipeError, located
from secateur.models.architecture import hidden_size, vocabulary_of
from secateur.models.at_rest import AssembledReader
from secateur.models.checkpoint import CheckpointReader, copied_files
from secateur.models.opening import copy_of, open_weights, weight_bytes_of
from secateur.models.sources import LocalCheckpoint, resolve
from secateur.models.tokenizer import refuse_other_words
from secateur.parallel.ranks import ALONE, Ranks, micro_batches, rows_of
from secateur.precision import full_float32
from secateur.progress import Progress, Silent
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.shared import Distill, Memory
from secateur.runs.environment import choose_device
from secateur.runs.folder import Ledger
from secateur.sparsity.allocation import Allocation, allocations
from secateur.sparsity.methods import Method, compose
from secateur.sparsity.methods import methods as named

if TYPE_CHECKING:
    from secateur.engine.search.allocation import Survey


@dataclass(frozen=True)
class Prepared:
    """A recipe with everything that it names, opened and checked."""

    recipe: PruneRecipe
    source: LocalCheckpoint
    target: CheckpointTarget
    method: Method
    allocation: Allocation
    selection: Selection
    sparsity: float
    windows: RunWindows | None = None
    """None if no part of the recipe reads text."""
    methods: Mapping[str, Method] = field(default_factory=dict)
    """Methods that replace `method` for some linears, by glob."""
    costs: Mapping[str, int] = field(default_factory=dict)
    """The cost of one unit of a linear in an allocation's budget, by name."""
    teacher: CheckpointTarget | None = None
    """The model that the result learns from, if it is not the source."""

    @property
    def output_bytes(self) -> int:
        """Size of the result's files."""
        reader = self.target.reader
        weights = weight_bytes_of(reader, keep_format=self.recipe.keep_format)
        return weights + sum(f.stat().st_size for f in copied_files(reader.folder))

    @property
    def layouts(self) -> Sequence[LayerLayout]:
        """The groups of linears in each layer; empty without text."""
        if self.windows is None:
            return ()
        return layouts(self.target, self.windows.calibration.shape[1])

    def tasks(self) -> dict[str, LinearTask]:
        """Return the task of each linear.

        Raises:
            RecipeError, PatternError, ShapeError: a glob matches nothing, a matrix does not fit.
        """
        return tasks_of(
            self.target,
            self.selection,
            self.method,
            self.sparsity,
            self.layouts,
            methods=self.methods,
            costs=self.costs,
        )

    def job(self, tasks: Tasks, activations: str, work: Path, ranks: Ranks) -> Job:
        """Return the work of the engine.

        Args:
            tasks: the task of each linear.
            activations: `memory` or `disk`.
            work: folder for the files of the work.
            ranks: the processes that share it.
        """
        return Job(
            self.target,
            tasks,
            None if self.windows is None else self.windows.calibration,
            settings_of(self.recipe, activations, work, ranks),
            self.allocation,
            self.sparsity,
        )


def settings_of(
    recipe: PruneRecipe, activations: str, work: Path | None, ranks: Ranks = ALONE
) -> Settings:
    """Return the settings for the work of a recipe."""
    tuning = recipe.reconstruction
    return Settings(
        sequential=recipe.sequential,
        asymmetric=recipe.asymmetric,
        asymmetric_damping=recipe.asymmetric_damping,
        fast_matmuls=recipe.fast_matmuls,
        micro_batch_tokens=recipe.memory.micro_batch_tokens,
        activations=activations,
        work=work,
        on_collapse=recipe.on_collapse,
        reconstruction=Reconstruction(tuning.passes),
        ranks=ranks,
    )


def windows_needed(recipe: PruneRecipe, method: Method, allocation: Allocation) -> bool:
    """Whether any part of a recipe reads calibration tokens."""
    tuned = recipe.reconstruction.passes or recipe.distillation.epochs
    judged = allocation.judged_tokens > 0
    return bool(method.requires | allocation.requires or judged or tuned or recipe.asymmetric)


def prepare(
    recipe: PruneRecipe,
    source: LocalCheckpoint,
    output: Path | None = None,
    stored_windows: Path | None = None,
    *,
    only_plan: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Open and check everything that a recipe names. This writes no output.

    Args:
        recipe: the recipe.
        source: the model that it names.
        output: the folder of the patched copy; None to only plan.
        stored_windows: windows of an earlier run to reuse.
        only_plan: read no text; use blank windows of the recipe's number and length.
        progress: receives the reading of the text.
    """
    progress = progress or Silent()
    method, sparsity = method_of(recipe)
    methods = own_methods(recipe)
    allocation = allocation_of(recipe, method)
    device = choose_device(recipe.device)
    reader = open_weights(source.folder)
    _refuse_dense_format(recipe, reader)
    target = CheckpointTarget(
        reader,
        copy_of(reader, output, keep_format=recipe.keep_format) if output else None,
        device,
        trust_remote_code=recipe.trust_remote_code,
    )
    refuse_unknown(target)
    windows = None
    if windows_needed(recipe, method, allocation):
        stored = stored_windows if stored_windows and stored_windows.exists() else None
        if stored is not None:
            windows = RunWindows.load(stored, target.model.config)
        else:
            progress.start("reading calibration text", 1)
            cutter = WindowReader.of_folder(
                source.folder, target.model.config, trust_remote_code=recipe.trust_remote_code
            )
            windows = RunWindows.cut(
                cutter, recipe.calibration, recipe.distillation, only_plan=only_plan
            )
            progress.finish()
    return Prepared(
        recipe,
        source,
        target,
        method,
        allocation,
        Selection(recipe.include, recipe.exclude, recipe.overrides),
        sparsity,
        windows,
        methods,
        teacher=teacher_of(recipe.distillation, target, progress, recipe.trust_remote_code),
    )


def teacher_of(
    how: Distill, student: CheckpointTarget, progress: Progress, trust_remote_code: bool
) -> CheckpointTarget | None:
    """Open the teacher that the options of a distillation name; None if they name none.

    Args:
        how: the options.
        student: the model that learns, or the one that it is made from.
        progress: receives the download.
        trust_remote_code: whether code from its folder may run.

    Raises:
        RecipeError: it has another vocabulary, or hidden states of another width are to be learnt.
    """
    if how.teacher is None or not how.epochs:
        return None
    trust = trust_remote_code
    found = resolve(how.teacher, trust_remote_code=trust, progress=progress)
    refuse_other_words(student.reader.folder, found.folder, trust_remote_code=trust)
    reader = open_weights(found.folder)
    teacher = CheckpointTarget(reader, None, student.device, trust_remote_code=trust)
    sizes = {"tokens": vocabulary_of}
    if how.hidden:
        sizes["channels"] = hidden_size
    for what, size_of in sizes.items():
        own, other = size_of(student.model), size_of(teacher.model)
        if own != other:
            raise RecipeError(
                f"the student has {own} {what}, the teacher {other}",
                where=f"--distill-teacher {how.teacher}",
                remedy="name the model that it was made from"
                if what == "tokens"
                else "leave out --distill-hidden, which compares states of equal widths",
            )
    return teacher


def _refuse_dense_format(recipe: PruneRecipe, reader: CheckpointReader) -> None:
    """Refuse to keep the format of a source that stores plain numbers."""
    if recipe.keep_format and not isinstance(reader, AssembledReader):
        raise RecipeError(
            "the source stores plain numbers, and the result always has their dtypes",
            where="--keep-format",
            remedy="leave --keep-format out",
        )


def choose_plan(
    prepared: Prepared,
    tasks: Mapping[str, LinearTask],
    memory: Memory,
    ranks: Ranks = ALONE,
    sweep_windows: int | None = None,
) -> tuple[PrunePlan, str]:
    """Plan the run, with hidden states on disk if memory cannot hold them.

    Args:
        prepared: the run.
        tasks: the task of each linear.
        memory: the budget.
        ranks: the processes that share the work.
        sweep_windows: number of windows in a sweep; 0 for both whole models, None to choose.

    With several processes this is the plan of the first one, except that the disk holds the hidden
    states of all. It shares the host with the others until all layers are pruned, and distills when
    they have ended.

    Returns:
        The plan, and `memory` or `disk`.

    Raises:
        MemoryBudgetError: the run exceeds the budget even with hidden states on disk.
        RecipeError: there are fewer calibration windows than processes.
    """

    def planned(windows: Tensor | None, activations: str, epochs: int) -> PrunePlan:
        return plan_run(
            prepared.target,
            tasks,
            windows,
            settings_of(prepared.recipe, activations, None),
            epochs,
            prepared.allocation,
            prepared.output_bytes,
            0 if prepared.windows is None else prepared.windows.ungenerated,
            sweep_windows or 0,
            0 if prepared.windows is None else prepared.windows.extra.numel(),
            prepared.teacher,
        )

    every = own = None if prepared.windows is None else prepared.windows.planned
    if every is not None and ranks.count > 1:  # no process has more windows than the first one
        at_once = max(1, memory.micro_batch_tokens // every.shape[1])
        batches = micro_batches(len(every), at_once, ranks.count)
        own = every[: rows_of(0, batches, ranks.count)[-1].stop]

    distillation, device = prepared.recipe.distillation, prepared.target.device
    if sweep_windows is None and own is not None:
        sweep_windows = choose_sweeps(
            distillation, prepared.target, own, tasks, memory.max_bytes, prepared.teacher
        )

    def fitting(activations: str, epochs: int, sharing: int) -> tuple[PrunePlan, str]:
        return fitting_plan(
            lambda place: planned(own, place, epochs),
            device,
            max_memory=memory.max_bytes,
            activations=activations,
            sharing=sharing,
        )

    activations: str = memory.activations
    if ranks.here > 1:
        _, activations = fitting(activations, 0, ranks.here)
    plan, activations = fitting(activations, distillation.epochs, 1)
    if own is not every:
        disk = planned(every, activations, distillation.epochs).disk_bytes
        plan = replace(plan, disk_bytes=disk)
    return plan, activations


@dataclass(frozen=True)
class Job:
    """Everything that determines the pruned weights.

    Attributes:
        target: the model.
        tasks: the tasks of the linears before the allocation.
        windows: calibration tokens [samples, sequence_length], or None if nothing needs them.
        settings: how the work is done.
        allocation: sets the sparsity of each linear.
        sparsity: target sparsity of the whole model.
    """

    target: Target
    tasks: Tasks
    windows: Tensor | None
    settings: Settings
    allocation: Allocation
    sparsity: float

    def run(self, ledger: Ledger, progress: Progress, done: int = 0) -> Tasks:
        """Gather gradients if the method needs them, allocate, and prune the layers.

        Args:
            ledger: record of finished layers.
            progress: receives every step.
            done: number of layers that an earlier run finished.

        Returns:
            The tasks, without linears that calibration did not reach.
        """
        settings, tasks, stream = self.settings, self.tasks, self._stream()
        before = gathering(tasks).backward
        if before and stream is not None and settings.work is not None:
            from secateur.engine.stream.gradients import GradientPass

            GradientPass(stream.outer, before, settings.work, progress, settings.ranks).execute()
        if self.allocation.reach > 0:
            from secateur.engine.search.allocation import allocate

            tasks = allocate(self.survey(progress), self.allocation, self.sparsity)
        forwards = gathering(tasks, asymmetric=settings.asymmetric).forward or settings.tunes
        opened, kind = None, LayerPass
        if stream is not None and forwards and done < len(self.target.layers):
            kind = CalibratedLayerPass
            if settings.asymmetric:
                from secateur.engine.prune.asymmetric import AsymmetricLayerPass

                kind = AsymmetricLayerPass
            with torch.no_grad(), full_float32():
                opened = stream.open(done, dense=settings.dense_needed)
            if opened.start == 0:  # also if the hidden states of a stopped run are lost
                ledger.begin()
            done = opened.start
        pruning = Run(self.target, tasks, settings, ledger, progress, opened, kind)
        pruning.execute(done)
        return pruning.tasks

    def survey(self, progress: Progress) -> Survey:
        """What passes through the whole dense model, for an allocation."""
        from secateur.engine.search.allocation import Survey

        return Survey(self.target, self.tasks, self._stream(), self.settings, progress)

    def _stream(self) -> CalibrationStream | None:
        """The calibration stream."""
        if self.windows is None:
            return None
        how = self.settings
        return CalibrationStream(
            self.target, self.windows, how.micro_batch_tokens, how.in_memory, how.work, how.ranks,
            on_gpu=how.on_gpu,
        )  # fmt: skip


def _composed(recipe: PruneRecipe, parameters: Mapping[str, int | float]) -> Method:
    """The method of a recipe with some parameters."""
    return compose(
        recipe.method,
        recipe.pattern,
        scope=recipe.scope,
        score=recipe.score,
        solver=recipe.solver,
        refine=recipe.refine,
        **parameters,
    )


def own_methods(recipe: PruneRecipe) -> dict[str, Method]:
    """The methods of linears that have parameters of their own, by glob.

    Raises:
        RecipeError: a parameter is unknown or out of range; the message names the glob.
    """
    found = {}
    for glob, own in recipe.method_overrides.items():
        with located(f"method override {glob!r}"):
            found[glob] = _composed(recipe, {**recipe.method_parameters, **own})
    return found


def method_of(recipe: PruneRecipe) -> tuple[Method, float]:
    """Return the method and the sparsity of a recipe.

    Raises:
        RecipeError, PatternError: a name is unknown, or the parts do not fit together.
    """
    for part in ("score", "solver"):
        given = getattr(recipe, part)
        known = named[recipe.method] if recipe.method and recipe.method in named else None
        decided = getattr(known, part) if known else given
        if given not in (None, decided):
            raise RecipeError(
                f"the method {recipe.method!r} has the {part} {decided!r}, but {given!r} is given",
                where=f"--{part}",
                remedy="name a method, or compose one of --score and --solver without --method",
            )
    method = _composed(recipe, recipe.method_parameters)
    implied = method.pattern.sparsity
    sparsity = implied if recipe.sparsity is None else recipe.sparsity
    if sparsity is None:
        raise RecipeError(
            f"the pattern {recipe.pattern!r} needs a sparsity",
            remedy="add --sparsity, for example --sparsity 0.5",
        )
    for glob, own in {"": sparsity, **recipe.overrides}.items():
        if implied is not None and own and abs(own - implied) > 1e-6:
            raise RecipeError(
                f"{recipe.pattern} always has sparsity {implied:g}, not {own:g}",
                where=f"override {glob!r}" if glob else "--sparsity",
                remedy="leave the sparsity out, or choose another N:M",
            )
    return method, sparsity


def allocation_of(recipe: PruneRecipe, method: Method) -> Allocation:
    """Return the allocation of a recipe. The global scope is an allocation without floors and caps.

    Raises:
        RecipeError: the name is unknown, or the pattern leaves nothing to allocate.
    """
    allocation = allocations[recipe.allocation]()
    pattern = method.pattern
    if allocation.reach > 0 and pattern.sparsity is not None:
        raise RecipeError(
            f"the pattern {pattern.name} has one sparsity for every linear, so there is nothing "
            f"for the allocation {recipe.allocation!r} to decide",
            remedy="use the pattern 'unstructured' or blocks, or leave the allocation out",
        )
    if pattern.scope != "global":
        return allocation
    if allocation.reach > 0:
        raise RecipeError(
            "with the scope 'global' one threshold decides how much each linear loses, so there "
            f"is nothing for the allocation {recipe.allocation!r} to decide",
            remedy="leave one of the two out; the allocation 'global' is the threshold with a "
            "floor and a cap for each linear",
        )
    from secateur.sparsity.allocation.global_threshold import GlobalThreshold

    return GlobalThreshold(reach=1.0)


PARAMETERS = "method_parameters"


def with_method(method: str | Method | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Add the method to the options of a run. A `Method` becomes the keys that compose it.

    Args:
        method: a name, or a composed method; None for the preset's method.
        options: all other options.

    Raises:
        RecipeError: an option contradicts the method, or no recipe can express the method.
    """
    if not isinstance(method, Method):
        return {**options, "method": method}
    keys = keys_of(method)
    own = {"score", "solver", "refine", "pattern", "scope", PARAMETERS}
    for name in sorted(own & {key for key, value in options.items() if value is not None}):
        if options[name] != keys.get(name):
            raise RecipeError(
                f"the method already decides `{name}`: {keys.get(name)!r}, not {options[name]!r}",
                remedy=f"leave `{name}` out, or compose the method with it",
            )
    return {**options, **keys}


def keys_of(method: Method) -> dict[str, Any]:
    """The keys of a recipe that compose a method.

    Raises:
        RecipeError: no recipe can express it: a part is not registered, or two parts have
            different values for one parameter.
    """
    kept = method.score, method.solver, method.refinement
    parameters = {
        field.name: getattr(part, field.name)
        for part in kept
        if part is not None
        for field in fields(part)  # type: ignore[arg-type]
        if getattr(part, field.name) != field.default
    }
    pair = method.score_name, method.solver_name
    famous = next((n for n, known in named.items() if (known.score, known.solver) == pair), None)
    keys: dict[str, Any] = {
        "method": famous,
        "score": None if famous else method.score_name,
        "solver": None if famous else method.solver_name,
        "refine": method.refinement_name,
        "pattern": method.pattern.name,
        "scope": method.pattern.scope if len(method.pattern.scopes) > 1 else None,
    }
    own = {key: value for key, value in keys.items() if key not in ("method", "pattern")}
    try:
        recomposed = compose(keys["method"], keys["pattern"], **own, **parameters)
    except (RecipeError, PatternError):
        recomposed = None
    if recomposed != method:
        raise RecipeError(
            f"no recipe composes the method {method.name!r} with these parts: {method}",
            remedy="register its parts under their names, and give one value to a parameter that "
            "several parts have; see CONTRIBUTING.md",
        )
    return {**keys, PARAMETERS: parameters}
