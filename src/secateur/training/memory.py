"""Predicts memory and disk of a training, and refuses one that would not fit.

    all weights in float32
    + for trained parameters: gradients, and the state of the optimizer
    + the products of adapters
    + activations of one micro-batch's forward for its backward, rehearsed on the meta device
    + a block of logits; the teacher; the masks

Several processes share weights, gradients, optimizer state, masks, and the teacher's layers.
Gathered parts count separately. The student needs two decoder layers, because the next one is
fetched while one runs, and the gradients of one; or its embeddings or head with their gradients, if
these are larger. The teacher needs one layer, its embeddings and its head.

The disk holds at the same time: the state for a resumed run, the best weights, a new version of one
of these or the final weights, and the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.engine.plan import Need, Phase, Plan, memory_budget
from secateur.engine.plan_memory import calls_of, rehearse_training
from secateur.engine.stream.targets import CheckpointTarget
from secateur.models.architecture import describe, hidden_size
from secateur.models.checkpoint import CheckpointReader
from secateur.models.skeleton import build_skeleton
from secateur.models.sources import LocalCheckpoint
from secateur.precision import fast_dtype
from secateur.recipes.train import TrainRecipe
from secateur.runs.environment import resident_bytes
from secateur.training.divergences import BLOCK_BYTES
from secateur.training.gradual import prunable
from secateur.training.lora import chosen_linears
from secateur.training.masks import matrices, moments
from secateur.training.objectives import TOP_K
from secateur.training.process_group import ProcessGroup
from secateur.training.setup import TrainingInputs, TrainingText, check_together
from secateur.training.training_plan import TrainingPlan

LESS_FORWARD = (
    "use --gradient-checkpointing, --micro-batch-windows 1 or a shorter --sequence-length"
)
LESS_TEACHER = "use --top-k 64 (the teacher is written down first)"
TRAINING = Phase("training")
READING = Phase("reading the weights", on_host=True)
READING_TEACHER = Phase("reading the teacher", on_host=True)
HOST = READING, READING_TEACHER


@dataclass(frozen=True)
class PlannedTraining:
    """What is known of a training before the weights are read.

    Attributes:
        plan: its length, learning rate and optimizer.
        teacher: the checkpoint of the teacher; None without one, or if a file has its predictions.
        needs: memory, and what it writes at most.
    """

    plan: TrainingPlan
    teacher: LocalCheckpoint | None
    needs: Plan


def plan_of(inputs: TrainingInputs, work: Path | None) -> PlannedTraining:
    """Check everything of a training that needs no weights."""
    recipe, target, text = inputs.recipe, inputs.target, inputs.text
    check_together(recipe, inputs.processes)
    plan, teacher = inputs.plan(), inputs.teacher(work)
    needs = training_memory(recipe, target, teacher, text, plan, inputs.processes)
    check_memory(needs, recipe.memory.max_bytes, inputs.processes.device)
    needs = replace(needs, disk_bytes=_disk_bytes(recipe, target, text, plan))
    return PlannedTraining(plan, teacher, needs)


def training_memory(
    recipe: TrainRecipe,
    target: CheckpointTarget,
    teacher: LocalCheckpoint | None,
    text: TrainingText,
    plan: TrainingPlan,
    processes: ProcessGroup,
) -> Plan:
    """Plan the memory of a training in one process.

    Args:
        recipe: recipe of the training.
        target: the student, with its layers on the meta device.
        teacher: checkpoint of a teacher that is loaded; None for none.
        text: the training text.
        plan: length and optimizer.
        processes: the processes.
    """
    model, trust = target.model, recipe.trust_remote_code
    stored = target.stored  # tied tensors are stored only once
    named = {n: p.numel() for n, p in model.named_parameters() if n in stored}
    trained = sum(count for name, count in named.items() if plan.factor(name))
    products = 0
    if recipe.lora is not None:
        shapes = [linear.shape for linear in chosen_linears(model, recipe.lora)]
        trained = sum(recipe.lora.rank * sum(shape) for shape in shapes)
        products = sum(4 * out * columns for out, columns in shapes)
    ranks = processes.count
    together = min(plan.at_once(text.windows.shape[1]), recipe.batch // ranks or 1)
    micro = text.windows[:together]
    sizes = {
        "process": resident_bytes(),
        "weights": 4 * (sum(named.values()) + trained * (recipe.lora is not None)) // ranks,
        "gathered": _gathered_bytes(target, 4) if ranks > 1 else 0,
        "optimizer": 4 * trained * (1 + _moments_of(plan)) // ranks,
        "adapters": products,
        "forward": _forward_bytes(target, micro, plan, processes.device),
        "logits": (1 + (teacher is not None))
        * (BLOCK_BYTES + 4 * micro.numel() * hidden_size(model)),
        "teacher": 0 if teacher is None else _teacher_bytes(teacher, processes, trust),
        "masks": sum(math.prod(p.shape) for p in matrices(model).values()) // ranks,
    }
    on_gpu = processes.device.type == "cuda"
    return Plan(training_needs(sizes, on_gpu), on_gpu)


def training_needs(sizes: Mapping[str, int], on_gpu: bool) -> tuple[Need, ...]:
    """The needs of a training: what each size is for, and when it is there.

    Args:
        sizes: bytes by the name of the need.
        on_gpu: whether a GPU computes.
    """
    here = (TRAINING,)
    table: Mapping[str, tuple[tuple[Phase, ...], str, str]] = {
        "process": (HOST if on_gpu else here, "the program itself, with text", ""),
        "weights": ((*here, READING), "weights", ""),
        "gathered": (here, "gathered weights", ""),
        "optimizer": (here, "optimizer", "use --lora 16 or --optimizer SGD"),
        "adapters": (here, "products of adapters", ""),
        "forward": (here, "forward", LESS_FORWARD),
        "logits": (here, "logits", ""),
        "teacher": (
            (*here, READING_TEACHER),
            "teacher",
            LESS_TEACHER,
        ),
        "masks": (here, "masks", ""),
    }
    return tuple(Need(name, sizes[name], *row) for name, row in table.items())


def _gathered_bytes(target: CheckpointTarget, itemsize: int) -> int:
    """The maximum size of a student's gathered parts in one of several processes."""
    layers = [sum(p.numel() for p in layer.parameters()) for layer in target.layers]
    outside = [
        sum(p.numel() for p in module.parameters())
        for module in (target.model.get_input_embeddings(), target.model.get_output_embeddings())
        if module is not None
    ]
    return itemsize * max(3 * max(layers), 2 * max(outside))


def _forward_bytes(
    target: CheckpointTarget, windows: Tensor, plan: TrainingPlan, device: torch.device
) -> int:
    """The activations that the decoder layers keep for one micro-batch until their backward.

    With checkpointing, each layer keeps its input, and one layer at a time keeps everything inside.
    """
    hidden, calls = calls_of(target, windows)
    layers = len(target.layers)
    written_out = plan.writes_out(device, windows.shape[1])
    one = rehearse_training(target.layers[0], hidden, calls[0], written_out=written_out)
    return one + layers * 4 * hidden.numel() if plan.gradient_checkpointing else layers * one


def _moments_of(plan: TrainingPlan) -> int:
    """The number of weight-sized tensors in the optimizer's state, measured with one weight."""
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    optimizer = plan.make_optimizer([("weight", weight)])
    optimizer.step()
    return len(list(moments(optimizer, weight)))


def _teacher_bytes(teacher: LocalCheckpoint, processes: ProcessGroup, trust: bool) -> int:
    """The size of a teacher's weights in one process.

    Each of several processes has a part of the decoder layers, one whole layer, and everything
    outside the layers.
    """
    model = build_skeleton(teacher.folder, trust_remote_code=trust)
    dtype, stored = fast_dtype(processes.device) or model.dtype, CheckpointReader(teacher.folder)
    weights = sum(math.prod(entry.shape) for entry in stored.entries.values())
    if processes.count > 1:
        layers = describe(model).layers(model)
        within = sum(p.numel() for p in layers.parameters())
        one = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
        weights += 2 * one - (within - within // processes.count)
    return dtype.itemsize * weights


def _disk_bytes(
    recipe: TrainRecipe, target: CheckpointTarget, text: TrainingText, plan: TrainingPlan
) -> int:
    """The maximum disk use of a training. Each new file is written next to the old one."""
    stored = target.stored
    named = {n: p.numel() for n, p in target.model.named_parameters() if n in stored}
    trained = sum(count for name, count in named.items() if plan.factor(name))
    if recipe.lora is not None:
        chosen = chosen_linears(target.model, recipe.lora)
        trained = sum(recipe.lora.rank * sum(linear.shape) for linear in chosen)
    final = 4 * trained
    state = final * (1 + _moments_of(plan))
    masks = sum(x.weight.numel() for x in prunable(target.model))
    if recipe.gradual is not None:
        state += masks
    rounds = 0
    if recipe.iterative is not None:
        # The float32 weights and the masks of the last round and of this one. Rewinding weights
        # adds the early weights and the weights of the first training.
        copies = 4 if recipe.iterative.rewind == "weights" else 2
        rounds = 4 * sum(named.values()) * copies + 2 * masks
    best = final * (text.validation is not None)
    predictions = 0
    if recipe.teacher is not None and (recipe.top_k or recipe.teacher_file):
        predictions = text.windows.numel() * (6 * (recipe.top_k or TOP_K) + 4)
    result = target.reader.total_bytes
    return state + best + predictions + rounds + max(state, best, final + result)


def check_memory(needed: Plan, max_memory: int | None, device: torch.device) -> None:
    """Refuse a training that would not fit.

    Args:
        needed: the plan of the training.
        max_memory: bytes; see `memory_budget`.
        device: the computing device.

    Raises:
        MemoryBudgetError: the training needs more than there is; the message gives both numbers and
            remedies.
    """
    budget = memory_budget(max_memory, device)
    shortage = budget.shortage(needed)
    if shortage is not None:
        raise budget.refusal(needed, f"training needs {shortage}")
