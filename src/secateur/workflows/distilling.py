"""The last step of a run that asks for it: the pruned model learns from the dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from secateur.engine.distillation import Distiller
from secateur.engine.precision import fast_dtype
from secateur.engine.progress import Progress
from secateur.engine.run import Run
from secateur.engine.targets import Target
from secateur.models.experts import open_experts
from secateur.models.skeleton import quiet_transformers
from secateur.models.whole import load_whole
from secateur.recipes.schema import PruneRecipe
from secateur.workflows.preparing import Prepared, distillation_of

__all__ = ["distil", "distil_checkpoint", "distils"]


def distil_checkpoint(
    prepared: Prepared, run: Run, partial: Path, progress: Progress
) -> dict[str, float] | None:
    """Load the dense and the pruned model, distil, and write the layers; None if not asked for."""
    recipe, device = prepared.recipe, prepared.target.device
    if not distils(recipe, run):
        return None
    trust = recipe.trust_remote_code
    teacher = load_whole(
        prepared.source.folder, device, dtype=fast_dtype(device), trust_remote_code=trust
    )
    student = load_whole(partial, device, trust_remote_code=trust)
    open_experts(student)  # its parameters go by the names of the skeleton's
    saved = partial / "work" / "distillation.safetensors"
    told = distil(student, teacher, run, recipe, progress, saved)
    write_layers(student, prepared.target, run)
    return told


def distil(
    student: Any,
    teacher: Any,
    run: Run,
    recipe: PruneRecipe,
    progress: Progress,
    saved: Path | None = None,
) -> dict[str, float]:
    """Let a pruned model learn from the dense one; its divergence before and after."""
    assert run.windows is not None
    pruned = [f"{name}.weight" for name, sparsity in run.sparsity_of.items() if sparsity > 0]
    trained = [
        name
        for index in pruned_layers(run)
        for name in parameter_names(run.target, index)
        if student.get_parameter(name).is_floating_point()
    ]
    distiller = Distiller(
        student,
        teacher,
        trained,
        pruned,
        run.windows,
        distillation_of(recipe),
        recipe.calibration.seed,
        saved,
    )
    progress.start("distilling", len(distiller.order))
    with quiet_transformers():
        told = distiller.run(progress.step)
    progress.finish()
    return told


def distils(recipe: PruneRecipe, run: Run) -> bool:
    """Whether distillation is asked for, and there is something to be mended."""
    return recipe.distillation.epochs > 0 and bool(pruned_layers(run))


def pruned_layers(run: Run) -> list[int]:
    """The decoder layers of which something is pruned; the others stay as they are."""
    names = [name for name, sparsity in run.sparsity_of.items() if sparsity > 0]
    starts = [run.target.architecture.layer_name(i) + "." for i in range(len(run.target.layers))]
    return [i for i, start in enumerate(starts) if any(name.startswith(start) for name in names)]


def parameter_names(target: Target, index: int) -> list[str]:
    """The full names of the parameters of one decoder layer."""
    prefix = target.architecture.layer_name(index)
    return [f"{prefix}.{name}" for name, _ in target.layers[index].named_parameters()]


def write_layers(student: nn.Module, target: Target, run: Run) -> None:
    """Write the layers of the student over those of the checkpoint."""
    for index in pruned_layers(run):
        names = parameter_names(target, index)
        with target.layer(index):
            for name in names:
                target.model.get_parameter(name).data.copy_(student.get_parameter(name).data)
            target.commit(index, names)
