"""Prunes one group of linears when the statistics of its input are complete."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from secateur.engine.prune.collapse import lost_energy
from secateur.engine.prune.linear_record import LinearRecord
from secateur.engine.prune.tasks import LinearTask
from secateur.engine.stream.targets import Target
from secateur.engine.stream.walk import walk_layers
from secateur.errors import NumericalError, VerificationError
from secateur.models.architecture import Linear, linears_of
from secateur.models.checkpoint import not_finite
from secateur.parallel.ranks import Ranks
from secateur.sparsity.solvers import Solution
from secateur.types import STORED


def check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights in memory that are NaN or infinite.

    Raises:
        NumericalError: there are such values; the message names the tensor and their number.
    """
    for name, tensor in tensors:
        if bad := not_finite(tensor):
            raise NumericalError(
                f"{bad} of {tensor.numel()} weights are NaN or infinite",
                where=name,
                remedy="the model is damaged: load or make it again",
            )


def all_zero(linears: Iterable[Linear]) -> list[str]:
    """The names of linears with only zero weights."""
    return [linear.name for linear in linears if not linear.weight.any()]


def refuse_all_zero(target: Target) -> None:
    """Refuse a model without a weight to prune. Reads up to the first matrix that has one.

    Raises:
        NumericalError: every matrix of every decoder layer is zero.
    """
    count = 0
    for index, layer in walk_layers(target):
        linears = linears_of(layer, target.architecture.layer_name(index)).values()
        if any(linear.weight.any() for linear in linears):
            return
        count += len(linears)
    if count:
        raise NumericalError(
            f"all {count} matrices of the decoder are zero",
            where=target.architecture.layers_path,
            remedy="the checkpoint holds no trained weights: get it again",
        )


def prune_group(
    linears: Sequence[Linear],
    shared: Mapping[str, Tensor],
    own: Callable[[Linear], Mapping[str, Tensor]],
    tasks: Mapping[str, LinearTask],
    fitted: Callable[[Linear], Tensor] = lambda linear: linear.weight,
) -> list[LinearRecord]:
    """Prune linears that share an input.

    Args:
        linears: the linears to work on.
        shared: statistics of their input.
        own: returns the statistics of a linear's own gradients.
        tasks: tasks of the linears, by name. Their methods differ only in the pattern.
        fitted: returns the weight [out, in] to prune in place of a linear's own.
    """
    if not linears:
        return []
    prepared = tasks[linears[0].name].method.solver.prepare(shared)
    records = []
    for linear in linears:
        started, task = time.perf_counter(), tasks[linear.name]
        weight = fitted(linear)
        known = {**shared, **own(linear), STORED: linear.weight}
        solution = task.method.solve(weight, prepared, known, task.sparsity)
        lost = lost_energy(weight, solution.mask, shared) if solution.error is None else None
        linear.assign(solution.weight)
        if solution.shift is not None:
            linear.shift(solution.shift)
        records.append(verified(linear, task, solution, lost, started))
    return records


def exchanged(
    linears: Sequence[Linear],
    owned: Sequence[int],
    found: Sequence[LinearRecord],
    ranks: Ranks,
) -> list[LinearRecord]:
    """Give every process the pruned linears of the others. Return the records of all.

    Args:
        linears: the linears that the processes have pruned.
        owned: the process that has pruned each.
        found: the records of this process.
        ranks: the processes.
    """
    told = ranks.gather([record.to_json() for record in found])
    by_name = {entry["name"]: entry for entries in told for entry in entries}
    for linear, owner in zip(linears, owned, strict=True):
        for parameter in linear.module.parameters(recurse=False):
            ranks.share(parameter, owner)
    return [LinearRecord.of_json(by_name[linear.name]) for linear in linears]


def verified(
    linear: Linear, task: LinearTask, solution: Solution, lost: float | None, started: float
) -> LinearRecord:
    """Compare the stored zeros of a linear with the number that its pattern requires.

    Raises:
        VerificationError: there are fewer zeros than its task requires, or a value is not finite.
    """
    weight = linear.weight
    expected = task.method.pattern.pruned(linear.shape, task.sparsity)
    pruned = weight.numel() - int(solution.mask.sum())
    zeros = weight.numel() - int(torch.count_nonzero(weight))
    if pruned != expected or zeros < expected:
        raise VerificationError(
            f"{linear.name} should have {expected} zeros; the mask has {pruned}, the weight "
            f"{zeros}",
            where=linear.name,
            remedy="this is a fault in secateur or in a plug-in; please report it",
        )
    check_finite([(f"{linear.name}.weight", weight)])
    return LinearRecord(
        linear.name,
        linear.shape,
        task.sparsity,
        pruned,
        zeros,
        solution.error,
        lost,
        time.perf_counter() - started,
    )
