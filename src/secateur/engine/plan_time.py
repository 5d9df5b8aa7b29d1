"""A rough estimate of the time of a run on this machine, before it begins.

    seconds = FILE_SECONDS · bytes + forward · tokens + Σ (gather · tokens + prepare + solve)

One micro-batch passes through the first decoder layer of each kind, with real weights. A method
works on one random matrix of each shape, at most `_WIDEST` rows and columns of it. After its first
layer, the bar of a run knows the time that is left.
"""

from __future__ import annotations

import time

import torch

from secateur.calibration.statistics import Gathering, GroupStatistics, held_bytes
from secateur.engine.plan import layers_by_kind
from secateur.engine.prepared import Prepared
from secateur.engine.prune.tasks import LinearTask, Settings, Tasks
from secateur.engine.stream.calls import call_layer, calls_of
from secateur.errors import NumericalError, PatternError
from secateur.models.architecture import Linear
from secateur.timing import seconds_of
from secateur.types import STORED

_WIDEST = 1024
"""Maximum rows or columns of timed matrices."""
FILE_SECONDS = 1e-8
"""Seconds to copy, digest and audit a stored byte; measured on one machine with a local disk."""
QUICKER, SLOWER = 0.6, 2.0
"""The range round the estimate."""


def estimate_seconds(
    prepared: Prepared, tasks: Tasks, settings: Settings, passed_tokens: int
) -> tuple[float, float]:
    """Return the shortest and the longest time of a run.

    Args:
        prepared: the recipe, opened.
        tasks: the task of each linear.
        settings: how the work is done.
        passed_tokens: tokens that pass through all layers, in all forwards together.
    """
    seconds, tokens = FILE_SECONDS * prepared.output_bytes, 0
    first = set(tasks)  # of the linears that share an input
    if prepared.windows is not None:
        tokens = prepared.windows.planned.numel()
        written = prepared.windows.ungenerated * prepared.windows.planned.shape[1]
        seconds += _forward_seconds(prepared, settings) * (passed_tokens + written)
        name_of = prepared.target.architecture.layer_name
        groups = [(i, group) for i, x in enumerate(prepared.layouts) for group in x.groups]
        first = {f"{name_of(i)}.{group[0]}" for i, group in groups}
    known: dict[tuple[int, tuple[int, int]], tuple[float, float, float]] = {}
    for task in (task for task in tasks.values() if task.changes):
        key = id(task.method), task.shape
        if key not in known:
            known[key] = piece_seconds(task, settings, prepared.target.device)
        gathering, preparing, solving = known[key]
        seconds += solving + (task.name in first) * (tokens * gathering + preparing)
    return QUICKER * seconds, SLOWER * seconds


def _forward_seconds(prepared: Prepared, settings: Settings) -> float:
    """Seconds for each token that passes through all layers."""
    target, windows = prepared.target, prepared.windows
    assert windows is not None
    every = windows.planned
    hidden, calls = calls_of(target, every[: settings.windows_at_once(every)])
    total = 0.0
    for index, call, count in layers_by_kind(target, calls):
        with target.layer(index) as layer, torch.no_grad(), settings.matmuls(target.device):
            total += count * seconds_of(lambda x=(layer, call): call_layer(x[0], hidden, x[1]))
    return total / hidden.shape[:2].numel()


def piece_seconds(
    task: LinearTask, settings: Settings, device: torch.device
) -> tuple[float, float, float]:
    """Seconds to gather one token, to prepare the solver, and to choose a mask and solve.

    Preparing grows with in³, and solving with in² · out.
    """
    method, shape = task.method, (min(task.shape[0], _WIDEST), min(task.shape[1], _WIDEST))
    try:
        method.check(shape, task.sparsity)
    except PatternError:
        shape = task.shape
    (rows, columns), wider = shape, task.shape[1] / shape[1]
    names = Gathering.of(method.requires | ({"gram"} if settings.asymmetric else set()))
    module = torch.nn.Linear(columns, rows, bias=False, device=device)
    linear = Linear("timed", module)
    x = torch.randn(columns + 64, columns, device=device)
    gathered = GroupStatistics(names.forward, [[linear]], device)
    growth = held_bytes(names.forward, [task.shape]) / max(held_bytes(names.forward, [shape]), 1)
    gathering = growth * seconds_of(lambda: gathered.update(x)) / len(x)
    shared, weight = gathered.value(), module.weight.detach()
    own = {name: torch.rand(shape, device=device) for name in names.backward}
    known = {**shared, **gathered.own(linear), **own, STORED: weight}
    started = time.perf_counter()
    try:
        prepared = method.solver.prepare(known)
        middle = time.perf_counter()
        method.solve(weight, prepared, known, task.sparsity).mask.sum().item()  # waits for a GPU
    except NumericalError:  # some parts cannot handle random numbers
        return gathering, 0.0, 0.0
    solving = (time.perf_counter() - middle) * wider**2 * task.shape[0] / rows
    return gathering, (middle - started) * wider**3, solving
