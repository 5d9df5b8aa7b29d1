"""The last step of a run that asks for it: the whole smaller model learns from the dense one.

Layer by layer a pruned or cut model can only be near the dense one's hidden states; what counts is
what it says. So its decoder layers are trained once more, together, on the calibration windows:
`training/` with one window a step, until its next-token distributions are those of the dense model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from secateur.engine.prune.tasks import Tasks
from secateur.engine.stream.targets import Target
from secateur.engine.stream.walk import walk_layers
from secateur.models.architecture import hidden_size
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
"""What a distillation leaves in its folder: the weights, then the losses."""

WARM_UP = 1 / 16
SAVE_MINUTES = 5.0


def distill_checkpoint(
    prepared: Prepared, tasks: Tasks, folder: RunFolder, progress: Progress
) -> dict[str, float] | None:
    """Load the dense and the pruned model, distill, and write the layers; None if not asked for.

    What was learned is whole in a file before the first layer is written over. So a killed run
    learns from the pruned model, or writes what was learned, and never mixes the two.
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
        open_experts(student)  # its parameters go by the names of the skeleton's
        assert prepared.windows is not None
        target, windows = prepared.target, prepared.windows
        return distill_module(student, teacher, target, tasks, windows, recipe, progress, saved)

    losses = once(saved, learn_whole)
    write_layers(saved, prepared.target, tasks)
    return losses


def once(saved: Path, learn: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The losses of a distillation that writes into a folder; an earlier run may have ended it."""
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
    """Let a pruned model learn from the dense one; its loss before and after."""
    pruned = [f"{name}.weight" for name, task in tasks.items() if task.sparsity > 0]
    trained = [
        name
        for index in pruned_layers(target, tasks)
        for name in parameter_names(target, index)
        if student.get_parameter(name).is_floating_point()
    ]
    masks = Masks({name: student.get_parameter(name).detach() != 0 for name in pruned})
    how, seed = recipe.distillation, recipe.calibration.seed
    return learn(student, teacher, trained, masks, windows, how, seed, progress, saved)


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
) -> dict[str, float]:
    """Train a smaller model, in place, to say what the dense one says.

    Args:
        student: the pruned or cut causal language model, in eval mode.
        teacher: the dense one, on the same device; it gets no gradients any more.
        trained: the names of the student's parameters that learn.
        masks: that are held; None for none.
        windows: calibration tokens [samples, sequence_length].
        how: epochs over them, the learning rate, and the share of the next token.
        seed: of the order of the windows.
        progress: told of every step.
        saved: folder for all that is needed to go on; None for none.

    Returns:
        The mean loss over the first and the last eighth of the steps: of the divergence alone, if
        the next token does not count.

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
    """Whether the recipe distills, and something is pruned that distillation can repair."""
    return recipe.distillation.epochs > 0 and bool(pruned_layers(target, tasks))


def pruned_layers(target: Target, tasks: Tasks) -> list[int]:
    """The decoder layers of which something is pruned; the others stay as they are."""
    names = [name for name, task in tasks.items() if task.sparsity > 0]
    starts = [target.architecture.layer_name(i) + "." for i in range(len(target.layers))]
    return [i for i, start in enumerate(starts) if any(name.startswith(start) for name in names)]


def parameter_names(target: Target, index: int) -> list[str]:
    """The full names of the parameters of one decoder layer."""
    prefix = target.architecture.layer_name(index)
    return [f"{prefix}.{name}" for name, _ in target.layers[index].named_parameters()]


def write_layers(saved: Path, target: Target, tasks: Tasks) -> None:
    """Write the layers as they were learned over those of the checkpoint."""
    with safe_open(saved / FINAL, "pt") as learned:
        there = set(learned.keys())
        for index, _ in walk_layers(target, pruned_layers(target, tasks)):
            names = [name for name in parameter_names(target, index) if name in there]
            for name in names:
                target.model.get_parameter(name).data.copy_(learned.get_tensor(name))
            target.commit(index, names)
