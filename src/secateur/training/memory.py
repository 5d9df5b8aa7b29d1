"""Plans the memory and the disk of a training. A training that would not fit is refused.

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

import torch
from torch import Tensor, nn

from secateur.engine import plan as memory_plan
from secateur.engine.plan import Need, Phase, Plan, weights_of
from secateur.engine.stream.calls import calls_of
from secateur.machine import LOGITS_BYTES, fast_dtype
from secateur.models.architecture import describe, hidden_size
from secateur.models.checkpoint import CheckpointReader
from secateur.models.skeleton import build_skeleton, parameters_of
from secateur.models.sources import LocalCheckpoint
from secateur.models.targets import CheckpointTarget
from secateur.recipes.train import TrainRecipe
from secateur.runs.environment import resident_bytes
from secateur.training import masks
from secateur.training.lora import chosen_linears
from secateur.training.process_group import ProcessGroup
from secateur.training.training_plan import TrainingPlan

LESS_FORWARD = (
    "use --gradient-checkpointing, --micro-batch-windows 1 or a shorter --sequence-length"
)
TRAINING = Phase("training")
READING = Phase("reading the weights", on_host=True)
READING_TEACHER = Phase("reading the teacher", on_host=True)


def plan_needs(
    recipe: TrainRecipe,
    target: CheckpointTarget,
    teacher: LocalCheckpoint | None,
    windows: Tensor,
    plan: TrainingPlan,
    processes: ProcessGroup,
    *,
    validates: bool = False,
) -> Plan:
    """Plan the memory of a training in one process, and the disk.

    Args:
        recipe: recipe of the training.
        target: the student, with its layers on the meta device.
        teacher: checkpoint of a teacher that is loaded; None for none.
        windows: the training windows.
        plan: length and optimizer.
        processes: the processes.
        validates: whether there are validation windows, so that the best weights are kept.
    """
    model, ranks = target.model, processes.count
    adapted = () if recipe.lora is None else chosen_linears(model, recipe.lora)
    named = {name: p.numel() for name, p in parameters_of(model).items()}  # tied ones once
    weights = sum(named.values())
    trained = sum(count for name, count in named.items() if plan.factor(name))
    if recipe.lora is not None:
        trained = sum(recipe.lora.rank * sum(linear.shape) for linear in adapted)
        weights += trained
    together = min(plan.at_once(windows.shape[1]), recipe.batch // ranks or 1)
    micro = windows[:together]
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    outside = max(weights_of(module) for module in ends if module is not None)
    # two layers and the gradients of one, or embeddings or head with their gradients
    gathered = max(3 * max(map(weights_of, target.layers)), 2 * outside) if ranks > 1 else 0
    # a block of logits, and the gradient of the last hidden states, float32
    logits = LOGITS_BYTES + 4 * micro.numel() * hidden_size(model)
    forward = _forward_bytes(target, micro, plan, processes.device)
    taught = 0 if teacher is None else _teacher_bytes(teacher, processes)
    products = sum(4 * math.prod(linear.shape) for linear in adapted)
    masked = sum(math.prod(p.shape) for p in masks.matrices(model).values()) // ranks  # bool
    # gradients and moments, float32
    state = 4 * trained * (1 + _moments_of(plan))
    on_gpu, here = processes.device.type == "cuda", (TRAINING,)
    host = (READING, READING_TEACHER) if on_gpu else here
    less_teacher = "use --top-k 64 (the teacher is written down first)"
    needs = (
        Need("process", resident_bytes(), host, "the program itself, with text"),
        Need("weights", 4 * weights // ranks, (*here, READING), "weights"),
        Need("gathered", 4 * gathered, here, "gathered weights"),
        Need("optimizer", state // ranks, here, "optimizer", "use --lora 16 or --optimizer SGD"),
        Need("adapters", products, here, "products of adapters"),
        Need("forward", forward, here, "forward", LESS_FORWARD),
        Need("logits", (1 + (teacher is not None)) * logits, here, "logits"),
        Need("teacher", taught, (*here, READING_TEACHER), "teacher", less_teacher),
        Need("masks", masked, here, "masks"),
    )
    return Plan(
        needs,
        on_gpu,
        disk_bytes=_disk_bytes(recipe, target, windows.numel(), trained, state, validates),
    )


def _forward_bytes(
    target: CheckpointTarget, windows: Tensor, plan: TrainingPlan, device: torch.device
) -> int:
    """The activations that the decoder layers keep for one micro-batch until their backward.

    With checkpointing, each layer keeps its input, and one layer at a time keeps everything inside.
    """
    hidden, calls = calls_of(target, windows)
    layers = len(target.layers)
    written_out = plan.writes_out(device, windows.shape[1])
    # layers are alike enough: one is rehearsed on meta, where a forward costs no memory
    first = target.layers[0]
    one = memory_plan.rehearse_training(first, hidden, calls[0], written_out=written_out)
    return one + layers * 4 * hidden.numel() if plan.gradient_checkpointing else layers * one


def _moments_of(plan: TrainingPlan) -> int:
    """The number of weight-sized tensors in the optimizer's state, measured with one weight."""
    # a matrix, because Adafactor keeps moments of the size of a weight for vectors only
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    optimizer = plan.make_optimizer([("weight", weight)])
    optimizer.step()
    return len(list(masks.moments(optimizer, weight)))


def _teacher_bytes(teacher: LocalCheckpoint, processes: ProcessGroup) -> int:
    """The size of a teacher's weights in one process.

    Each of several processes has a part of the decoder layers, one whole layer, and everything
    outside the layers.
    """
    model = build_skeleton(teacher.folder)
    dtype, stored = fast_dtype(processes.device) or model.dtype, CheckpointReader(teacher.folder)
    weights = sum(math.prod(entry.shape) for entry in stored.entries.values())
    if processes.count > 1:
        layers = describe(model).layers(model)
        within = weights_of(layers)
        # a layer that runs and the next one, gathered; of the others only this process's part
        weights += 2 * max(map(weights_of, layers)) - (within - within // processes.count)
    return dtype.itemsize * weights


def _disk_bytes(
    recipe: TrainRecipe,
    target: CheckpointTarget,
    tokens: int,
    trained: int,
    state: int,
    validates: bool,
) -> int:
    """The maximum disk use of a training. Each new file is written next to the old one."""
    final = 4 * trained
    masked = sum(x.weight.numel() for x in masks.prunable(target.model))
    best = final * validates
    rounds = predictions = 0
    if recipe.gradual is not None:
        state += masked
    if recipe.iterative is not None:
        # The final weights of the last round, and the masks of both; the early weights.
        rounds = final * (2 if recipe.iterative.rewind == "weights" else 1) + 2 * masked
    if recipe.top_k:
        # float16 and int32 for each of the k tokens, float32 for the rest
        predictions = tokens * (6 * recipe.top_k + 4)
    written = max(state, best, final + target.reader.total_bytes)
    return state + best + predictions + rounds + written


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
    budget = memory_plan.memory_budget(max_memory, device)
    shortage = budget.shortage(needed)
    if shortage is not None:
        raise budget.refusal(needed, f"training needs {shortage}")
