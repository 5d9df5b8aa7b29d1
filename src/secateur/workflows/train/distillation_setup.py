"""Makes the plan, the loss and the teacher from the recipe of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.errors import RecipeError
from secateur.models.architecture import describe
from secateur.models.skeleton import quiet_transformers
from secateur.models.sources import LocalCheckpoint, resolve
from secateur.models.tokenizer import load_tokenizer
from secateur.precision import fast_dtype
from secateur.progress import Progress
from secateur.recipes.train import TrainRecipe
from secateur.runs.folder import NOTES
from secateur.runs.records import Manifest, StepEntry, read_list, read_record
from secateur.training.objectives import Distil, NextToken, Objective
from secateur.training.process_group import ProcessGroup, load
from secateur.training.teachers import (
    TOP_K,
    ModelTeacher,
    WrittenTeacher,
    windows_digest,
    write_teacher,
)
from secateur.training.training_plan import TrainingPlan
from secateur.workflows.train.adapters import rates_of
from secateur.workflows.train.text import TrainingText


def plan_of(recipe: TrainRecipe, text: TrainingText, model: Any) -> TrainingPlan:
    """Return length, learning rate and optimizer of a training.

    Args:
        recipe: recipe of the training.
        text: the training text.
        model: the model or its skeleton.

    Raises:
        RecipeError: the recipe has both steps and minutes, or a number is out of range.
    """
    steps = recipe.steps or 0
    if not recipe.steps and not recipe.minutes:
        steps = max(1, round(recipe.epochs * len(text.windows) / recipe.batch))
    return TrainingPlan(
        steps=steps,
        minutes=recipe.minutes or 0.0,
        learning_rate=recipe.learning_rate,
        warm_up=recipe.warm_up,
        clip=recipe.clip,
        optimizer=recipe.optimizer,
        optimizer_options=recipe.optimizer_options,
        rates=rates_of(recipe, model),
        micro_batch=recipe.micro_batch_windows,
        gradient_checkpointing=recipe.gradient_checkpointing,
        fast_matmuls=recipe.fast_matmuls,
        validations=recipe.validations,
        patience=recipe.patience,
        save_minutes=recipe.save_minutes,
    )


def objective_of(
    recipe: TrainRecipe,
    source: LocalCheckpoint,
    place: LocalCheckpoint | None,
    model: Any,
    text: TrainingText,
    work: Path,
    progress: Progress,
    processes: ProcessGroup,
) -> Objective:
    """Return the loss. With a teacher this loads the teacher, or the file of its predictions.

    Args:
        recipe: recipe of the training.
        source: the student's checkpoint.
        place: the teacher's checkpoint; None without a teacher, or if a file has its predictions.
        model: the student.
        text: the training text.
        work: folder for the file of the teacher's predictions.
        progress: receives every window of that file.
        processes: the processes.

    Raises:
        RecipeError: the teacher has another vocabulary, or its file belongs to another text.
    """
    if recipe.teacher is None:
        return NextToken.of(model)
    options: dict[str, Any] = {"kind": recipe.kind, "temperature": recipe.temperature}
    options |= {"next_token": recipe.next_token}
    file = written_down(recipe, work)
    if place is None:
        return Distil.between(model, written(file, text), **options)
    teacher = load(
        place.folder,
        processes,
        dtype=fast_dtype(processes.device),
        apart=False,  # the loss applies its head after its forward
        trust_remote_code=recipe.trust_remote_code,
    )
    objective = Distil.between(
        model,
        ModelTeacher(teacher),
        teacher_depth=len(describe(teacher).layers(teacher)),
        teacher_layers=teacher_layers(recipe, source, place.name),
        hidden=recipe.hidden_weight,
        **options,
    )
    if not recipe.top_k and not recipe.teacher_file:
        return objective
    progress.start("teacher", len(text.windows))
    with quiet_transformers():
        write_teacher(
            ModelTeacher(teacher),
            text.windows,
            file,
            k=recipe.top_k or TOP_K,
            device=processes.device,
            temperature=recipe.temperature,
            name=place.name,
            on_window=progress.step,
            writes=processes.main,
        )
    progress.finish()
    processes.wait()
    return Distil.between(model, written(file, text), hidden=recipe.hidden_weight, **options)


def teacher_of(recipe: TrainRecipe, work: Path | None) -> LocalCheckpoint | None:
    """Return the checkpoint of the teacher; None without a teacher, or if its file exists.

    Args:
        recipe: recipe of the training.
        work: folder of a run, which may have that file; None if there is no run.

    Raises:
        RecipeError: the teacher is unknown.
    """
    if recipe.teacher is None:
        return None
    stored = recipe.teacher_file or (work is not None and recipe.top_k)
    if stored and written_down(recipe, work or Path()).exists():
        return None
    return resolve(recipe.teacher, trust_remote_code=recipe.trust_remote_code)


def written_down(recipe: TrainRecipe, work: Path) -> Path:
    """The file of a teacher's predictions."""
    return Path(recipe.teacher_file) if recipe.teacher_file else work / "teacher.safetensors"


def written(file: Path, text: TrainingText) -> WrittenTeacher:
    """Return the teacher's stored predictions for this text.

    Raises:
        RecipeError: the file belongs to another text.
    """
    teacher = WrittenTeacher(file)
    if teacher.record["windows"] != windows_digest(text.windows):
        raise RecipeError(
            "the teacher was written down for other windows",
            where=str(file),
            remedy="take the same text, windows, sequence length and seed, or another file",
        )
    return teacher


def teacher_layers(
    recipe: TrainRecipe, source: LocalCheckpoint, teacher: str
) -> tuple[int, ...] | None:
    """Return the teacher's layers that the student has, from the recipe or the notes of its cut.

    None if they are unknown, or if the teacher is not the model that was cut.
    """
    steps, manifest = (source.folder / NOTES / name for name in ("steps.json", "manifest.json"))
    if recipe.teacher_layers is not None or not recipe.hidden_weight or not steps.is_file():
        return recipe.teacher_layers
    if not manifest.is_file() or teacher != read_record(Manifest, manifest).source.name:
        return None
    depth = [x.cut for x in read_list(StepEntry, steps) if x.step == "depth" and x.cut]
    return tuple(depth[0]["layers"]) if depth else None


def check_tokenizers(student: LocalCheckpoint, teacher: LocalCheckpoint, trust: bool) -> None:
    """Refuse a teacher whose token ids mean other words.

    Raises:
        RecipeError: the vocabularies differ.
    """
    own, other = (
        load_tokenizer(x.folder, trust_remote_code=trust).get_vocab() for x in (student, teacher)
    )
    if own != other:
        differing = sum(own.get(token) != number for token, number in other.items())
        raise RecipeError(
            f"student and teacher have different vocabularies: {len(own)} and {len(other)} "
            f"tokens, {differing} of the teacher's have another number or none",
            where=teacher.name,
            remedy="a teacher needs the tokenizer of the student: name the model that it was "
            "made from",
        )
