"""Predicts what a run needs before it begins: memory, disk, work.

Scores, solvers, statistics and allocations declare their own needs (`working_bytes`, `nbytes`,
`disk_bytes`). `tests/engine/prune/test_solver_cost.py` compares every solver's memory with its
declaration, on grams that float32 can factorise and on grams that need float64.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from secateur.calibration.statistics import held_bytes
from secateur.engine import plan
from secateur.engine.prune.tasks import Settings, SolveMemory, Tasks, gathering, solving_memory
from secateur.engine.stream.calls import LayerLayout, calls_of, layouts
from secateur.engine.stream.halted_forwards import batches_of, put_together
from secateur.engine.stream.hidden_states import EmbeddingAndHead
from secateur.machine import fast_dtype, logits_block
from secateur.models.architecture import head_alone, linears_of, text_config
from secateur.models.attention import writes_out
from secateur.models.experts import AT_ONCE
from secateur.models.targets import Target, refuse_unknown
from secateur.recipes.shared import Distill
from secateur.registry import float32_bytes
from secateur.runs.output import write_json
from secateur.runs.records import SkippedMatrix
from secateur.sparsity.allocation import Allocation

log = logging.getLogger(__name__)

_SOLVE_LESS = "prune without a gram (--method wanda), or leave the largest linears out (--exclude)"
_SMALLER = "use --dtype bfloat16 (of a GGUF file)"
_WRITE_LESS = "use --generated-windows 0"
_TUNE_LESS = "use --tune-passes 0"

_SWEEP_WINDOWS = 16
"""Number of windows in a sweep of a distillation, where the whole models do not fit."""

_PREDICTION_BYTES = 388
"""Bytes of a stored prediction: 64 tokens with their log probabilities, and that of the rest."""

_HIDDEN_COPIES = 4 * 4
"""Bytes for each value of a hidden state in the loss of hidden states: those of the teacher, their
difference, its square, the gradient."""


@dataclass(frozen=True)
class PrunePlan(plan.Plan):
    """The needs of a prune, with its work.

    Attributes:
        solve_shape: (out, in) of the linear that needs most memory to solve.
        fallback_bytes: the part of the need `solve` that is there only where float32 cannot
            factorise a gram.
        flops: floating-point operations of the forwards.
        passed_tokens: tokens that pass through all layers, in all forwards together.
        left: matrices that stay unpruned, with the reasons, if the plan is for a recipe.
        stays_on_gpu: whether hidden states and halted forwards are in the memory of a GPU.
        experts_at_once: the number of experts that get their inputs together.
        seconds: the minimum and maximum time of the run on this machine, if estimated.
        sweep_windows: number of windows in a sweep of the distillation, with one layer in memory; 0
            with both whole models.
    """

    _: KW_ONLY
    solve_shape: tuple[int, int]
    fallback_bytes: int
    flops: int
    passed_tokens: int
    num_hidden_layers: int
    prunable_weights: int
    calibration_tokens: int
    left: list[SkippedMatrix] = field(default_factory=list)
    stays_on_gpu: bool = False
    experts_at_once: int = AT_ONCE
    seconds: tuple[float, float] | None = None
    sweep_windows: int = 0

    def to_json(self) -> dict[str, Any]:
        """All figures; the unpruned matrices only if known."""
        figures: dict[str, Any] = {}
        memory = super().to_json()
        for name in ("peak", "host_peak", *self.sizes):
            figures[f"{name}_bytes"] = memory[name]
            if name == "solve":
                figures |= {x: getattr(self, x) for x in ("solve_shape", "fallback_bytes")}
        for name in _FIGURES:
            figures[name] = getattr(self, name)
        return figures | ({"left": [one.to_json() for one in self.left]} if self.left else {})


_FIGURES = (
    "disk_bytes", "flops", "passed_tokens", "num_hidden_layers", "prunable_weights",
    "calibration_tokens", "on_gpu", "stays_on_gpu", "seconds", "sweep_windows",
)  # fmt: skip
"""The figures of a plan that are not sizes in memory, in their order in JSON."""


class Learning(NamedTuple):
    """The distillation after a prune.

    Attributes:
        epochs: number of epochs in which the whole model learns; 0 for no distillation.
        extra_tokens: number of tokens that only the distillation reads.
        teacher: the model to learn from; None for the source.
        sweep_windows: number of windows in a sweep, with one layer in memory; 0 with both whole
            models.
    """

    epochs: int = 0
    extra_tokens: int = 0
    teacher: Target | None = None
    sweep_windows: int = 0


_NO_LEARNING = Learning()


def plan_run(
    target: Target,
    tasks: Tasks,
    windows: Tensor | None,
    settings: Settings,
    allocation: Allocation,
    output_bytes: int = 0,
    unwritten: int = 0,
    learning: Learning = _NO_LEARNING,
) -> PrunePlan:
    """Plan a run over a checkpoint whose layers are still empty.

    Args:
        target: the model with its layers on the meta device.
        tasks: the task of each linear.
        windows: calibration tokens, or None.
        settings: how the work is done.
        allocation: sets the sparsity of each linear.
        output_bytes: size of the written files.
        unwritten: number of windows that the model must generate.
        learning: the distillation afterwards.
    """
    refuse_unknown(target)
    put_together(target.model, settings.experts_at_once)
    length, tokens = (0, 0) if windows is None else (windows.shape[1], windows.numel())
    layers, found = target.layers, layouts(target, length) if length else []
    on_gpu, groups = target.device.type == "cuda", _group_shapes(layers, found)
    prunable = sum(task.shape[0] * task.shape[1] for task in tasks.values())
    stored, forwards, tuning = _forward_bytes(target, found, windows, tasks, settings)
    of_token = 4 * stored // target.dtype.itemsize // max(tokens, 1)  # bytes in float32
    learnt = _plan_distillation(target, tasks, windows, learning, of_token)
    sweeps = learning.sweep_windows if learning.epochs else 0
    stored *= 1 + settings.dense_needed  # those of the dense model pass as well
    before = gathering(tasks).backward
    gradients = sum(held_bytes(before, [task.shape]) for task in tasks.values())
    survey = _plan_survey(target, groups, allocation, prunable, windows, of_token)
    more = survey.memory_bytes + gradients // len(layers)
    more += on_gpu * workspace_bytes(tasks, asymmetric=settings.asymmetric)
    batches = _batch_shapes(layers, found)
    solving = solving_memory(target, tasks, groups, batches, settings, more)
    writing, loaded = _plan_generation(target, unwritten, length)
    loaded = 2 if learning.epochs and not sweeps else loaded
    layer = max(map(plan.weights_of, layers)) * target.dtype.itemsize * (1 + settings.asymmetric)
    models = target, learning.teacher or target
    passes = 2 + len(layers) * bool(gradients)  # hidden states are read and written anew
    passed = survey.passed_tokens + tokens * _passes(settings) + learnt.passed_tokens
    needs = [
        *pruning_needs(layer, stored, forwards, solving, settings, on_gpu=on_gpu),
        plan.Need("writing", writing, (plan.GENERATING,), "the whole model", _WRITE_LESS),
        plan.Need("tuning", tuning, (plan.TUNING,), "gradients and forward of a layer", _TUNE_LESS),
        *learning_needs(learnt.memory_bytes, models[:loaded], sweeps=bool(learning.sweep_windows)),
    ]
    return PrunePlan(
        plan.with_program(needs, on_gpu),
        on_gpu,
        output_bytes + survey.disk_bytes + learnt.disk_bytes + gradients + passes * stored,
        solve_shape=solving.shape,
        fallback_bytes=solving.most - solving.usual,
        flops=2 * plan.working_weights(target) * passed,
        passed_tokens=passed,
        num_hidden_layers=len(layers),
        prunable_weights=prunable,
        calibration_tokens=tokens,
        stays_on_gpu=settings.on_gpu,
        experts_at_once=settings.experts_at_once,
        sweep_windows=sweeps,
    )


def workspace_bytes(tasks: Tasks, *, asymmetric: bool) -> int:
    """What cuSOLVER takes beside the gram that it factors: not more than a square of its size.

    NVIDIA gives no formula. A workspace of Cholesky or LU is a few panels of the matrix, and an
    inverse by a factor is solved on an identity of its size. None of it lives while another does.
    """
    solved = [task for task in tasks.values() if task.changes]
    grams = [x for x in solved if "gram" in gathering({x.name: x}, asymmetric=asymmetric).forward]
    widest = max((task.shape[1] for task in grams), default=0)
    return float32_bytes((widest, widest))


def pruning_needs(
    layer: int,
    stored: int,
    forwards: tuple[int, int],
    solving: SolveMemory,
    settings: Settings,
    *,
    on_gpu: bool,
) -> list[plan.Need]:
    """The needs of pruning layer by layer.

    Args:
        layer: bytes of a decoder layer.
        stored: bytes of the hidden states.
        forwards: bytes of a running forward, and of those that halt.
        solving: the memory for the linear that needs most.
        settings: how the work is done.
        on_gpu: whether a GPU computes.
    """
    layers = (plan.PRUNING, plan.TUNING) if settings.tunes else (plan.PRUNING,)
    away = (plan.SENDING,) if on_gpu and not settings.on_gpu else None  # what is on the host
    held, shape = settings.in_memory * stored, "solving a {} x {} linear".format(*solving.shape)
    return [
        # the host of a GPU holds the layer on its way
        plan.Need("layer", layer, (*layers, plan.SENDING), "a decoder layer", _SMALLER),
        plan.Need("activation", held, away or layers, "hidden states", plan.ON_DISK),
        plan.Need(
            "forward", forwards[0], (plan.PRUNING,), "the forward of a micro-batch", plan.SHORTER
        ),
        plan.Need("waiting", forwards[1], (plan.PRUNING,), "halted forwards", plan.ON_DISK),
        plan.Need("solve", solving.most, (plan.PRUNING,), shape, _SOLVE_LESS),
    ]


def learning_needs(size: int, models: Sequence[Target], *, sweeps: bool) -> list[plan.Need]:
    """The needs of a distillation, and of the whole models that are loaded, one after the other.

    Args:
        size: bytes of the distillation.
        models: the models.
        sweeps: whether it has one decoder layer in memory.
    """
    less = "use --distill-epochs 0" + ("" if sweeps else " or --distill-sweep-windows 16")
    loading = max(map(plan.model_bytes, models), default=0)
    return [
        plan.Need("distilling", size, (plan.DISTILLING,), "weights, gradients and moments", less),
        plan.Need("loading", loading, (plan.LOADING,), "the whole model"),
    ]


def choose_sweeps(
    options: Distill,
    dense: Target,
    windows: Tensor,
    tasks: Tasks,
    max_memory: int | None,
    teacher: Target | None = None,
) -> int:
    """Return the number of windows in a sweep; 0 for both whole models, where they fit.

    The log says when a distillation takes sweeps, and why.

    Args:
        options: of the distillation.
        dense: the model that learns, or the one that it was cut from.
        windows: the windows that it reads.
        tasks: the tasks of the linears in a pruned model; empty for a cut one.
        max_memory: bytes; see `memory_budget`.
        teacher: the model to learn from; None for `dense`.
    """
    if options.sweep_windows is not None or not options.epochs:
        return options.sweep_windows or 0
    models, on_gpu = (dense, teacher or dense), dense.device.type == "cuda"
    size = distilling_bytes(*models, windows[:1]) + _on_grid_bytes(tasks)
    whole = plan.Plan(plan.with_program(learning_needs(size, models, sweeps=False), on_gpu), on_gpu)
    budget = plan.memory_budget(max_memory, dense.device)
    if budget.shortage(whole) is None:
        return 0
    log.warning(
        "distilling with one decoder layer in memory, in sweeps of %d windows: with both whole "
        "models the peak is %.2f GiB, the budget %.2f GiB",
        _SWEEP_WINDOWS,
        whole.peak_bytes / 2**30,
        budget.computing / 2**30,
    )
    return _SWEEP_WINDOWS


def _plan_distillation(
    target: Target, tasks: Tasks, windows: Tensor | None, how: Learning, of_token: int
) -> plan.PartNeeds:
    """The needs of a distillation, given the bytes of a hidden state in float32."""
    if not how.epochs:
        return plan.PartNeeds()
    epochs, sweep_windows, teacher = how.epochs, how.sweep_windows, how.teacher or target
    tokens = how.extra_tokens + (0 if windows is None else windows.numel())
    layers, memory = len(target.layers), 0
    # weights, moments, and the weights of the best trial of the learning rate
    disk = 16 * sum(task.shape[0] * task.shape[1] for task in tasks.values())
    if windows is not None:
        of_models, on_grid = distilling_bytes, _on_grid_bytes(tasks)
        if sweep_windows:
            of_models, on_grid = _sweep_bytes, on_grid // layers
        memory = of_models(target, teacher, windows[:1]) + on_grid
    # a forward of the teacher costs as much as so many of the student
    taught = plan.working_weights(teacher) / plan.working_weights(target)
    if not sweep_windows:
        return plan.PartNeeds(memory, disk, round((3 + taught) * epochs * tokens))
    # the hidden states of the dense model, its predictions, the states and gradients of a sweep
    at_once = min(sweep_windows * (0 if windows is None else windows.shape[1]), tokens)  # tokens
    disk += disk // layers + (2 * of_token + _PREDICTION_BYTES) * tokens
    disk += (layers + 3) * of_token * at_once
    # The teacher passes once, and every layer runs again for its backward.
    return plan.PartNeeds(memory, disk, round((taught + 4 * epochs) * tokens))


def _passes(settings: Settings) -> int:
    """Forwards of all calibration tokens; a forward with its backward counts as three."""
    plain = 1 if settings.sequential == "group" else 2
    tuned = 2 + 3 * settings.tune_passes if settings.tunes else 0
    return plain + settings.dense_needed + tuned


def _plan_survey(
    target: Target,
    groups: Sequence[Sequence[Sequence[tuple[int, int]]]],
    allocation: Allocation,
    *more: Any,
) -> plan.PartNeeds:
    """The needs of an allocation; arguments as of `survey_needs`."""
    if allocation.reach == 0:
        return plan.PartNeeds()
    from secateur.engine.search.allocation import survey_needs

    return survey_needs(target, groups, allocation, *more)


def _plan_generation(target: Target, count: int, length: int) -> tuple[int, int]:
    """Bytes to generate so many windows, and the number of whole models that are loaded for it."""
    if not count:
        return 0, 0
    from secateur.calibration.continuation import kernels_write, writing_bytes

    found = target.model, target.device, length
    return writing_bytes(*found, target.dtype, count), int(not kernels_write(*found))


def _forward_bytes(
    target: Target,
    found: Sequence[LayerLayout],
    windows: Tensor | None,
    tasks: Tasks,
    settings: Settings,
) -> tuple[int, tuple[int, int], int]:
    """Bytes of all hidden states; of a running forward and all that halt; and of tuning a layer."""
    if windows is None:
        return 0, (0, 0), 0
    hidden, calls = calls_of(target, windows[: settings.windows_at_once(windows)])
    batch_tokens = hidden.shape[0] * hidden.shape[1]
    own = hidden.numel() * hidden.dtype.itemsize
    values = max(call.values().nbytes if call.varying else 0 for call in calls)
    stored = (own + values) * windows.numel() // batch_tokens
    rehearsals = [
        plan.rehearse(target.layers[i], found[i].groups, hidden, call)
        for i, call, _ in plan.layers_by_kind(target, calls)
    ]
    forward, halted = map(max, zip(*rehearsals, strict=True))
    gathered = bool(gathering(tasks, asymmetric=settings.asymmetric).forward)
    stay = settings.on_gpu or (settings.in_memory and target.device.type == "cpu")
    halting = gathered and settings.sequential == "group" and stay  # else on disk, or repeated
    waiting = halting * (1 + settings.asymmetric)  # halted forwards of each micro-batch
    # A halted forward's own input is a view of the stored hidden states.
    held = waiting * (halted - own) * (windows.numel() // batch_tokens)
    if waiting > 1:  # the terms that the writers of both models added to the residual stream
        held += waiting * stored
        if target.architecture.experts is not None:  # what their experts are to correct
            held += stored
    tuning = 0
    if settings.tunes:
        from secateur.engine.prune.reconstruction import tuning_bytes

        tuning = tuning_bytes(target, windows[: settings.windows_at_once(windows)])
    return stored, (forward, held), tuning


def _group_shapes(
    layers: nn.ModuleList, found: Sequence[LayerLayout]
) -> list[list[list[tuple[int, int]]]]:
    """For each layer, the shapes of the linears that share an input."""
    pairs = zip([linears_of(layer, "") for layer in layers], found, strict=False)
    return [
        [[own[name].shape for name in group] for group in layout.groups] for own, layout in pairs
    ]


def _batch_shapes(
    layers: nn.ModuleList, found: Sequence[LayerLayout]
) -> set[tuple[int, tuple[tuple[int, int], ...]]]:
    """The number of experts in each batch, and the shapes of the linears of one group."""
    shapes = set()
    for layer, layout in zip(layers, found, strict=False):
        own = linears_of(layer, "")
        for batch in batches_of(layer, [[own[name] for name in x] for x in layout.groups]):
            if batch.stage is not None:
                shapes.add((len(batch.groups), tuple(x.shape for x in batch.groups[0])))
    return shapes


def distilling_bytes(target: Target, teacher: Target, window: Tensor) -> int:
    """Two whole models, one in float32 with gradients, moments and masks; one window's forward."""
    hidden, calls = calls_of(target, window)
    written_out = writes_out(target.device, window.shape[1])
    forward = sum(
        count * plan.rehearse_training(target.layers[i], hidden, call, written_out=written_out)
        for i, call, count in plan.layers_by_kind(target, calls)
    )
    models = 4 * plan.weights_of(target.model) + plan.model_bytes(teacher)
    learning = (3 * 4 + 1) * plan.weights_of(target.layers)  # gradient, two moments; a byte of mask
    forward += _HIDDEN_COPIES * hidden.numel()
    return models + learning + forward + logits_bytes(target, window)


def _sweep_bytes(target: Target, teacher: Target, window: Tensor) -> int:
    """One decoder layer in float32 with gradients, moments and a mask, and one window's forward
    through it; or everything outside the layers in float32 with one window's logits. The teacher's
    layers have no gradients, so only what is outside of them counts.
    """
    hidden, calls = calls_of(target, window)
    weights = max(map(plan.weights_of, target.layers))
    outside = max(plan.weights_of(x.model) - plan.weights_of(x.layers) for x in (target, teacher))
    written_out = writes_out(target.device, window.shape[1])
    forward = max(
        plan.rehearse_training(target.layers[i], hidden, call, written_out=written_out)
        for i, call, _ in plan.layers_by_kind(target, calls)
    )
    outer = 4 * outside + logits_bytes(target, window) + _HIDDEN_COPIES * hidden.numel()
    return max((4 * 4 + 1) * weights + forward, outer)


def logits_bytes(target: Target, window: Tensor) -> int:
    """The logits of both models for the tokens of a window, and the gradient of one.

    Where the output of the head is the logits, a training has a block of them at a time, and a
    copy of the head in the dtype of its products.
    """
    vocabulary = int(text_config(target.model.config).vocab_size)
    logits = 4 * window.numel() * vocabulary
    outer = EmbeddingAndHead(target, window)
    with outer.outside(), outer.returning(None):
        head = head_alone(target.model)
    if head is None:
        return 3 * logits
    rounded = fast_dtype(target.device)
    copy = 0 if rounded is None else rounded.itemsize * head.weight.numel()
    return 3 * min(logits, logits_block(target.device)) + copy


def _on_grid_bytes(tasks: Tasks) -> int:
    """What the backward reads of matrices that learn on a grid: rounded copies, a byte a weight."""
    return sum(float32_bytes(x.shape) * 5 // 4 for x in tasks.values() if x.rounded)


_CHOICE = "distillation.json"
"""The file with the number of windows in a sweep."""


def stored_choice(work: Path) -> int | None:
    """The number of windows in a sweep that an earlier run has chosen; None if there is none."""
    file = work / _CHOICE
    if not file.exists():
        return None
    return int(json.loads(file.read_text(encoding="utf-8"))["sweep_windows"])


def store_choice(work: Path, sweep_windows: int) -> None:
    """Store the number of windows in a sweep, so that a resumed run keeps it."""
    write_json(work / _CHOICE, {"sweep_windows": sweep_windows})
