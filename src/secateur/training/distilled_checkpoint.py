"""Distills one checkpoint into another: both whole models in memory, or one decoder layer.

The trained weights are in complete files before the first weight of the smaller checkpoint is
overwritten. So a resumed run either trains the smaller model again or writes the trained weights.
It never mixes the two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.engine.prune.tasks import Tasks
from secateur.engine.stream.targets import CheckpointTarget
from secateur.models.architecture import hidden_size
from secateur.models.checkpoint import PatchedCopy
from secateur.models.experts import open_experts
from secateur.models.opening import load_whole, open_weights
from secateur.precision import fast_dtype
from secateur.progress import Progress
from secateur.runs.atomic import write_json
from secateur.training.distillation import (
    DistillationData,
    Student,
    distill,
    pruned_layers,
    trainable_names,
)
from secateur.training.layerwise import LayerwiseDistillation
from secateur.training.saved import stored_tensors

FOLDER = "distillation"
"""The folder of the state, in the folder of the work."""

FINAL = "final.safetensors"
"""The file with the weights of a finished training in memory."""

LEARNED = "learned.json"
"""The file with the losses of a finished distillation."""


def distill_checkpoint(
    dense: CheckpointTarget,
    folder: Path,
    tasks: Tasks | None,
    data: DistillationData,
    sweep_windows: int,
    work: Path,
    progress: Progress,
    *,
    trust_remote_code: bool,
) -> dict[str, float] | None:
    """Let a smaller checkpoint learn from the dense one, and overwrite its weights.

    In a pruned model the layers with pruned or rounded weights learn. In a cut model all layers
    learn, and with both models in memory everything but the embeddings and the head.

    Args:
        dense: the model to learn from.
        folder: the smaller model.
        tasks: the tasks of the linears in a pruned model, whose zeros and grids stay; None for a
            cut model.
        data: the windows, and how often they are read.
        sweep_windows: number of windows in a sweep with one layer in memory; 0 for both models.
        work: folder of the work; a stopped run resumes.
        progress: receives every step.
        trust_remote_code: whether code from both folders may run.

    Returns:
        The losses, as `distill` returns them; None if nothing learns.
    """
    reader, saved = open_weights(folder), work / FOLDER
    made = CheckpointTarget(
        reader, None, dense.device, dtype=torch.float32, trust_remote_code=trust_remote_code
    )
    layers = list(range(len(made.layers))) if tasks is None else pruned_layers(made, tasks)
    if not data.options.epochs or not layers:
        return None

    def student_of(module: nn.Module, numbers: Sequence[int]) -> Student:
        if tasks is not None:
            return Student.of(module, made, tasks, numbers)
        names = [name for number in numbers for name in trainable_names(made, number)]
        return Student(module, frozenset(names), hidden_size(made.model))

    def learn_whole() -> dict[str, float]:
        teacher = load_whole(
            dense.reader.folder,
            dense.device,
            dtype=fast_dtype(dense.device),
            trust_remote_code=trust_remote_code,
        )
        model = load_whole(folder, dense.device, trust_remote_code=trust_remote_code)
        open_experts(model)  # its parameters get the names in the skeleton
        student = student_of(model, layers)
        if tasks is None:
            student = replace(student, trained=_outside_embeddings(model))
        return distill(teacher, student, data, progress, saved)

    sweeps = LayerwiseDistillation(
        dense,
        made,
        layers,
        lambda module, number: student_of(module, [number]),
        data,
        sweep_windows,
        saved,
        progress,
    )
    file = saved / LEARNED
    if not file.exists():
        write_json(file, sweeps.run() if sweep_windows else learn_whole())
    copy = PatchedCopy(reader, folder)
    for name, tensor in sweeps.trained() if sweep_windows else stored_tensors(saved / FINAL):
        copy.write(made.stored[name], tensor)
    copy.sync()
    losses: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    return losses


def _outside_embeddings(model: Any) -> frozenset[str]:
    """The names of the floating-point parameters but the embeddings and the head."""
    outside = {id(p) for p in model.get_input_embeddings().parameters()}
    outside |= {id(p) for p in model.get_output_embeddings().parameters()}
    named = model.named_parameters()
    return frozenset(
        name for name, p in named if id(p) not in outside and p.is_floating_point() and p.numel()
    )
