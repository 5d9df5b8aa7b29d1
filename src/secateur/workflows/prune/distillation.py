"""The optional last step of a run: the whole smaller model learns from the dense one.

Layer-wise methods only bring the hidden states near the dense model's. The next-token predictions
matter more. So this step trains all decoder layers together on the calibration windows, with one
window a step (`training/`), to match the next-token distributions of the dense model. Where both
models do not fit into memory, it trains them layer by layer (`streamed_distillation.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from secateur.engine.prune.tasks import Tasks
from secateur.engine.stream.targets import Target
from secateur.models.architecture import hidden_size
from secateur.models.experts import open_experts
from secateur.models.whole import load_whole
from secateur.precision import fast_dtype
from secateur.progress import Progress
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.recovery import Distill
from secateur.runs.atomic import write_json
from secateur.runs.folder import RunFolder
from secateur.training.objectives import Distil
from secateur.training.teachers import ModelTeacher
from secateur.types import Windows
from secateur.workflows.prune.learning import FINAL, Pupil, pruned_layers, write_layers
from secateur.workflows.prune.prepare import Prepared
from secateur.workflows.prune.streamed_distillation import StreamedDistillation

__all__ = ["distill_checkpoint", "distill_module", "distills", "learn", "once"]

LEARNED = "learned.json"
"""The file with the losses of a finished distillation."""


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
    recipe, device = prepared.recipe, prepared.target.device
    if not distills(recipe, prepared.target, tasks):
        return None
    saved, trust = folder.work / "distillation", recipe.trust_remote_code

    def learn_whole() -> dict[str, float]:
        teacher = load_whole(
            prepared.source.folder, device, dtype=fast_dtype(device), trust_remote_code=trust
        )
        student = load_whole(folder.model, device, trust_remote_code=trust)
        open_experts(student)  # its parameters get the names in the skeleton
        target, windows = prepared.target, prepared.lessons
        return distill_module(student, teacher, target, tasks, windows, recipe, progress, saved)

    if sweep_windows:
        return learn_streamed(prepared, tasks, folder.model, saved, sweep_windows, progress)
    losses = once(saved, learn_whole)
    target = prepared.target
    write_layers(saved / FINAL, target, pruned_layers(target, tasks))
    return losses


def learn_streamed(
    prepared: Prepared, tasks: Tasks, pruned: Path, saved: Path, size: int, progress: Progress
) -> dict[str, float]:
    """Distill in sweeps, and write the layers into the pruned model."""
    dense, recipe = prepared.target, prepared.recipe
    streamed = StreamedDistillation(
        dense,
        pruned,
        pruned_layers(dense, tasks),
        lambda module, number: Pupil.of(module, dense, tasks, [number]),
        prepared.lessons,
        recipe.distillation,
        recipe.calibration.seed,
        size,
        saved,
        progress,
        trust_remote_code=recipe.trust_remote_code,
    )
    losses = once(saved, streamed.learn)
    streamed.write(dense)
    return losses


def once(saved: Path, learn: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Distill into a folder and return the losses, or return the losses of an earlier run."""
    told = saved / LEARNED
    if not told.exists():
        write_json(told, learn())
    losses: dict[str, float] = json.loads(told.read_text(encoding="utf-8"))
    return losses


def distill_module(
    student: Any,
    teacher: Any,
    target: Target,
    tasks: Tasks,
    windows: Windows,
    recipe: PruneRecipe,
    progress: Progress,
    saved: Path | None = None,
) -> dict[str, float]:
    """Train a pruned model on the dense one. Return its loss before and after."""
    pupil = Pupil.of(student, target, tasks, pruned_layers(target, tasks))
    how, seed = recipe.distillation, recipe.calibration.seed
    return taught(pupil, teacher, windows, how, seed, progress, saved)


def learn(
    student: Any,
    teacher: Any,
    trained: Sequence[str],
    windows: Windows,
    how: Distill,
    seed: int,
    progress: Progress,
    saved: Path | None = None,
) -> dict[str, float]:
    """Train a smaller model without masks, in place, to predict what the dense model predicts.

    Args:
        student: the cut causal language model, in eval mode.
        teacher: the dense model, on the same device. It gets no more gradients.
        trained: names of the student's trained parameters.
        windows: calibration tokens [samples, sequence_length].
        how: epochs over the windows, the learning rate, and the share of the next-token loss.
        seed: seed of the order of the windows.
        progress: receives every step.
        saved: folder for the state of a resumed training; None saves nothing.

    Returns:
        The mean loss over the first and over the last eighth of the steps, and the highest learning
        rate. The loss is the divergence alone if the next-token share is 0.

    Raises:
        NumericalError: the loss is NaN or infinite.
    """
    pupil = Pupil(student, frozenset(trained), hidden_size(student))
    return taught(pupil, teacher, windows, how, seed, progress, saved)


def taught(
    pupil: Pupil,
    teacher: Any,
    windows: Windows,
    how: Distill,
    seed: int,
    progress: Progress,
    saved: Path | None,
) -> dict[str, float]:
    """Train a whole model on the dense one. Return its loss before and after."""
    objective = Distil.between(pupil.model, ModelTeacher(teacher), next_token=how.next_token)
    return pupil.learn(objective, windows, how, seed, progress, saved)


def distills(recipe: PruneRecipe, target: Target, tasks: Tasks) -> bool:
    """Whether the recipe distills, and pruned or rounded weights leave something to repair."""
    return recipe.distillation.epochs > 0 and bool(pruned_layers(target, tasks))
