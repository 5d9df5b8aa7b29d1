"""Predicts the time of a run on this machine from timed pieces of its work.

    seconds = ready + reading + forward · tokens · passes + Σ (gather + prepare + solve)
              + FILE_SECONDS · bytes
            + forwards of windows that are generated, token by token
            + steps of learned value bases
            + forwards and backwards of a distillation, and of the trials of its rate

A micro-batch passes through one decoder layer of each kind, with real weights and hidden states,
so attention, norms and routing count as they are. A method works on one matrix of each shape.
Matrices wider than `WIDEST` are timed at a fraction of their size.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor

from secateur.calibration.statistics import Gathering, held_bytes
from secateur.engine.plan_memory import calls_of, weights_of, working_weights
from secateur.engine.prune.run import GroupStatistics
from secateur.engine.prune.tasks import LinearTask, Settings, Tasks
from secateur.engine.stream.calls import call_layer, kind_of
from secateur.engine.stream.targets import Target
from secateur.errors import NumericalError, PatternError
from secateur.models.architecture import Linear, hidden_size, text_config
from secateur.precision import fast_dtype
from secateur.recipes.shared import trial_steps
from secateur.runtime.kernels.dispatch import by_blocks
from secateur.runtime.kernels.matrix import KernelMatrix
from secateur.sparsity.methods import Method
from secateur.timing import alternate, seconds_of
from secateur.types import STORED

WIDEST = 1024
"""Maximum rows or columns of timed matrices."""
PROBE_SECONDS = 0.1
FILE_SECONDS = 1e-8
"""Seconds to copy, digest and audit a stored byte; measured on one machine with a local disk."""
FEWEST_TRIALS = 2
"""A rate is chosen when the next one is worse."""
QUICKER, SLOWER = 0.85, 1.5
"""The range round the predicted time; a run also waits for memory and for other programs."""

Shape = tuple[int, int]


@dataclass(frozen=True)
class PieceTimes:
    """The time of a method for one matrix, scaled to its full size.

    Attributes:
        gathering: seconds for the statistics of its input, for each calibration token.
        preparing: seconds to prepare the solver, once for all linears that share an input.
        solving: seconds to choose a mask and solve.
    """

    gathering: float
    preparing: float
    solving: float


def foretell_seconds(
    tasks: Tasks,
    groups: Iterable[tuple[str, ...]],
    times: LayerTimes,
    *,
    ready: float,
    passed: float,
    tokens: int,
    output_bytes: int,
    settings: Settings,
    device: torch.device,
) -> float:
    """Return the seconds of a pruning on this machine.

    Args:
        tasks: the task of each linear.
        groups: full names of linears that share an input.
        times: of the decoder layers.
        ready: seconds until the first layer: reading the text, building the skeleton.
        passed: tokens that pass through all layers, in all forwards together.
        tokens: number of calibration tokens.
        output_bytes: of the written files.
        settings: how the work is done.
        device: the computing device.
    """
    known: dict[tuple[int, Shape], PieceTimes] = {}

    def times_of(task: LinearTask) -> PieceTimes:
        key = id(task.method), task.shape
        if key not in known:
            known[key] = piece_times(task.method, task.shape, task.sparsity, settings, device)
        return known[key]

    before = ready + times.reading + times.forward * passed + FILE_SECONDS * output_bytes
    return run_seconds(tasks, groups, before, tokens, times_of)


def basis_seconds(target: Target, tasks: Tasks, times: LayerTimes, tokens: int) -> dict[str, float]:
    """Return the seconds in which value heads learn their basis; nothing without any.

    Forwards end at the output projection. What they leave out stands for the second moments.

    Args:
        target: the model.
        tasks: the task of each linear.
        times: of the decoder layers.
        tokens: number of calibration tokens.
    """
    from secateur.engine.prune.value_basis import STEPS, ValueHeads, all_value_heads, learn_basis

    seconds, known = 0.0, dict[tuple[Shape, Shape], float]()
    for heads in all_value_heads(target, tasks):
        both = heads.values, heads.output
        shapes = heads.values.shape, heads.output.shape
        if shapes not in known:
            blank = [torch.nn.Linear(*x.shape[::-1], device=target.device) for x in both]
            one, other = map(Linear, ("values", "output"), blank)
            first, last = (torch.eye(x.shape[1], device=target.device) for x in both)
            left, right = (tasks[x.name] for x in both)
            probe = ValueHeads(one, other, heads.size)
            work = partial(learn_basis, probe, (first, last), left, right)
            few = [_timed(partial(work, steps), target.device) for steps in (1, 2)]
            known[shapes] = few[0] + (STEPS - 1) * max(few[1] - few[0], 0.0)
        seconds += known[shapes] + times.forward * min(tokens, heads.tokens) / len(target.layers)
    return {"learning the value basis": seconds} if known else {}


def learning_seconds(
    target: Target, times: LayerTimes, passed: int, steps: int, *, trials: bool
) -> dict[str, float]:
    """Return the seconds of a distillation and of the trials of its rate; nothing without one.

    Args:
        target: the model.
        times: of the decoder layers.
        passed: tokens that pass through all layers in the distillation.
        steps: number of its steps.
        trials: whether short trials choose its learning rate.
    """
    if not passed or not times.forward:
        return {}
    head = int(text_config(target.model.config).vocab_size) * hidden_size(target.model)
    learning = times.forward * passed * (1 + head / weights_of(target.layers))
    begun = trial_steps(steps) / steps if trials else 0.0
    of_trials = {"trials of the learning rate": FEWEST_TRIALS * begun * learning} if trials else {}
    return {**of_trials, "distillation": (1 - begun) * learning}


def run_seconds(
    tasks: Tasks,
    groups: Iterable[tuple[str, ...]],
    forwards: float,
    tokens: int,
    times_of: Callable[[LinearTask], PieceTimes],
) -> float:
    """Seconds of a run: its forwards, and for each group of linears gather, prepare and solve.

    Args:
        tasks: the task of each linear, by full name.
        groups: full names of linears that share an input.
        forwards: seconds of all forwards, and of what is not solving.
        tokens: number of calibration tokens.
        times_of: returns the times of a task.
    """
    total = forwards
    for group in groups:
        changed = [tasks[name] for name in group if name in tasks and tasks[name].changes]
        if changed:
            first = times_of(changed[0])
            total += tokens * first.gathering + first.preparing
            total += sum(times_of(task).solving for task in changed)
    return total


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest call. Calls repeat for a tenth of a second, at least twice."""

    def call() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    best: list[float]
    best = alternate([call], seconds_of, min, turns=sys.maxsize, seconds=PROBE_SECONDS)
    return best[0]


def piece_times(
    method: Method, shape: Shape, sparsity: float, settings: Settings, device: torch.device
) -> PieceTimes:
    """Time a method on a random matrix of a shape, or of a fraction that fits the pattern.

    Preparing grows with in³, and solving with in² · out.
    """
    small = (fraction_of(shape[0]), fraction_of(shape[1]))
    try:
        method.check(small, sparsity)
    except PatternError:
        small = shape
    rows, columns = small
    wider, taller = shape[1] / columns, shape[0] / rows
    x = torch.randn(columns + 64, columns, device=device)
    weight = torch.randn(small, device=device)
    names = Gathering.of(method.requires | ({"gram"} if settings.asymmetric else set()))
    module = torch.nn.Linear(columns, rows, bias=False, device="meta")
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    linear = Linear("timed", module)
    own = {name: torch.rand(small, device=device) for name in names.backward}
    gathering, shared = 0.0, dict[str, torch.Tensor]()
    for name, source in names.forward.items():
        gathered = GroupStatistics({name: source}, [linear], device)
        seconds = _timed(lambda gathered=gathered: gathered.update(x), device)
        growth = held_bytes([name], [shape]) / held_bytes([name], [small])
        gathering += growth * seconds / len(x)
        shared |= gathered.value()
        own |= gathered.own(linear)
    try:
        started = time.perf_counter()
        prepared = method.solver.prepare(shared)
        middle = time.perf_counter()
        solution = method.solve(weight, prepared, {**shared, **own, STORED: weight}, sparsity)
        solution.mask.sum().item()  # waits for a GPU
        ended = time.perf_counter()
    except NumericalError:  # some parts cannot handle random numbers
        return PieceTimes(gathering, 0.0, 0.0)
    preparing, solving = (middle - started) * wider**3, (ended - middle) * wider**2 * taller
    return PieceTimes(gathering, preparing, solving)


def fraction_of(size: int) -> int:
    """Divide a size by its smallest divisor that gives at most `WIDEST`.

    If the result would be below a quarter of `WIDEST`, the size does not change.

    Example:
        >>> from secateur.engine.plan_time import fraction_of
        >>> fraction_of(576), fraction_of(1536), fraction_of(11008), fraction_of(2 * 1031)
        (576, 768, 688, 2062)
    """
    if size <= WIDEST:
        return size
    fractions = (size // k for k in range(2, size + 1) if size % k == 0)
    largest = next(x for x in fractions if x <= WIDEST)
    return largest if largest >= WIDEST // 4 else size


CALLS = 3
LONG = 2.0
"""Seconds of a call after which it is not repeated."""


@dataclass(frozen=True)
class LayerTimes:
    """The time of all decoder layers together.

    Attributes:
        forward: seconds for each token that passes through all layers; 0 without calibration.
        reading: seconds to read all layers once.
    """

    forward: float
    reading: float


def layer_times(target: Target, windows: Tensor | None, settings: Settings) -> LayerTimes:
    """Time one layer of each kind, and scale by the number of its layers.

    Args:
        target: the model.
        windows: calibration tokens, or None.
        settings: how the work is done.
    """
    layers = list(target.layers)
    if windows is None:
        began = time.perf_counter()
        with target.layer(0):
            return LayerTimes(0.0, len(layers) * (time.perf_counter() - began))
    size = max(1, settings.micro_batch_tokens // windows.shape[1])
    hidden, calls = calls_of(target, windows[:size])
    of = [kind_of(*pair) for pair in zip(layers, calls, strict=True)]
    forward, reading = 0.0, 0.0
    for kind, count in Counter(of).items():
        index = of.index(kind)
        began = time.perf_counter()
        with target.layer(index) as layer, torch.no_grad(), settings.matmuls(target.device):
            reading += count * (time.perf_counter() - began)
            seconds: list[float] = []
            while len(seconds) < CALLS and sum(seconds) < LONG:
                began = time.perf_counter()
                call_layer(layer, hidden, calls[index])
                if target.device.type == "cuda":
                    torch.cuda.synchronize(target.device)
                seconds.append(time.perf_counter() - began)
        forward += count * median(seconds)
    return LayerTimes(forward / (hidden.shape[0] * hidden.shape[1]), reading)


PROBED = 1024
"""Rows and columns of the matrix whose product is timed for the generation of windows."""
BESIDES = 1.7
"""The time of a generated token, divided by that of its matrix products: attention, norms and the
draw. Measured on SmolLM2-135M with windows of 512 tokens."""
BESIDES_OF_TRANSFORMERS = 2.5


def writing_seconds(target: Target, length: int, windows: int) -> float:
    """Seconds in which the dense model generates windows, by the time of one product.

    Args:
        target: the model.
        length: tokens of a window.
        windows: how many are generated.
    """
    from secateur.calibration.continuation import AT_ONCE, kernels_write

    rows = min(windows, AT_ONCE)
    weights = working_weights(target) + target.model.get_output_embeddings().weight.numel()
    if kernels_write(target.model, target.device, length):
        ones = torch.ones(PROBED, PROBED, dtype=torch.int8)
        matrix, x = KernelMatrix(ones, scale=torch.ones(PROBED)), torch.ones(rows, PROBED)
        seconds = BESIDES * _timed(lambda: by_blocks(matrix, x), target.device)
    else:
        dtype = fast_dtype(target.device) or torch.float32
        x = torch.ones(rows, PROBED, dtype=dtype, device=target.device)
        weight = torch.ones(PROBED, PROBED, dtype=dtype, device=target.device)
        seconds = BESIDES_OF_TRANSFORMERS * _timed(lambda: x @ weight.T, target.device)
    calls = -(-windows // AT_ONCE) * length
    return calls * seconds * weights / PROBED**2
