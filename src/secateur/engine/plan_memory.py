"""Predicts what a run needs before it begins: memory, disk, work.

The memory that a forward keeps alive is hard to estimate. So one micro-batch passes through a
decoder layer on the meta device, where tensors have sizes but no content, and every operation is
counted. Scores, solvers, statistics and allocations declare their own needs
(`working_bytes`, `nbytes`, `disk_bytes`). `tests/engine/prune/test_solver_cost.py` compares every
solver's memory with its declaration, on grams that float32 can factorise and on grams that need
float64.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.allocator import LOGITS_BYTES
from secateur.calibration.statistics import Gathering, held_bytes
from secateur.engine.plan import Need, Phase, Plan, memory_budget
from secateur.engine.prune.tasks import LinearTask, Settings, Tasks, gathering
from secateur.engine.stream.calls import (
    LayerCall,
    LayerLayout,
    call_layer,
    first_inputs,
    kind_of,
    layer_calls,
    layouts,
    on_meta,
    refuse_unknown,
)
from secateur.engine.stream.halted_forwards import LiveTensors
from secateur.engine.stream.hidden_states import EmbeddingAndHead
from secateur.engine.stream.targets import Target
from secateur.models.architecture import Groups, head_alone, linears_of, text_config
from secateur.models.attention import AttentionOfPlan, WrittenOut, writes_out
from secateur.models.experts import OpenExperts
from secateur.models.skeleton import parameters_of
from secateur.precision import fast_dtype
from secateur.recipes.shared import Distill
from secateur.runs.environment import resident_bytes
from secateur.runs.output import write_json
from secateur.runs.records import SkippedMatrix
from secateur.sparsity.allocation import Allocation
from secateur.sparsity.allocation.search import is_measured_alone
from secateur.types import float32_bytes

log = logging.getLogger(__name__)

SWEEP_WINDOWS = 16
"""Number of windows in a sweep of a distillation, where the whole models do not fit."""

PREDICTION_BYTES = 388
"""Bytes of a stored prediction: 64 tokens with their log probabilities, and that of the rest."""

HIDDEN_COPIES = 4 * 4
"""Bytes for each value of a hidden state in the loss of hidden states: those of the teacher, their
difference, its square, the gradient."""


def _rehearse(layer: nn.Module, groups: Groups, hidden: Tensor, call: LayerCall) -> tuple[int, int]:
    """The memory that one micro-batch keeps alive in one decoder layer, on the meta device.

    Returns:
        The maximum at any moment, including the input; and at any group of linears, where forwards
        wait for each other.
    """
    meta = torch.device("meta")
    call = call.to(meta)
    permanent = [*layer.parameters(), *layer.buffers(), *call.tensors()]
    live = LiveTensors(permanent, find_peak=True)
    halted = [0]
    linears = linears_of(layer, "")
    handles = [
        linears[group[0]].module.register_forward_pre_hook(
            lambda module, args: halted.append(live.live_bytes())
        )
        for group in groups
    ]
    try:
        with torch.no_grad(), live, AttentionOfPlan():
            x = torch.empty(hidden.shape, dtype=hidden.dtype, device=meta)
            with on_meta(layer):
                call_layer(layer, x, call)
    finally:
        for handle in handles:
            handle.remove()
    return live.peak_bytes, max(halted)


PRUNING = Phase("pruning a layer")
BASIS = Phase("learning the value basis")
TUNING = Phase("tuning a layer")
GENERATING = Phase("generating windows")
DISTILLING = Phase("distillation")
SENDING = Phase("sending layers to the GPU", on_host=True)
LOADING = Phase("loading the model", on_host=True)

SOLVE_LESS = "prune without a gram (--method wanda), or leave the largest linears out (--exclude)"
SHORTER = "lower --micro-batch-tokens or --sequence-length"


@dataclass(frozen=True)
class PrunePlan(Plan):
    """The needs of a prune, with its work.

    Attributes:
        solve_shape: (out, in) of the linear that needs most memory to solve.
        fallback_bytes: the part of the need `solve` that is there only where float32 cannot
            factorise a gram.
        flops: floating-point operations of the forwards.
        passed_tokens: tokens that pass through all layers, in all forwards together.
        left: matrices that stay unpruned, with the reasons, if the plan is for a recipe.
        stays_on_gpu: whether hidden states and halted forwards are in the memory of a GPU.
        seconds_of_parts: the minimum and maximum time of each part of the run on this machine, if
            predicted.
        learning_tokens: tokens of `passed_tokens` that pass in the distillation.
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
    seconds_of_parts: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    learning_tokens: int = 0
    sweep_windows: int = 0

    @property
    def seconds(self) -> tuple[float, float] | None:
        """The minimum and maximum time of the run on this machine, if predicted."""
        parts = self.seconds_of_parts.values()
        return (sum(a for a, _ in parts), sum(b for _, b in parts)) if parts else None

    def to_json(self) -> dict[str, Any]:
        """All figures; the unpruned matrices only if known."""
        figures: dict[str, Any] = {}
        for name in ("peak", "host_peak", *self.sizes):
            figures[f"{name}_bytes"] = super().to_json()[name]
            if name == "solve":
                figures |= self._fields("solve_shape", "fallback_bytes")
        figures |= self._fields("disk_bytes", "flops", "passed_tokens", "num_hidden_layers")
        figures |= self._fields("prunable_weights", "calibration_tokens")
        figures |= {"left": [one.to_json() for one in self.left]} if self.left else {}
        return figures | self._fields(
            "on_gpu", "stays_on_gpu", "seconds", "seconds_of_parts", "sweep_windows"
        )

    def _fields(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}


def plan_run(
    target: Target,
    tasks: Tasks,
    windows: Tensor | None,
    settings: Settings,
    epochs: int,
    allocation: Allocation,
    output_bytes: int,
    unwritten: int = 0,
    sweep_windows: int = 0,
    extra_tokens: int = 0,
    teacher: Target | None = None,
) -> PrunePlan:
    """Plan a run over a checkpoint whose layers are still empty.

    Args:
        target: the model with its layers on the meta device.
        tasks: the task of each linear.
        windows: calibration tokens, or None.
        settings: how the work is done.
        epochs: number of epochs in which the whole model learns from the dense one afterwards.
        allocation: sets the sparsity of each linear.
        output_bytes: size of the written files.
        unwritten: number of windows that the model must generate.
        sweep_windows: number of windows in a sweep of the distillation, with one layer in memory; 0
            with both whole models.
        extra_tokens: number of tokens that only the distillation reads.
        teacher: the model to learn from; None for the source.
    """
    refuse_unknown(target)
    length, tokens = (0, 0) if windows is None else (windows.shape[1], windows.numel())
    layers, found = target.layers, layouts(target, length) if length else []
    prunable = sum(task.shape[0] * task.shape[1] for task in tasks.values())
    stored, forwards = 0, {"forward": 0, "waiting": 0, "tuning": 0}
    if windows is not None:
        stored, forwards = _forward_bytes(target, found, windows, tasks, settings)
    of_token = 4 * stored // target.dtype.itemsize // max(tokens, 1)
    models, learnt = (target, teacher or target), tokens + extra_tokens
    learning = _plan_distillation(models, tasks, windows, epochs, sweep_windows, learnt, of_token)
    stored *= 1 + settings.dense_needed
    before = gathering(tasks).backward
    gradients = sum(held_bytes(before, [task.shape]) for task in tasks.values())
    survey = _plan_survey(target, found, allocation, prunable, windows, of_token)
    more = survey.memory_bytes + gradients // len(layers)
    solving = _solving_bytes(target, tasks, found, settings, more)
    whole = 2 if epochs and not sweep_windows else _writes_whole(target, length, unwritten)
    passes = 2 + len(layers) * bool(gradients)  # hidden states are read and written anew
    disk = output_bytes + survey.disk_bytes + learning.disk_bytes + gradients + passes * stored
    passed = survey.passed_tokens + tokens * _passes(settings) + learning.passed_tokens
    sizes = {
        "process": resident_bytes(),
        "layer": max(map(weights_of, layers)) * target.dtype.itemsize * (1 + settings.asymmetric),
        "activation": settings.in_memory * stored,
        **forwards,
        "solve": solving.most,
        "basis": _basis_bytes(target, tasks, settings),
        "writing": writing_bytes(target, windows, unwritten),
        "distilling": learning.memory_bytes,
        "loading": max(map(_model_bytes, models[:whole]), default=0),
    }
    on_gpu = target.device.type == "cuda"
    return PrunePlan(
        prune_needs(sizes, on_gpu, settings.on_gpu, solving.shape, bool(sweep_windows)),
        on_gpu,
        disk,
        solve_shape=solving.shape,
        fallback_bytes=solving.most - solving.usual,
        flops=2 * working_weights(target) * passed,
        passed_tokens=passed,
        num_hidden_layers=len(layers),
        prunable_weights=prunable,
        calibration_tokens=tokens,
        stays_on_gpu=settings.on_gpu,
        learning_tokens=learning.passed_tokens,
        sweep_windows=sweep_windows if epochs else 0,
    )


def prune_needs(
    sizes: Mapping[str, int],
    on_gpu: bool,
    stays_on_gpu: bool,
    solve_shape: tuple[int, int],
    sweeps: bool,
) -> tuple[Need, ...]:
    """The needs of a prune: what each size is for, and when it is there.

    Args:
        sizes: bytes by the name of the need.
        on_gpu: whether a GPU computes.
        stays_on_gpu: whether hidden states and halted forwards are in its memory.
        solve_shape: (out, in) of the linear that needs most memory to solve.
        sweeps: whether a distillation has one decoder layer in memory.
    """
    away = on_gpu and not stays_on_gpu  # hidden states and halted forwards are on the host
    tuning, writing, distilling = (
        (phase,) if sizes[name] else ()
        for phase, name in ((TUNING, "tuning"), (GENERATING, "writing"), (DISTILLING, "distilling"))
    )
    basis = (BASIS,) if sizes["basis"] else ()
    layers, on_disk = (PRUNING, *basis, *tuning), "use --activations disk, or lower --windows"
    host = (SENDING, LOADING) if on_gpu else (*layers, *writing, *distilling)
    distill_less = "use --distill-epochs 0" + ("" if sweeps else " or --distill-sweep-windows 16")
    solving = "solving a {} x {} linear".format(*solve_shape)
    needs = [
        Need("process", sizes["process"], host, "the program itself"),
        # the host of a GPU holds the layer on its way, and reads the next one
        Need("layer", 2 * sizes["layer"], (SENDING,), "two decoder layers"),
    ]
    table: Mapping[str, tuple[tuple[Phase, ...], str, str]] = {
        "layer": (layers, "a decoder layer", "use --dtype bfloat16 (of a GGUF file)"),
        "activation": ((SENDING,) if away else layers, "hidden states", on_disk),
        "forward": ((PRUNING, *basis), "the forward of a micro-batch", SHORTER),
        "waiting": ((SENDING,) if away else (PRUNING,), "halted forwards", on_disk),
        "solve": ((PRUNING,), solving, SOLVE_LESS),
        "basis": (basis, "the basis of value heads", "use --value-basis stored"),
        "writing": (writing, "the whole model", "use --generated-windows 0"),
        "tuning": (tuning, "gradients and forward of a layer", "use --tune-passes 0"),
        "distilling": (distilling, "weights, gradients and moments", distill_less),
        "loading": ((LOADING,), "the whole model", ""),
    }
    return (*needs, *(Need(name, sizes[name], *row) for name, row in table.items()))


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
    sizes = Counter(
        process=resident_bytes(),
        distilling=distilling_bytes(dense, teacher or dense, windows[:1]) + _on_grid_bytes(tasks),
        loading=max(map(_model_bytes, (dense, teacher or dense))),
    )
    on_gpu = dense.device.type == "cuda"
    plan = Plan(prune_needs(sizes, on_gpu, False, (0, 0), sweeps=False), on_gpu)
    budget = memory_budget(max_memory, dense.device)
    if budget.shortage(plan) is None:
        return 0
    log.warning(
        "distilling with one decoder layer in memory, in sweeps of %d windows: with both whole "
        "models the peak is %.2f GiB, the budget %.2f GiB",
        SWEEP_WINDOWS,
        plan.peak_bytes / 2**30,
        budget.computing / 2**30,
    )
    return SWEEP_WINDOWS


class _PartNeeds(NamedTuple):
    """The needs of a part of a run; `passed_tokens` counts a forward with its backward thrice."""

    memory_bytes: int = 0
    disk_bytes: int = 0
    passed_tokens: int = 0


def _plan_distillation(
    models: tuple[Target, Target],
    tasks: Tasks,
    windows: Tensor | None,
    epochs: int,
    sweep_windows: int,
    tokens: int,
    of_token: int,
) -> _PartNeeds:
    """The needs of a distillation: student and teacher; the bytes of a hidden state in float32."""
    if not epochs:
        return _PartNeeds()
    target, teacher = models
    layers, memory = len(target.layers), 0
    # weights, moments, and the weights of the best trial of the learning rate
    disk = 16 * sum(task.shape[0] * task.shape[1] for task in tasks.values())
    if windows is not None:
        of_models, on_grid = distilling_bytes, _on_grid_bytes(tasks)
        if sweep_windows:
            of_models, on_grid = _sweep_bytes, on_grid // layers
        memory = of_models(target, teacher, windows[:1]) + on_grid
    taught = working_weights(teacher) / working_weights(target)  # a forward, in the student's
    if not sweep_windows:
        return _PartNeeds(memory, disk, round((3 + taught) * epochs * tokens))
    # the hidden states of the dense model, its predictions, the states and gradients of a sweep
    at_once = min(sweep_windows * (0 if windows is None else windows.shape[1]), tokens)
    disk += disk // layers + (2 * of_token + PREDICTION_BYTES) * tokens
    disk += (layers + 3) * of_token * at_once
    # The teacher passes once, and every layer runs again for its backward.
    return _PartNeeds(memory, disk, round((taught + 4 * epochs) * tokens))


def _solving_bytes(
    target: Target, tasks: Tasks, found: Sequence[LayerLayout], settings: Settings, more: int
) -> SolveMemory:
    """The memory for the linear that needs most, with what is there meanwhile."""
    asymmetric = settings.asymmetric
    solve = solve_bytes(tasks, asymmetric=asymmetric, held_out=settings.choose_damping)
    names = gathering(tasks, asymmetric=asymmetric).forward
    if settings.sequential == "layer":
        more += _statistics_bytes(target, found, names)
    else:  # one group at a time; `solve` counts one of its linears
        groups = [group for groups in _group_shapes(target, found) for group in groups]
        others = (held_bytes(names, x) - held_bytes(names, x[:1]) for x in groups)
        more += max(others, default=0) * (4 if settings.choose_damping else 1)
    return replace(solve, most=solve.most + more, usual=solve.usual + more)


def weights_of(module: nn.Module) -> int:
    """The number of weights in a module, tied ones once."""
    return sum(p.numel() for p in parameters_of(module).values())


def _model_bytes(target: Target) -> int:
    """The size of the whole model in its dtype."""
    return weights_of(target.model) * target.dtype.itemsize


def working_weights(target: Target) -> int:
    """Number of weights in the decoder's matrices that one token uses, without unused experts."""
    architecture, config = target.architecture, text_config(target.model.config)
    experts, total = architecture.experts, 0.0
    chosen = experts.per_token(config) if experts else None
    for index, layer in enumerate(target.layers):
        counts = [len(m) for m in layer.modules() if isinstance(m, OpenExperts)]
        for linear in linears_of(layer, architecture.layer_name(index)).values():
            share = 1.0
            if chosen is not None and counts and architecture.of_expert(linear.name):
                share = min(1.0, chosen / counts[0])
            total += share * linear.shape[0] * linear.shape[1]
    return round(total)


def writing_bytes(target: Target, windows: Tensor | None, unwritten: int) -> int:
    """The model, keys and values of the windows that it generates together, and logits.

    The kernels have its matrices in int8 and keys and values in bfloat16; before that, one matrix
    as it is stored. Transformers has the whole model in its dtype. Logits are for one token of each
    window, with their float32 copies for the draw.
    """
    if windows is None or not unwritten:
        return 0
    from secateur.calibration.continuation import AT_ONCE, DRAWN_AT_ONCE, kernels_write
    from secateur.models.counting import layer_caches

    size, tokens = target.dtype.itemsize, windows.shape[1]
    rows = min(unwritten, AT_ONCE)
    caches = layer_caches(target.model)
    vocabulary = int(text_config(target.model.config).vocab_size)
    if kernels_write(target.model, target.device, tokens):
        from secateur.quantization.int8 import AT_ONCE as ROUNDED
        from secateur.runtime.kernels.matrix import MOVED_BYTES

        kept = sum(cache.held_bytes(tokens) for cache in caches)
        largest = vocabulary * text_config(target.model.config).hidden_size
        weights = weights_of(target.model)
        moved = min(MOVED_BYTES, weights) + 4 * min(ROUNDED, largest)
        logits = 4 * rows * vocabulary + 12 * max(DRAWN_AT_ONCE, vocabulary)
        return weights + weights // 50 + moved + largest * size + round(rows * kept) + logits
    # there is room for all tokens, window or not
    kept = sum(cache.values * tokens * size + cache.state_bytes for cache in caches)
    return _model_bytes(target) + rows * (round(kept) + vocabulary * (size + 8))


def _writes_whole(target: Target, length: int, unwritten: int) -> bool:
    """Whether transformers generates the windows of a run, with the whole model."""
    if not unwritten:
        return False
    from secateur.calibration.continuation import kernels_write

    return not kernels_write(target.model, target.device, length)


def _basis_bytes(target: Target, tasks: Tasks, settings: Settings) -> int:
    """The most memory in which value heads learn their basis."""
    if settings.value_basis == "stored":
        return 0
    from secateur.engine.prune.value_basis import all_value_heads

    return max((x.working_bytes for x in all_value_heads(target, tasks)), default=0)


def _passes(settings: Settings) -> int:
    """Forwards of all calibration tokens; a forward with its backward counts as three."""
    plain = 1 if settings.sequential == "group" else 2
    tuned = 2 + 3 * settings.reconstruction.passes if settings.tunes else 0
    return plain + settings.dense_needed + tuned


def _plan_survey(
    target: Target,
    found: Sequence[LayerLayout],
    allocation: Allocation,
    prunable: int,
    windows: Tensor | None,
    of_token: int,
) -> _PartNeeds:
    """The needs of an allocation besides one dense layer: statistics, scores, logits."""
    if allocation.reach == 0:
        return _PartNeeds()
    item = target.dtype.itemsize
    held = allocation.working_bytes(prunable // len(target.layers), item)
    disk = allocation.disk_bytes(prunable, item)
    if windows is None:  # the allocation reads only weights
        return _PartNeeds(held, disk, allocation.tokens(0, 0))
    held += _statistics_bytes(target, found, Gathering.of(allocation.requires).forward)
    if allocation.judged_tokens:
        from secateur.engine.search.candidate_evaluator import WINDOW_TOKENS

        # Probabilities of the dense model, logits of a candidate, and one temporary copy; or
        # logits, their gradient, and one copy.
        tokens = min(WINDOW_TOKENS, windows.shape[1])
        held += 3 * 4 * tokens * int(text_config(target.model.config).vocab_size)
        if is_measured_alone(allocation):  # inputs of all layers, gradients of two
            tokens = min(allocation.judged_tokens, windows.numel())
            disk += (len(target.layers) + 3) * tokens * of_token
    linears = sum(len(group) for layout in found for group in layout.groups)
    return _PartNeeds(held, disk, allocation.tokens(windows.numel(), linears))


def _forward_bytes(
    target: Target, found: Sequence[LayerLayout], windows: Tensor, tasks: Tasks, settings: Settings
) -> tuple[int, dict[str, int]]:
    """The memory of all hidden states, and that of forwards: running, halted, and tuning."""
    gathered = bool(gathering(tasks, asymmetric=settings.asymmetric).forward)
    halting = gathered and settings.sequential == "group" and settings.in_memory
    waiting = halting * (1 + settings.asymmetric)  # halted forwards of each micro-batch
    size = min(max(1, settings.micro_batch_tokens // windows.shape[1]), windows.shape[0])
    hidden, calls = calls_of(target, windows[:size])
    batch_tokens = hidden.shape[0] * hidden.shape[1]
    own = hidden.numel() * hidden.dtype.itemsize
    values = max(call.values().nbytes if call.varying else 0 for call in calls)
    stored = (own + values) * windows.numel() // batch_tokens
    groups = {id(x): layout.groups for x, layout in zip(target.layers, found, strict=True)}
    kinds = _layers_by_kind(target, calls)
    rehearsals = [_rehearse(x, groups[id(x)], hidden, call) for x, call, _ in kinds]
    forward, halted = map(max, zip(*rehearsals, strict=True))
    # A halted forward's own input is a view of the stored hidden states.
    held = waiting * (halted - own) * (windows.numel() // batch_tokens)
    if waiting > 1:  # the terms that the writers of both models added to the residual stream
        held += waiting * stored
        if target.architecture.experts is not None:  # what their experts are to correct
            held += stored
    tuning = tuning_bytes(target, windows[:size]) if settings.tunes else 0
    return stored, {"forward": forward, "waiting": held, "tuning": tuning}


def rehearse_training(
    layer: nn.Module, hidden: Tensor, call: LayerCall, *, written_out: bool = False
) -> int:
    """The memory that a layer's forward keeps alive in float32, with everything for its backward.

    Args:
        layer: a decoder layer with its parameters on the meta device.
        hidden: the input of a micro-batch, for its shape.
        call: how the layer is called for it.
        written_out: whether attention keeps its probabilities.
    """
    meta, parameters = torch.device("meta"), list(layer.parameters())
    call = call.to(meta, torch.float32)
    live = LiveTensors([*parameters, *layer.buffers(), *call.tensors()], find_peak=True)
    dtype = parameters[0].dtype
    with on_meta(layer):
        layer.to(torch.float32).requires_grad_(True)
        try:
            attention = WrittenOut() if written_out else AttentionOfPlan()
            with torch.enable_grad(), live, attention:
                x = torch.empty(hidden.shape, dtype=torch.float32, device=meta)
                out = call_layer(layer, x, call)
                del out
        finally:
            layer.to(dtype).requires_grad_(False)
    return live.peak_bytes


def tuning_bytes(target: Target, windows: Tensor) -> int:
    """The memory that tuning a layer needs besides the layer, for one micro-batch of windows."""
    hidden, calls = calls_of(target, windows)

    def of(layer: nn.Module, call: LayerCall) -> int:
        weights = 4 * weights_of(layer)
        plain = next(layer.parameters()).dtype == torch.float32
        # gradients, two moments, shadow or rounded weights; float32 copies of other dtypes
        return rehearse_training(layer, hidden, call) + weights * (4 if plain else 5)

    return max(of(layer, call) for layer, call, _ in _layers_by_kind(target, calls))


def distilling_bytes(target: Target, teacher: Target, window: Tensor) -> int:
    """Two whole models, one in float32 with gradients, moments and masks; one window's forward."""
    hidden, calls = calls_of(target, window)
    written_out = writes_out(target.device, window.shape[1])
    forward = sum(
        count * rehearse_training(layer, hidden, call, written_out=written_out)
        for layer, call, count in _layers_by_kind(target, calls)
    )
    models = 4 * weights_of(target.model) + _model_bytes(teacher)
    learning = (3 * 4 + 1) * weights_of(target.layers)
    forward += HIDDEN_COPIES * hidden.numel()
    return models + learning + forward + logits_bytes(target, window)


def _sweep_bytes(target: Target, teacher: Target, window: Tensor) -> int:
    """One decoder layer in float32 with gradients, moments and a mask, and one window's forward
    through it; or everything outside the layers in float32 with one window's logits. The teacher's
    layers have no gradients, so only what is outside of them counts.
    """
    hidden, calls = calls_of(target, window)
    weights = max(map(weights_of, target.layers))
    outside = max(weights_of(x.model) - weights_of(x.layers) for x in (target, teacher))
    written_out = writes_out(target.device, window.shape[1])
    forward = max(
        rehearse_training(layer, hidden, call, written_out=written_out)
        for layer, call, _ in _layers_by_kind(target, calls)
    )
    outer = 4 * outside + logits_bytes(target, window) + HIDDEN_COPIES * hidden.numel()
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
    return 3 * min(logits, LOGITS_BYTES) + copy


def _on_grid_bytes(tasks: Tasks) -> int:
    """What the backward reads of matrices that learn on a grid: rounded copies, a byte a weight."""
    return sum(float32_bytes(x.shape) * 5 // 4 for x in tasks.values() if x.rounded)


def calls_of(target: Target, windows: Tensor) -> tuple[Tensor, list[LayerCall]]:
    """The first layer's inputs for one micro-batch, and how each layer is called for it."""
    ids = windows.to(target.device)
    with target.outside():
        calls = layer_calls(target.model, target.layers, [ids, ids.flip(1)])
        return calls[0].packed(first_inputs(target.model, target.layers, ids)), calls


def _layers_by_kind(
    target: Target, calls: list[LayerCall]
) -> list[tuple[nn.Module, LayerCall, int]]:
    """One layer of each kind, how it is called, and the number of layers of that kind."""
    pairs = list(zip(target.layers, calls, strict=True))
    of = [kind_of(*pair) for pair in pairs]
    first = dict(zip(reversed(of), reversed(pairs), strict=True))
    return [(*first[kind], count) for kind, count in Counter(of).items()]


TARGET_SQUARES = 6
"""Maximum number of float32 matrices [in, in] in `dense_target`, besides the gram."""
HELD_TARGETS = 2
"""Number of these matrices that stay while the linears of a group are solved."""


@dataclass(frozen=True)
class SolveMemory:
    """The memory for solving one linear, with its statistics: of the linear that takes most.

    Attributes:
        most: bytes at worst.
        usual: bytes where float32 is enough for every factorisation.
        shape: (out, in) of the linear that takes `most`.
    """

    most: int = 0
    usual: int = 0
    shape: tuple[int, int] = (0, 0)


def solve_bytes(tasks: Tasks, *, asymmetric: bool, held_out: bool = False) -> SolveMemory:
    """Return the maximum memory for solving one linear.

    Args:
        tasks: tasks of the run. Tasks that change nothing need no memory.
        asymmetric: whether linears are fitted to the dense model.
        held_out: whether held-out tokens choose the damping.
    """
    needs = {
        (linear_bytes(task, asymmetric=asymmetric, held_out=held_out), task.shape, task.method)
        for task in tasks.values()
        if task.changes
    }
    if not needs:
        return SolveMemory()
    most, shape, _ = max(needs, key=lambda need: need[:2])
    usual = max(size - method.fallback_bytes(own) for size, own, method in needs)
    return SolveMemory(most, usual, shape)


def linear_bytes(task: LinearTask, *, asymmetric: bool, held_out: bool = False) -> int:
    """The memory for solving one linear, with the statistics of its inputs.

    With held-out tokens there are statistics of both parts, and copies of them while they are used.
    """
    names = gathering({task.name: task}, asymmetric=asymmetric).forward
    held = held_bytes(names, [task.shape])
    working = task.method.working_bytes(task.shape)
    if asymmetric:
        square = float32_bytes((task.shape[1], task.shape[1]))
        working = max(TARGET_SQUARES * square, working + HELD_TARGETS * square)
    if held_out:
        held *= 4
        working += HELD_TARGETS * float32_bytes((task.shape[1], task.shape[1]))
        working += float32_bytes(task.shape)
    return held + working


def _statistics_bytes(target: Target, found: Sequence[LayerLayout], names: Iterable[str]) -> int:
    """The memory of the statistics of all groups of a layer; large with many experts."""
    layers = _group_shapes(target, found)
    return max((sum(held_bytes(names, group) for group in groups) for groups in layers), default=0)


def _group_shapes(
    target: Target, found: Sequence[LayerLayout]
) -> list[list[list[tuple[int, int]]]]:
    """For each layer, the shapes of the linears that share an input."""
    pairs = zip([linears_of(layer, "") for layer in target.layers], found, strict=False)
    return [
        [[own[name].shape for name in group] for group in layout.groups] for own, layout in pairs
    ]


CHOICE = "distillation.json"
"""The file with the number of windows in a sweep."""


def stored_choice(work: Path) -> int | None:
    """The number of windows in a sweep that an earlier run has chosen; None if there is none."""
    file = work / CHOICE
    if not file.exists():
        return None
    return int(json.loads(file.read_text(encoding="utf-8"))["sweep_windows"])


def store_choice(work: Path, sweep_windows: int) -> None:
    """Store the number of windows in a sweep, so that a resumed run keeps it."""
    write_json(work / CHOICE, {"sweep_windows": sweep_windows})
