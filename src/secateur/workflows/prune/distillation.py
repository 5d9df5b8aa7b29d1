"""The optional last step of a run: the whole smaller model learns from the dense one.

Layer-wise methods only bring the hidden states near the dense model's. The next-token predictions
matter more. So this step trains all decoder layers together on the calibration windows, with one
window a step (`training/`), to match the next-token distributions of the dense model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from secateur.engine.prune.straight_through import RoundedWeight, RoundedWeights
from secateur.engine.prune.tasks import Tasks
from secateur.engine.stream.targets import Target
from secateur.engine.stream.walk import walk_layers
from secateur.models.architecture import Linear, hidden_size
from secateur.models.experts import open_experts
from secateur.models.skeleton import quiet_transformers
from secateur.models.whole import load_whole
from secateur.precision import fast_dtype
from secateur.progress import Progress
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.recovery import Distill
from secateur.runs.atomic import write_json
from secateur.runs.folder import RunFolder
from secateur.training.batches import Batches
from secateur.training.loop import Loop
from secateur.training.masks import Masks
from secateur.training.objectives import Distil
from secateur.training.teachers import ModelTeacher
from secateur.training.training_plan import RATE_TIMES_WIDTH, TrainingPlan
from secateur.types import Windows
from secateur.workflows.prune.prepare import Prepared

__all__ = ["FINAL", "distill_checkpoint", "distill_module", "distills", "learn", "once"]

FINAL, LEARNED = "final.safetensors", "learned.json"
"""The files of a distillation: the weights, then the losses."""

WARM_UP = 1 / 16
SAVE_MINUTES = 5.0


def distill_checkpoint(
    prepared: Prepared, tasks: Tasks, folder: RunFolder, progress: Progress
) -> dict[str, float] | None:
    """Load both models, distill, and write the layers. Return None without distillation.

    All trained weights are in a complete file before the first layer is overwritten. So a resumed
    run either trains the pruned model again or writes the trained weights. It never mixes the two.
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
        assert prepared.windows is not None
        target, windows = prepared.target, prepared.windows
        return distill_module(student, teacher, target, tasks, windows, recipe, progress, saved)

    losses = once(saved, learn_whole)
    write_layers(saved, prepared.target, tasks)
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
    pruned = [f"{name}.weight" for name, task in tasks.items() if task.sparsity > 0]
    grids = {name: task.method.solver.grid for name, task in tasks.items() if task.rounded}
    rounded = RoundedWeights(
        RoundedWeight(Linear(name, student.get_submodule(name)), grid)
        for name, grid in grids.items()
        if grid
    )
    trained = [
        name
        for index in pruned_layers(target, tasks)
        for name in parameter_names(target, index)
        if student.get_parameter(name).is_floating_point()
    ]
    masks = Masks({name: student.get_parameter(name).detach() != 0 for name in pruned})
    how, seed = recipe.distillation, recipe.calibration.seed
    with rounded.in_forwards():
        return learn(student, teacher, trained, masks, windows, how, seed, progress, saved, rounded)


def learn(
    student: Any,
    teacher: Any,
    trained: Sequence[str],
    masks: Masks | None,
    windows: Windows,
    how: Distill,
    seed: int,
    progress: Progress,
    saved: Path | None = None,
    rounded: RoundedWeights | None = None,
) -> dict[str, float]:
    """Train a smaller model, in place, to predict what the dense model predicts.

    Args:
        student: the pruned or cut causal language model, in eval mode.
        teacher: the dense model, on the same device. It gets no more gradients.
        trained: names of the student's trained parameters.
        masks: masks to hold; None for none.
        windows: calibration tokens [samples, sequence_length].
        how: epochs over the windows, the learning rate, and the share of the next-token loss.
        seed: seed of the order of the windows.
        progress: receives every step.
        saved: folder for the state of a resumed training; None saves nothing.
        rounded: the student's matrices that stay on their grids; None for none.

    Returns:
        The mean loss over the first and over the last eighth of the steps. It is the divergence
        alone if the next-token share is 0.

    Raises:
        NumericalError: the loss is NaN or infinite.
    """
    plan = TrainingPlan(
        steps=how.epochs * len(windows),
        learning_rate=how.peak_learning_rate or RATE_TIMES_WIDTH / hidden_size(student),
        warm_up=WARM_UP,
        optimizer="Adam",
        validations=0,
        save_minutes=SAVE_MINUTES,
        diverged=0.0,
    )
    with quiet_transformers():
        loop = Loop(
            student,
            Batches(windows, 1, seed),
            Distil.between(student, ModelTeacher(teacher), next_token=how.next_token),
            masks,
            plan,
            saved=saved,
            hooks=[rounded] if rounded and rounded.weights else [],
            progress=progress,
            trained=frozenset(trained),
            label="distilling",
        )
        losses = [line["loss"] for line in loop.run().log]
    eighth = -(-len(losses) // 8)
    return {
        "loss_before": sum(losses[:eighth]) / eighth,
        "loss_after": sum(losses[-eighth:]) / eighth,
    }


def distills(recipe: PruneRecipe, target: Target, tasks: Tasks) -> bool:
    """Whether the recipe distills, and pruned or rounded weights leave something to repair."""
    return recipe.distillation.epochs > 0 and bool(pruned_layers(target, tasks))


def pruned_layers(target: Target, tasks: Tasks) -> list[int]:
    """The decoder layers with pruned or rounded weights. The others stay unchanged."""
    names = [name for name, task in tasks.items() if task.changes]
    starts = [target.architecture.layer_name(i) + "." for i in range(len(target.layers))]
    return [i for i, start in enumerate(starts) if any(name.startswith(start) for name in names)]


def parameter_names(target: Target, index: int) -> list[str]:
    """The full names of the parameters of one decoder layer."""
    prefix = target.architecture.layer_name(index)
    return [f"{prefix}.{name}" for name, _ in target.layers[index].named_parameters()]


def write_layers(saved: Path, target: Target, tasks: Tasks) -> None:
    """Overwrite the layers of the checkpoint with the trained ones."""
    with safe_open(saved / FINAL, "pt") as learned:
        there = set(learned.keys())
        for index, _ in walk_layers(target, pruned_layers(target, tasks)):
            names = [name for name in parameter_names(target, index) if name in there]
            for name in names:
                target.model.get_parameter(name).data.copy_(learned.get_tensor(name))
            target.commit(index, names)
