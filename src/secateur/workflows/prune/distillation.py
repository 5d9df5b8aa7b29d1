"""The optional last step of a run: the whole smaller model learns from the dense one.

Layer-wise methods only bring the hidden states near the dense model's. The next-token predictions
matter more. So this step trains all decoder layers together on the calibration windows, with one
window a step (`training/`), to match the next-token distributions of the dense model. Where both
models do not fit into memory, it trains them layer by layer (`streamed_distillation.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateur.engine.prune.tasks import Tasks
from secateur.engine.stream.targets import Target
from secateur.models.architecture import hidden_size
from secateur.models.experts import open_experts
from secateur.models.opening import load_whole
from secateur.precision import fast_dtype
from secateur.progress import Progress
from secateur.recipes.prune import PruneRecipe
from secateur.runs.folder import RunFolder
from secateur.training.objectives import Distil
from secateur.training.teachers import ModelTeacher
from secateur.workflows.prune.learning import (
    FINAL,
    Lessons,
    Pupil,
    once,
    pruned_layers,
    write_layers,
)
from secateur.workflows.prune.prepare import Prepared
from secateur.workflows.prune.streamed_distillation import StreamedDistillation


def distill_checkpoint(
    prepared: Prepared,
    tasks: Tasks,
    folder: RunFolder,
    sweep_windows: int,
    progress: Progress,
) -> dict[str, float] | None:
    """Distill, and write the layers. Return None without distillation.

    The whole way loads both models. All trained weights are in a complete file before the first
    layer is overwritten. So a resumed run either trains the pruned model again or writes the
    trained weights. It never mixes the two.

    Args:
        prepared: the run.
        tasks: the task of each linear.
        folder: the folder of the run, with the pruned model.
        sweep_windows: number of windows in a sweep, with one layer in memory; 0 for both whole
            models in memory.
        progress: receives every step.
    """
    recipe, dense = prepared.recipe, prepared.target
    if not distills(recipe, dense, tasks):
        return None
    saved, trust = folder.work / "distillation", recipe.trust_remote_code
    lessons = Lessons(prepared.all_windows, recipe.distillation, recipe.calibration.seed)

    def learn_whole() -> dict[str, float]:
        device = dense.device
        teacher = load_whole(
            prepared.source.folder, device, dtype=fast_dtype(device), trust_remote_code=trust
        )
        student = load_whole(folder.model, device, trust_remote_code=trust)
        open_experts(student)  # its parameters get the names in the skeleton
        return distill_module(student, teacher, dense, tasks, lessons, progress, saved)

    layers = pruned_layers(dense, tasks)
    if sweep_windows:
        return StreamedDistillation(
            dense,
            folder.model,
            layers,
            lambda module, number: Pupil.of(module, dense, tasks, [number]),
            lessons,
            sweep_windows,
            saved,
            progress,
            trust_remote_code=trust,
        ).learn_into(dense)
    losses = once(saved, learn_whole)
    write_layers(saved / FINAL, dense, layers)
    return losses


def distill_module(
    student: Any,
    teacher: Any,
    target: Target,
    tasks: Tasks,
    lessons: Lessons,
    progress: Progress,
    saved: Path | None = None,
) -> dict[str, float]:
    """Train a pruned model on the dense one. Return its loss before and after."""
    pupil = Pupil.of(student, target, tasks, pruned_layers(target, tasks))
    return taught(pupil, teacher, lessons, progress, saved)


def learn(
    student: Any,
    teacher: Any,
    trained: Sequence[str],
    lessons: Lessons,
    progress: Progress,
    saved: Path | None = None,
) -> dict[str, float]:
    """Train a smaller model without masks, in place, to predict what the dense model predicts.

    Args:
        student: the cut causal language model, in eval mode.
        teacher: the dense model, on the same device. It gets no more gradients.
        trained: names of the student's trained parameters.
        lessons: the windows, and how to learn.
        progress: receives every step.
        saved: folder for the state of a resumed training; None saves nothing.

    Returns:
        The mean loss over the first and over the last eighth of the steps, and the highest learning
        rate. The loss is the divergence alone if the next-token share is 0.

    Raises:
        NumericalError: the loss is NaN or infinite.
    """
    pupil = Pupil(student, frozenset(trained), hidden_size(student))
    return taught(pupil, teacher, lessons, progress, saved)


def taught(
    pupil: Pupil, teacher: Any, lessons: Lessons, progress: Progress, saved: Path | None
) -> dict[str, float]:
    """Train a whole model on the dense one. Return its loss before and after."""
    share = lessons.how.next_token
    objective = Distil.between(pupil.model, ModelTeacher(teacher), next_token=share)
    return pupil.learn(objective, lessons, progress, saved)


def distills(recipe: PruneRecipe, target: Target, tasks: Tasks) -> bool:
    """Whether the recipe distills, and pruned or rounded weights leave something to repair."""
    return recipe.distillation.epochs > 0 and bool(pruned_layers(target, tasks))
