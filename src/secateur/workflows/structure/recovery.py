"""The last step of a cut, which is optional: the smaller model learns from the uncut one."""

from __future__ import annotations

import json

import torch
from safetensors import safe_open
from torch import Tensor, nn

from secateur.engine.learning_memory import distilling_bytes
from secateur.engine.memory_budget import memory_budget
from secateur.engine.stream.targets import CheckpointTarget
from secateur.models.architecture import hidden_size
from secateur.models.checkpoint import CheckpointReader, PatchedCopy
from secateur.models.opening import open_weights
from secateur.models.sources import LocalCheckpoint
from secateur.models.whole import load_whole
from secateur.precision import fast_dtype
from secateur.progress import Progress
from secateur.recipes.structure import StructureRecipe
from secateur.runs.atomic import write_json
from secateur.runs.environment import resident_bytes
from secateur.runs.folder import RunFolder
from secateur.workflows.prune.chosen_plan import SWEEP_WINDOWS, tell_of_sweeps
from secateur.workflows.prune.distillation import learn
from secateur.workflows.prune.learning import FINAL, Lessons, Pupil, once, trainable_names
from secateur.workflows.prune.streamed_distillation import StreamedDistillation

WAY = "way.json"
"""The file with the number of windows in a sweep."""


def distill(
    recipe: StructureRecipe,
    source: LocalCheckpoint,
    folder: RunFolder,
    windows: Tensor,
    device: torch.device,
    progress: Progress,
) -> dict[str, float] | None:
    """Distill the uncut model into the cut one, and overwrite its weights with the result.

    Both models are in memory if they fit, else one decoder layer (`streamed_distillation.py`). In
    memory everything learns but the embeddings and the head; in sweeps the decoder layers learn.
    """
    if not recipe.distillation.epochs:
        return None
    trust, reader = recipe.trust_remote_code, CheckpointReader(folder.model)
    dense = CheckpointTarget(open_weights(source.folder), None, device, trust_remote_code=trust)
    made = CheckpointTarget(
        reader, PatchedCopy(reader, folder.model), device, trust_remote_code=trust
    )
    size = sweep_windows_of(recipe, dense, folder, windows)
    lessons = Lessons(windows, recipe.distillation, recipe.calibration.seed)
    if size:
        return learn_streamed(recipe, dense, made, folder, lessons, size, progress)
    return learn_whole(recipe, source, made, folder, lessons, progress)


def sweep_windows_of(
    recipe: StructureRecipe, dense: CheckpointTarget, folder: RunFolder, windows: Tensor
) -> int:
    """Return the number of windows in a sweep; 0 if both whole models fit into memory.

    The choice is stored, so a resumed run keeps it.
    """
    told, asked = folder.work / WAY, recipe.distillation.sweep_windows
    if told.exists():
        return int(json.loads(told.read_text(encoding="utf-8"))["sweep_windows"])
    size = asked or 0
    if asked is None:
        budget = memory_budget(recipe.memory.max_bytes, dense.device).computing
        # of two models of the uncut size
        needed = distilling_bytes(dense, windows[:1])
        needed += resident_bytes() if dense.device.type == "cpu" else 0
        if needed > budget:
            size = SWEEP_WINDOWS
            tell_of_sweeps(size, needed, budget)
    write_json(told, {"sweep_windows": size})
    return size


def learn_streamed(
    recipe: StructureRecipe,
    dense: CheckpointTarget,
    made: CheckpointTarget,
    folder: RunFolder,
    lessons: Lessons,
    size: int,
    progress: Progress,
) -> dict[str, float]:
    """Distill with one decoder layer in memory."""
    width = hidden_size(made.model)

    def pupil(module: nn.Module, number: int) -> Pupil:
        return Pupil(module, frozenset(trainable_names(made, number)), width)

    return StreamedDistillation(
        dense,
        folder.model,
        range(len(made.layers)),
        pupil,
        lessons,
        size,
        folder.work / "distillation",
        progress,
        trust_remote_code=recipe.trust_remote_code,
    ).learn_into(made)


def learn_whole(
    recipe: StructureRecipe,
    source: LocalCheckpoint,
    made: CheckpointTarget,
    folder: RunFolder,
    lessons: Lessons,
    progress: Progress,
) -> dict[str, float]:
    """Distill with both models in memory."""
    saved, device, trust = folder.work / "distillation", made.device, recipe.trust_remote_code

    def train() -> dict[str, float]:
        teacher = load_whole(
            source.folder, device, dtype=fast_dtype(device), trust_remote_code=trust
        )
        student = load_whole(folder.model, device, trust_remote_code=trust)
        outside = {id(p) for p in student.get_input_embeddings().parameters()}
        outside |= {id(p) for p in student.get_output_embeddings().parameters()}
        trained = [
            name
            for name, p in student.named_parameters()
            if id(p) not in outside and p.is_floating_point() and p.numel()
        ]
        return learn(student, teacher, trained, lessons, progress, saved)

    losses = once(saved, train)
    assert made.output is not None
    with safe_open(saved / FINAL, "pt") as learned:
        for name in learned.keys():  # noqa: SIM118 (a safetensors file is no mapping)
            made.output.write(made.stored[name], learned.get_tensor(name))
    made.output.sync()
    return losses
