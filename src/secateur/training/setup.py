"""Opens a training: model, texts, plan, teacher and loss, and checks everything of its recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.engine.plan import Plan
from secateur.engine.prune.tasks import refuse_idle_globs
from secateur.engine.stream.targets import CheckpointTarget
from secateur.errors import RecipeError
from secateur.models.architecture import describe
from secateur.models.checkpoint import CheckpointReader
from secateur.models.skeleton import quiet_transformers
from secateur.models.sources import LocalCheckpoint, resolve
from secateur.models.tokenizer import refuse_other_words
from secateur.precision import fast_dtype
from secateur.progress import Progress
from secateur.recipes.train import TrainRecipe
from secateur.runs.folder import NOTES
from secateur.runs.records import Manifest, StepEntry, read_list, read_record
from secateur.training.batches import TrainingText, read_training_text
from secateur.training.lora import ADAPTERS_ALONE
from secateur.training.memory import check_memory, plan_needs
from secateur.training.objectives import (
    Distil,
    ModelTeacher,
    NextToken,
    Objective,
    Teacher,
    WrittenTeacher,
    write_teacher,
)
from secateur.training.process_group import ProcessGroup, load
from secateur.training.training_plan import TrainingPlan


@dataclass(frozen=True)
class TrainingSetup:
    """A training of which everything is known that needs no weights.

    Attributes:
        recipe: the recipe.
        source: the checkpoint of the model.
        target: the model, with its layers on the meta device.
        text: training windows and validation windows.
        processes: the processes.
        plan: length, learning rate and optimizer.
        teacher: the checkpoint of the teacher; None without one.
        needs: memory, and what it writes at most.
    """

    recipe: TrainRecipe
    source: LocalCheckpoint
    target: CheckpointTarget
    text: TrainingText
    processes: ProcessGroup
    plan: TrainingPlan
    teacher: LocalCheckpoint | None
    needs: Plan

    @classmethod
    def read(
        cls,
        recipe: TrainRecipe,
        source: LocalCheckpoint,
        processes: ProcessGroup,
        progress: Progress,
    ) -> TrainingSetup:
        """Open the model, read the texts, and check everything that needs no weights.

        Raises:
            RecipeError: options contradict each other, or the teacher means other words.
            MemoryBudgetError: the training would not fit.
        """
        trust, ways = recipe.trust_remote_code, ("gradual", "iterative", "lora")
        given = [name for name in ways if getattr(recipe, name) is not None]
        if given and processes.count > 1:
            raise RecipeError(
                f"{given[0]} needs a single process",
                remedy="start the command without torchrun or accelerate launch",
            )
        reader = CheckpointReader(source.folder)
        target = CheckpointTarget(reader, None, processes.device, trust_remote_code=trust)
        progress.start("reading training text", 1)
        text = read_training_text(recipe, source.folder, target.model.config)
        progress.finish()
        plan, teacher = _plan_of(recipe, target.model, len(text.windows)), None
        if recipe.teacher is not None:
            teacher = resolve(recipe.teacher, trust_remote_code=trust)
            refuse_other_words(source.folder, teacher.folder, trust_remote_code=trust)
        needs = plan_needs(recipe, target, teacher, text, plan, processes)
        check_memory(needs, recipe.memory.max_bytes, processes.device)
        return cls(recipe, source, target, text, processes, plan, teacher, needs)

    def objective(self, model: Any, work: Path, progress: Progress) -> Objective:
        """Return the loss. With a teacher this loads the teacher, or the file of its predictions.

        Args:
            model: the student.
            work: folder for the file of the teacher's predictions.
            progress: receives every window of that file.

        Raises:
            RecipeError: the teacher has another vocabulary.
        """
        recipe, processes, windows = self.recipe, self.processes, self.text.windows
        if self.teacher is None:
            return NextToken.of(model)
        file, depth = work / "teacher.safetensors", 0
        if not (recipe.top_k and file.exists()):
            loaded = load(
                self.teacher.folder,
                processes,
                dtype=fast_dtype(processes.device),
                apart=False,  # the loss applies its head after its forward
                trust_remote_code=recipe.trust_remote_code,
            )
            teacher: Teacher = ModelTeacher(loaded)
            depth = len(describe(loaded).layers(loaded))
        if recipe.top_k and not file.exists():
            progress.start("teacher", len(windows))
            with quiet_transformers():
                write_teacher(
                    teacher,
                    windows,
                    file,
                    k=recipe.top_k,
                    device=processes.device,
                    temperature=recipe.temperature,
                    on_window=progress.step,
                    writes=processes.first,
                )
            progress.finish()
            processes.wait()
        if recipe.top_k:
            teacher = WrittenTeacher(file)
        return Distil.between(
            model,
            teacher,
            teacher_depth=depth,
            teacher_layers=self._teacher_layers(self.teacher.name),
            hidden=recipe.hidden_weight,
            kind=recipe.kind,
            temperature=recipe.temperature,
            next_token=recipe.next_token,
        )

    def _teacher_layers(self, teacher: str) -> tuple[int, ...] | None:
        """Return the teacher's layers that the student has, from the notes of its cut.

        None if they are unknown, or if the teacher is not the model that was cut.
        """
        steps, manifest = (
            self.source.folder / NOTES / name for name in ("steps.json", "manifest.json")
        )
        if not self.recipe.hidden_weight or not steps.is_file() or not manifest.is_file():
            return None
        if teacher != read_record(Manifest, manifest).source.name:
            return None
        depth = [x.cut for x in read_list(StepEntry, steps) if x.step == "depth" and x.cut]
        return tuple(depth[0]["layers"]) if depth else None


def _plan_of(recipe: TrainRecipe, model: Any, windows: int) -> TrainingPlan:
    """Return length, learning rate and optimizer of a training.

    Raises:
        RecipeError: a glob matches no parameter, or there are rates beside adapters.
    """
    refuse_idle_globs(recipe.rates, [name for name, _ in model.named_parameters()], "parameter")
    if recipe.lora is not None and recipe.rates:
        raise RecipeError(
            "with adapters nothing else is trained, so --rates changes nothing",
            remedy="leave it out; --lora-targets and --lora-exclude choose the linear layers",
        )
    steps = recipe.steps or 0
    if not recipe.steps and not recipe.minutes:
        steps = max(1, round(recipe.epochs * windows / recipe.batch))
    same = TrainingPlan.model_fields.keys() & TrainRecipe.model_fields.keys()
    options = {name: getattr(recipe, name) for name in same} | {
        "rates": recipe.rates if recipe.lora is None else ADAPTERS_ALONE,
        "steps": steps,
        "minutes": recipe.minutes or 0.0,
        "micro_batch": recipe.micro_batch_windows,
    }
    return TrainingPlan(**options)
