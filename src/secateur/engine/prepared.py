"""Prepares a run from a recipe: source, method, windows, and a plan that fits into memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from secateur.calibration.run_windows import RunWindows, WindowReader
from secateur.engine.plan import fitting_plan, memory_budget
from secateur.engine.plan_memory import Learning, PrunePlan, choose_sweeps, plan_run
from secateur.engine.prune.tasks import LinearTask, Selection, Settings, Tasks, gathering, tasks_of
from secateur.engine.stream.calibration_stream import CalibrationStream
from secateur.engine.stream.calls import LayerLayout, layouts
from secateur.engine.stream.halted_forwards import put_together
from secateur.errors import RecipeError
from secateur.models.architecture import hidden_size, refuse_other_sizes, vocabulary_of
from secateur.models.at_rest import AssembledReader
from secateur.models.checkpoint import copied_files
from secateur.models.configuration import TrustedFolder
from secateur.models.experts import AT_ONCE
from secateur.models.opening import copy_of, open_weights, weight_bytes_of
from secateur.models.sources import LocalCheckpoint, resolve
from secateur.models.targets import CheckpointTarget, Target, refuse_unknown
from secateur.models.tokenizer import refuse_other_words
from secateur.parallel.ranks import ALONE, Ranks, micro_batches, rows_of
from secateur.progress import Progress, Silent
from secateur.recipes.methods_of import allocation_of, method_of, own_methods, windows_needed
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.shared import Distill, Memory
from secateur.runs.environment import choose_device
from secateur.sparsity.allocation import Allocation
from secateur.sparsity.methods import Method


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
    def tokens(self) -> Tensor | None:
        """The calibration tokens [windows, sequence_length]; None without text."""
        return None if self.windows is None else self.windows.calibration

    def stream(self, settings: Settings) -> CalibrationStream | None:
        """The calibration stream; None without text."""
        return None if self.tokens is None else settings.stream(self.target, self.tokens)

    @property
    def layouts(self) -> Sequence[LayerLayout]:
        """The groups of linears in each layer; empty without text."""
        return () if self.tokens is None else layouts(self.target, self.tokens.shape[1])

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
    if recipe.keep_format and not isinstance(reader, AssembledReader):
        raise RecipeError(
            "the source stores plain numbers, and the result always has their dtypes",
            where="--keep-format",
            remedy="leave --keep-format out",
        )
    target = CheckpointTarget(
        reader, copy_of(reader, output, keep_format=recipe.keep_format) if output else None, device
    )
    refuse_unknown(target)
    windows = None
    if windows_needed(recipe, method, allocation):
        if stored_windows and stored_windows.exists():
            windows = RunWindows.load(stored_windows, target.model.config)
        else:
            progress.start("reading calibration text", 1)
            cutter = WindowReader.of_folder(source.folder, target.model.config)
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
        teacher=teacher_of(recipe.distillation, target, progress),
    )


def teacher_of(
    how: Distill, student: CheckpointTarget, progress: Progress
) -> CheckpointTarget | None:
    """Open the teacher that the options of a distillation name; None if they name none.

    Args:
        how: the options.
        student: the model that learns, or the one that it is made from. If its code may run, so may
            the teacher's.
        progress: receives the download.

    Raises:
        RecipeError: it has another vocabulary, or hidden states of another width are to be learnt.
    """
    if how.teacher is None or not how.epochs:
        return None
    trust = isinstance(student.reader.folder, TrustedFolder)
    found = resolve(how.teacher, trust_remote_code=trust, progress=progress)
    refuse_other_words(student.reader.folder, found.folder)
    reader = open_weights(found.folder)
    teacher = CheckpointTarget(reader, None, student.device)
    sizes = {"tokens": vocabulary_of}
    remedy = "name the model that it was made from"
    if how.hidden:
        sizes["channels"] = hidden_size
        remedy += "; or leave out --distill-hidden, which compares states of equal widths"
    refuse_other_sizes(
        sizes, student.model, teacher.model, ("student", "teacher"),
        where=f"--distill-teacher {how.teacher}", remedy=remedy,
    )  # fmt: skip
    return teacher


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
    windows = prepared.windows
    extra, unwritten = (0, 0) if windows is None else (windows.extra.numel(), windows.ungenerated)
    known = prepared.allocation, prepared.output_bytes, unwritten

    def planned(tokens: Tensor | None, activations: str, epochs: int, experts: int) -> PrunePlan:
        settings = Settings.of(prepared.recipe, activations, experts_at_once=experts)
        learning = Learning(epochs, extra, prepared.teacher, sweep_windows or 0)
        return plan_run(prepared.target, tasks, tokens, settings, *known, learning)

    every = own = None if windows is None else windows.planned
    if every is not None and ranks.count > 1:  # no process has more windows than the first one
        at_once = max(1, memory.micro_batch_tokens // every.shape[1])
        batches = micro_batches(len(every), at_once, ranks.count)
        own = every[: rows_of(0, batches, ranks.count)[-1].stop]

    target, distillation = prepared.target, prepared.recipe.distillation
    if sweep_windows is None and own is not None:
        sweep_windows = choose_sweeps(
            distillation, target, own, tasks, memory.max_bytes, prepared.teacher
        )

    def fitting(activations: str, epochs: int, sharing: int, experts: int) -> tuple[PrunePlan, str]:
        budget = memory_budget(memory.max_bytes, target.device, sharing)

        def with_most_experts(place: str) -> PrunePlan:
            """The plan with as many experts at once as fit, if any fit."""
            at_once = min(experts, put_together(target.model, experts))
            plan = planned(own, place, epochs, at_once)
            while at_once > 1 and budget.shortage(plan) is not None:
                at_once //= 2
                plan = planned(own, place, epochs, at_once)
            return plan

        return fitting_plan(with_most_experts, target.device, activations, budget)

    activations, experts = str(memory.activations), AT_ONCE
    if ranks.here > 1:  # of the pruning alone, which the processes share
        plan, activations = fitting(activations, 0, ranks.here, experts)
        experts = plan.experts_at_once
    plan, activations = fitting(activations, distillation.epochs, 1, experts)
    if own is not every:
        whole = planned(every, activations, distillation.epochs, plan.experts_at_once)
        plan = replace(plan, disk_bytes=whole.disk_bytes)
    return plan, activations


def allocated(
    target: Target,
    tasks: Tasks,
    stream: CalibrationStream | None,
    settings: Settings,
    allocation: Allocation,
    sparsity: float,
    progress: Progress,
) -> Tasks:
    """What precedes the layers: gradients if a method needs them, and the sparsity of each linear.

    Args:
        target: the model.
        tasks: the tasks of the linears.
        stream: the calibration stream; None without calibration.
        settings: how the work is done.
        allocation: sets the sparsity of each linear.
        sparsity: target sparsity of the whole model.
        progress: receives every step.

    Returns:
        The tasks with the sparsities of the allocation.
    """
    before = gathering(tasks).backward
    if before and stream is not None and settings.work is not None:
        from secateur.engine.stream.layerwise import GradientPass

        GradientPass(stream.outer, before, settings.work, progress, settings.ranks).execute()
    if allocation.reach == 0:
        return tasks
    from secateur.engine.search.allocation import allocate
    from secateur.engine.search.survey import Survey

    return allocate(Survey(target, tasks, stream, settings, progress), allocation, sparsity)
