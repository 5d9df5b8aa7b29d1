"""Plans the memory and the disk of a training. A training that would not fit is refused.

    all weights in float32
    + for trained parameters: gradients, and the state of the optimizer
    + the matrices in the dtype of their products, or the products of adapters
    + activations of one micro-batch's forward for its backward, rehearsed on the meta device
    + a block of logits, and the head in the dtype of its products; the teacher; the masks

Several processes share weights, gradients, optimizer state, masks, and the teacher's layers.
Gathered parts count separately. The student needs two decoder layers, because the next one is
fetched while one runs, the gradients of one, and those of another in float32, which are being
summed; or its embeddings or head with their gradients, if these are larger. The teacher needs one
layer, its embeddings and its head.

If that is too much for a GPU, its weights, gradients, optimizer state and masks go to the host
(`TrainingSetup`). torch rounds the sizes of pinned memory there up to powers of two.

The disk holds at the same time: the state for a resumed run, the best weights, a new version of one
of these or the final weights, and the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from secateur.engine import plan as memory_plan
from secateur.engine.plan import Need, Phase, Plan, weights_of
from secateur.engine.stream.calls import calls_of
from secateur.machine import fast_dtype, logits_block
from secateur.models.architecture import describe, hidden_size
from secateur.models.checkpoint import CheckpointReader
from secateur.models.skeleton import build_skeleton, parameters_of
from secateur.models.sources import LocalCheckpoint
from secateur.models.targets import CheckpointTarget
from secateur.recipes.train import TrainRecipe
from secateur.runs.environment import resident_bytes
from secateur.training import masks
from secateur.training.batches import Batches
from secateur.training.lora import chosen_linears
from secateur.training.process_group import ProcessGroup, not_rounded
from secateur.training.training_plan import TrainingPlan

LESS_FORWARD = (
    "use --gradient-checkpointing, --micro-batch-windows 1 or a shorter --sequence-length"
)
TRAINING = Phase("training")
HOLDING = Phase("training, on the host", on_host=True)
READING = Phase("reading the weights", on_host=True)
READING_TEACHER = Phase("reading the teacher", on_host=True)


def plan_needs(
    recipe: TrainRecipe,
    target: CheckpointTarget,
    teacher: LocalCheckpoint | None,
    batches: Batches,
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
        batches: the training windows, and how many are in a step.
        plan: length and optimizer.
        processes: the processes.
        validates: whether there are validation windows, so that the best weights are kept.
    """
    model, ranks, device = target.model, processes.count, processes.device
    adapted = () if recipe.lora is None else chosen_linears(model, recipe.lora)
    named = {name: p.numel() for name, p in parameters_of(model).items()}  # tied ones once
    learned = [count for name, count in named.items() if plan.factor(name)]
    if recipe.lora is not None:
        learned = [recipe.lora.rank * sum(linear.shape) for linear in adapted]
    trained, own = sum(learned), [*named.values(), *(learned if adapted else ())]
    windows = batches.windows
    micro = windows[: min(plan.at_once(windows.shape[1]), batches.size // ranks or 1)]
    rounded = fast_dtype(device) if plan.fast_matmuls else None
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    outside = max(weights_of(module) for module in ends if module is not None)
    matrices = sum(math.prod(p.shape) for p in masks.matrices(model).values())
    logits = logits_block(device) + 4 * micro.numel() * hidden_size(model)
    head = 2 * rounded.itemsize * outside if rounded else 0  # and a product of that size
    taught = 0 if teacher is None else _teacher_bytes(teacher, processes)
    products = sum(4 * math.prod(linear.shape) for linear in adapted)
    # where parameters are divided, autocast has little left to round
    left = sum(map(_plain_weights, target.layers)) if processes.divides else matrices
    copies = rounded.itemsize * left if rounded else 0
    moments = _moments_of(plan)
    on_gpu, here = device.type == "cuda", (TRAINING,)
    on_host = on_gpu and processes.on_host
    there = (HOLDING,) if on_host else here
    state = _float32_bytes(learned, ranks, on_host) + 4 * trained * moments // ranks
    host = (READING, READING_TEACHER, HOLDING) if on_gpu else here
    less_teacher = "use --top-k 64 (the teacher is written down first)"
    less_state = "use --lora 16 or --optimizer SGD"
    needs = (
        Need("process", resident_bytes(), host, "the program itself, with text"),
        Need("weights", _float32_bytes(own, ranks, on_host), (*there, READING), "weights"),
        Need("gathered", _gathered_bytes(target, processes, outside, rounded), here, "gathered"),
        Need("optimizer", state, there, "gradients and optimizer", less_state),
        Need("rounded", copies, here, "rounded weights"),
        Need("adapters", products, here, "products of adapters"),
        Need("forward", _forward_bytes(target, micro, plan, device), here, "forward", LESS_FORWARD),
        Need("logits", (1 + (teacher is not None)) * logits + head, here, "logits"),
        Need("teacher", taught, (*here, READING_TEACHER), "teacher", less_teacher),
        Need("masks", matrices // ranks, there, "masks"),  # bool
    )
    saved = 4 * trained * (1 + moments)  # weights and moments
    return Plan(
        needs,
        on_gpu,
        disk_bytes=_disk_bytes(recipe, target, windows.numel(), trained, saved, validates),
    )


def _float32_bytes(counts: Iterable[int], ranks: int, pinned: bool) -> int:
    """The size of one process's parts of float32 tensors with so many numbers."""
    sizes = (4 * -(-count // ranks) for count in counts)
    return sum(1 << (size - 1).bit_length() if pinned else size for size in sizes)


def _gathered_bytes(
    target: CheckpointTarget, processes: ProcessGroup, outside: int, rounded: torch.dtype | None
) -> int:
    """The most that FSDP2 holds of whole units: weights, and gradients on their way."""
    if not processes.divides:
        return 0
    size, layer = rounded.itemsize if rounded else 4, max(map(weights_of, target.layers))
    plain = max(map(_plain_weights, target.layers))
    # two layers, the gradients of one, and those of another in float32; or one end and its gradient
    units = max(3 * (size * (layer - plain) + 4 * plain) + 4 * layer, 8 * outside)
    # a process's part comes from the host in float32, and its gradient goes there
    return units + processes.on_host * 8 * max(layer, outside) // processes.count


def _plain_weights(layer: nn.Module) -> int:
    """The number of weights in a layer that are gathered in float32 in any case."""
    return min(weights_of(layer), sum(map(weights_of, not_rounded(layer))))


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
