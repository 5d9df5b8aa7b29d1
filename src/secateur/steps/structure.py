"""`secateur structure`: the result has fewer layers, heads, neurons, channels or experts.

plan in units ─► steps, each a smaller model ─► distillation from the uncut model ─► verified

The distillation is optional: the smaller model learns from the uncut one.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur.calibration.run_windows import WINDOWS, RunWindows, WindowReader
from secateur.engine.plan_memory import choose_sweeps, store_choice, stored_choice
from secateur.engine.prune.refit import can_refit
from secateur.errors import RecipeError, first_line
from secateur.evaluation.divergence import among_kept
from secateur.models.architecture import describe, only_embeds
from secateur.models.checkpoint import CheckpointReader, shard_files
from secateur.models.opening import (
    copy_of,
    formats_of,
    open_weights,
)
from secateur.models.skeleton import build_skeleton
from secateur.models.sources import LocalCheckpoint
from secateur.models.targets import CheckpointTarget
from secateur.parallel.ranks import Ranks
from secateur.progress import Progress, Silent
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.recipe_files import dump_recipe
from secateur.recipes.shared import texts_of
from secateur.recipes.structure import CUTS, StructureRecipe
from secateur.reporting.cards import structure_card
from secateur.reporting.gguf_files import CutFileResult
from secateur.reporting.models import StructureResult
from secateur.reporting.plan import CutPlanResult
from secateur.runs import records
from secateur.runs.environment import choose_device, environment
from secateur.runs.folder import NOTES, check_output, content_of
from secateur.runs.output import write_json, write_text
from secateur.sparsity.allocation import allocations
from secateur.sparsity.scores import scores
from secateur.sparsity.solvers import solvers
from secateur.steps.runner import (
    RunContext,
    Step,
    Way,
    carry_out,
    identity_of,
    judge_of,
    source_of,
    step_of,
)
from secateur.structured import cut_plan, cut_steps
from secateur.structured.design import verified
from secateur.structured.embedders import copy_modules
from secateur.structured.surgery import VARIED

if TYPE_CHECKING:
    from secateur.engine.prepared import Prepared

log = logging.getLogger(__name__)

STEPS, MANIFEST = "steps.json", "manifest.json"

OF_FILES = ("layers_list", "imatrix")
"""Options of a cut that copies the bytes of a GGUF file."""


def edits_file(recipe: StructureRecipe) -> bool:
    """Whether source and output are GGUF files, so that bytes are copied."""
    names = Path(recipe.model).expanduser(), Path(recipe.output or "")
    return all(name.suffix == ".gguf" and not name.is_dir() for name in names)


def plan_structure(
    recipe: StructureRecipe, progress: Progress, call: Mapping[str, Any]
) -> CutPlanResult | CutFileResult:
    """Check a recipe, and show what the cut would leave and need.

    Args:
        recipe: recipe of the cut.
        progress: receives the download of the model.
        call: the other options of the call.

    Raises:
        SecateurError: as the cut would.
    """
    if edits_file(recipe):
        from secateur.steps.cut_file import plan_file

        return plan_file(recipe, call)
    CutStructure.check(recipe)
    judge_of(recipe)
    source = source_of(recipe, progress)
    skeleton, plan = _open(recipe, source)
    steps = [*_steps_of(recipe, plan, skeleton)]
    trimmed = cut_plan.trims_vocabulary(recipe)
    first = ["vocabulary"] * trimmed + ["experts or neurons"] * _weighs(recipe, plan)
    steps = first + steps + ["distillation"] * bool(recipe.distillation.epochs)
    found = cut_plan.counted_cut(recipe, plan, skeleton)
    unknown = _unknown_sizes(recipe, plan)
    memory = None
    if plan.narrows:
        from secateur.structured.choices import plan_width_run

        memory = plan_width_run(recipe, plan, source.folder)
    read = [recipe.model, str(source.folder), *texts_of(recipe.calibration.source)]
    disk = _disk_bytes(recipe, plan, skeleton, source.folder)
    check_output(recipe.output, "structure", disk, read, call)
    after = None if unknown else found.after
    return CutPlanResult(
        steps=tuple(steps), before=found.before, after=after, unknown=unknown, plan=memory
    )


def _unknown_sizes(recipe: StructureRecipe, plan: cut_plan.CutPlan) -> tuple[str, ...]:
    """The options for which the size of the cut model is not known before it is made."""
    timed = recipe.decode_latency is not None
    return ("--vocabulary",) * cut_plan.trims_vocabulary(recipe) + ("--decode-latency",) * timed


def _disk_bytes(
    recipe: StructureRecipe, plan: cut_plan.CutPlan, skeleton: Any, folder: Path
) -> int:
    """What the run writes: every step a model no smaller than the result, and the result."""
    found = cut_plan.counted_cut(recipe, plan, skeleton)
    if _unknown_sizes(recipe, plan):
        return found.before.file_bytes
    # layers for further tokens, which the model does not count
    more = max(0, CheckpointReader(folder).total_bytes - found.before.file_bytes)
    made = 1 + len(_steps_of(recipe, plan, skeleton)) + 2 * _weighs(recipe, plan)
    return (found.after.file_bytes + more) * made


def _open(recipe: StructureRecipe, source: LocalCheckpoint) -> tuple[Any, cut_plan.CutPlan]:
    """Open the model and check the recipe: the skeleton, and the plan in units."""
    open_weights(source.folder)  # refuses what is not read
    skeleton = build_skeleton(source.folder)
    plan = cut_plan.plan_cut(recipe, skeleton)
    cut_plan.check_width(recipe, plan, skeleton)
    if cut_plan.trims_vocabulary(recipe):
        from secateur.structured.vocabulary import check_vocabulary

        check_vocabulary(recipe, source, skeleton)
    return skeleton, plan


class CutStructure(Step[StructureRecipe, StructureResult | CutFileResult]):
    """Cut structure out of a checkpoint, and write a new, smaller one."""

    verb = "structure"

    def __init__(self, recipe: StructureRecipe, run: RunContext) -> None:
        super().__init__(recipe, run)
        self.skeleton, self.plan = _open(recipe, run.source)
        self.device, work = choose_device(recipe.device), run.folder.work
        run.folder.worth_resuming = lambda: bool(list(work.glob(f"*/{cut_steps.STEP}")))

    @classmethod
    def way(cls, recipe: StructureRecipe) -> Way[StructureRecipe, StructureResult | CutFileResult]:
        """Another step cuts a GGUF file itself."""
        if edits_file(recipe):
            from secateur.steps.cut_file import CutFile

            return CutFile.way(recipe)
        return Way(cls)

    @classmethod
    def alone(cls, recipe: StructureRecipe) -> str:
        """Several processes share only the survey of experts."""
        if edits_file(recipe):
            return "--output FILE.gguf"
        given: dict[str, Any] = {n: getattr(recipe, n) for n in CUTS if n != "experts"}
        given["distill_epochs"] = recipe.distillation.epochs
        given["generated_windows"] = recipe.calibration.generated_windows
        return next((f"--{n.replace('_', '-')}" for n, value in given.items() if value), "")

    @classmethod
    def check(cls, recipe: StructureRecipe) -> None:
        """Check the parts that choose units, and the device."""
        for option in OF_FILES:
            if getattr(recipe, option):
                raise RecipeError(
                    f"--{option.replace('_', '-')} cuts a GGUF file itself",
                    remedy="name a GGUF file as MODEL and one as --output, or leave it out",
                )
        for registry, name in (
            (scores, recipe.score),
            (solvers, recipe.solver),
            (allocations, recipe.allocation),
        ):
            if name is not None:
                registry[name]
        choose_device(recipe.device)

    @classmethod
    def reads(cls, recipe: StructureRecipe) -> Iterable[str]:
        """The calibration text, and a list of experts."""
        named = [recipe.calibration.source, *filter(None, [recipe.vocabulary])]
        listed = filter(None, [recipe.experts_list])
        return [*(text for each in named for text in texts_of(each)), *listed]

    @property
    def disk_bytes(self) -> int:
        """The models of all steps, and the result."""
        return _disk_bytes(self.recipe, self.plan, self.skeleton, self.run.source.folder)

    def identity(self) -> dict[str, Any]:
        """Everything that affects the result."""
        found = identity_of(self.recipe, (), shard_files(self.run.source.folder), self.run.progress)
        listed = self.recipe.experts_list
        return found if listed is None else {**found, "experts_list": content_of(listed)}

    def work(self) -> StructureResult | CutFileResult:
        """Run all steps that no earlier run finished, and write the result."""
        recipe, folder, progress = self.recipe, self.run.folder, self.run.progress
        base, steps = self.run.source, []
        if cut_plan.trims_vocabulary(recipe):
            from secateur.structured.vocabulary import trimmed_source

            compare = partial(among_kept, device=self.device, progress=progress)
            base, notes = trimmed_source(recipe, base, folder.work, progress, compare)
            steps = [notes]
        trimmed = build_skeleton(base.folder)
        plan = cut_plan.plan_cut(recipe, trimmed) if steps else self.plan
        windows, latency = self._windows(base, trimmed.config, plan), None
        if recipe.decode_latency is not None:
            from secateur.structured.latency import find_latency

            latency = find_latency(recipe, plan, trimmed, self.device, folder.work, progress)
            plan = replace(plan, joint=latency["joint"])
        context = cut_steps.CutContext(
            recipe, plan, base.folder, windows.calibration, folder.work / WINDOWS, self.device,
            folder.work, progress, self._prune, self.run.ranks,
        )  # fmt: skip
        if _weighs(recipe, plan):
            from secateur.structured.choices import one_budget

            context = replace(context, plan=one_budget(context))
        made = base.folder
        for step in _steps_of(recipe, context.plan, trimmed).values():
            made, notes = step(context, made)
            steps.append(notes)
        stored = open_weights(made) if recipe.distillation.epochs else CheckpointReader(made)
        copy_of(stored, folder.model).create(progress)
        copy_modules(self.run.source.folder, folder.model)
        (folder.model / cut_steps.STEP).unlink(missing_ok=True)
        losses = self._distill(base, windows) if recipe.distillation.epochs else None
        if cut_plan.trims_vocabulary(recipe) and not only_embeds(self.skeleton):
            latency = latency or self._times()
        manifest = self._manifest(self._structure(steps, latency), losses, windows)
        write_json(folder.notes / STEPS, [records.StepEntry(**step).to_json() for step in steps])
        if windows.record:
            shutil.copyfile(folder.work / WINDOWS, folder.notes / WINDOWS)
        self._write_notes(manifest)
        self.run.ranks.once(lambda: None)
        return StructureResult(output=self.run.place, manifest=manifest)

    @classmethod
    def share(cls, recipe: StructureRecipe, ranks: Ranks) -> None:
        """Survey experts with the first process."""
        from secateur.structured.choices import share_survey

        share_survey(recipe, source_of(recipe, Silent(), ranks), ranks)

    @classmethod
    def result(cls, output: Path) -> StructureResult:
        """Read the result of a finished run from its notes."""
        manifest = records.read_record(records.Manifest, output / NOTES / MANIFEST)
        return StructureResult(output=output, manifest=manifest)

    def _prune(self, recipe: PruneRecipe, change: Callable[[Prepared], Prepared]) -> None:
        """Prune into a folder, or resume."""
        from secateur.engine.prepared import prepare

        kind: Any = step_of("prune")

        def opening(recipe: PruneRecipe, run: RunContext) -> Any:
            return kind(change(prepare(recipe, run.source, run.folder.model)), run)

        carry_out(kind, recipe, self.run.progress, resume=True, opening=opening)

    def _windows(self, base: LocalCheckpoint, config: Any, plan: cut_plan.CutPlan) -> RunWindows:
        """The windows of the run, or of a stopped one; none where nothing reads text."""
        recipe, work = self.recipe, self.run.folder.work
        by_weights = plan.sheds and recipe.experts_by == "aimer"
        others = replace(plan, keep_experts=None) if by_weights else plan
        if not (others.cuts or recipe.decode_latency or recipe.distillation.epochs):
            none = torch.empty((0, 0), dtype=torch.int64)
            return RunWindows(none, none, {})
        file, options = work / WINDOWS, recipe.calibration
        if file.exists():
            return RunWindows.load(file, config)
        reader = WindowReader.of_folder(base.folder, config)
        return RunWindows.cut(reader, options, recipe.distillation).complete(
            work, base.folder, self.device, options.seed, self.run.progress
        )

    def _distill(self, base: LocalCheckpoint, windows: RunWindows) -> dict[str, float] | None:
        """Distill the uncut model into the cut one, and overwrite its weights with the result."""
        from secateur.engine.prepared import teacher_of
        from secateur.training.distillation import DistillationData
        from secateur.training.distilled_checkpoint import distill_checkpoint

        recipe, folder = self.recipe, self.run.folder
        how, reader = recipe.distillation, open_weights(base.folder)
        progress = self.run.progress
        dense = CheckpointTarget(reader, None, self.device)
        dense = teacher_of(how, dense, progress) or dense
        size = stored_choice(folder.work)
        if size is None:  # planned with two models of the uncut size
            size = choose_sweeps(how, dense, windows.all, {}, recipe.memory.max_bytes)
            store_choice(folder.work, size)
        data = DistillationData(windows.all, how, recipe.calibration.seed)
        return distill_checkpoint(dense, folder.model, None, data, size, folder.work, progress)

    def _times(self) -> dict[str, Any] | None:
        """What a token takes before and after; None if the model cannot decode text alone."""
        from secateur.structured.latency import recorded, time_steps

        models = self.skeleton, build_skeleton(self.run.folder.model)
        try:
            timed = time_steps(models, self.device, self.run.progress)
        except Exception as error:  # a class of transformers may not read text alone
            log.warning("a token is not timed: %s", first_line(error))
            return None
        return recorded(timed, models[0].dtype, self.device)

    def _structure(
        self, steps: list[dict[str, Any]], latency: dict[str, Any] | None
    ) -> records.Structure:
        """The record of what was cut, counted in the written model."""
        found = verified(self.skeleton, self.run.source.folder, self.run.folder.model, steps[-1])
        if found.varied:
            log.warning(VARIED)
        return records.Structure(
            steps=tuple(_summary(step) for step in steps),
            before=found.before,
            after=found.after,
            decoder_removed=found.decoder_removed,
            removed=found.removed,
            varied=found.varied,
            latency=latency,
        )

    def _manifest(
        self, structure: records.Structure, losses: Mapping[str, float] | None, windows: RunWindows
    ) -> records.Manifest:
        """The record of a finished cut."""
        recipe, source, folder = self.recipe, self.run.source, self.run.folder
        return records.Manifest(
            manifest_version=records.MANIFEST_VERSION,
            source=source.record,
            method={
                "name": "structure",
                "score": recipe.score,
                "solver": recipe.solver,
                "pattern": ", ".join(step["step"] for step in structure.steps),
                "scope": "layer",
                "effort": recipe.effort,
                "asymmetric": recipe.asymmetric,
                "fast_matmuls": recipe.fast_matmuls,
                "distillation": recipe.distillation.model_dump(),
            },
            allocation={"name": recipe.allocation or "uniform"},
            structure=structure,
            distillation=losses,
            calibration=windows.record or None,
            environment=environment(self.device),
            cost=records.Cost.model_validate({**self.run.meter.read(), "resumed": folder.resumed}),
            result=records.RunResult(
                decoder_sparsity=0.0,
                model_sparsity=0.0,
                parameters=structure.after.parameters,
                file_bytes=structure.after.file_bytes,
            ),
            formats=formats_of(source.folder, folder.model),
        )

    def _write_notes(self, manifest: records.Manifest) -> None:
        """Write the recipe, the manifest and the card."""
        folder, again = self.run.folder, self.run.again(self.recipe)
        write_text(folder.notes / "recipe.yaml", dump_recipe(self.recipe))
        write_json(folder.notes / MANIFEST, manifest.to_json())
        place = self.recipe.output or folder.output
        card = structure_card(manifest, again, self.run.source.folder, place)
        write_text(folder.model / "README.md", card)


def _weighs(recipe: StructureRecipe, plan: cut_plan.CutPlan) -> bool:
    """Whether experts and neurons share one budget of size."""
    sized = recipe.keep_parameters is not None or recipe.max_size is not None
    free = recipe.experts is None and not plan.sheds
    return sized and free and any(plan.sizes.experts)


def _steps_of(
    recipe: StructureRecipe, plan: cut_plan.CutPlan, model: Any
) -> dict[str, cut_steps.CutStep]:
    """The steps that a plan needs, by name and in order. The model is the uncut skeleton."""
    from secateur.structured import choices

    channels = plan.keep_hidden is not None
    refits = recipe.asymmetric and (channels or plan.drop_layers > 0)
    refits = refits and can_refit(describe(model), channels=channels)
    # aimer reads no text, so there is nothing to learn from
    tunes = recipe.asymmetric and plan.sheds and recipe.experts_by != "aimer"
    cut, fit = cut_steps.cut_step, cut_steps.fit_step
    steps: dict[str, tuple[Any, Callable[..., Any]]] = {
        "depth": (plan.drop_layers, partial(cut, choose=choices.choose_layers)),
        "experts": (plan.sheds, partial(cut, choose=choices.choose_experts)),
        cut_steps.ROUTERS: (tunes, fit),
        "hidden": (channels, partial(cut, choose=choices.choose_hidden)),
        cut_steps.REFIT: (refits, fit),
        "queries": (plan.keep_queries is not None, partial(cut, choose=choices.choose_queries)),
        "width": (plan.narrows, partial(cut, choose=choices.choose_width)),
    }
    return {name: partial(how, name=name) for name, (wanted, how) in steps.items() if wanted}


def _summary(step: Mapping[str, Any]) -> dict[str, Any]:
    """The notes of a step without its lists of indices, which `steps.json` keeps."""
    of_tokens = ("tokens_before", "tokens_after", "covered", "texts", "among_kept", "similarity")
    tokens = {key: step[key] for key in of_tokens if key in step}
    return {
        "step": step["step"],
        "by": step.get("by", step.get("solver")),
        "decoder_before": step["before"]["decoder"],
        "decoder_after": step["after"]["decoder"],
        **tokens,
    }
