"""Prunes one group of linears: statistics of its input, weights, records, checks.

A linear has collapsed when it has lost four fifths of the energy of its output, a relative error
of 0.9. Solvers that repair weights measure that error. For solvers that only set weights to zero,
the norms of the inputs give an estimate that assumes uncorrelated inputs (`lost_energy`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from secateur.calibration.statistics import Sources, Statistic, statistics
from secateur.engine.prune.tasks import LinearTask
from secateur.engine.stream.targets import Target, walk_layers
from secateur.errors import NumericalError, VerificationError
from secateur.models.architecture import Linear, linears_of
from secateur.models.checkpoint import not_finite
from secateur.parallel.ranks import Ranks
from secateur.runs.records import LinearRecord
from secateur.sparsity.solvers import Solution
from secateur.types import STORED, Mask, Statistics, Weight

COLLAPSED = 0.8
"""A linear has collapsed if it lost more than this share of its output's energy."""


class GroupStatistics:
    """Running statistics of a group of linears that share an input.

    Args:
        sources: sources of the statistics, by their names.
        linears: the linears of the group.
        device: device of the sums.

    Attributes:
        tokens: number of inputs so far.
        running: the statistics that all linears of the group share, by name.
        apart: the others, by the name of the linear and that of the statistic.
    """

    def __init__(self, sources: Sources, linears: Sequence[Linear], device: torch.device) -> None:
        self.sources, self.linears, self.tokens = sources, linears, 0
        shared = [name for name, source in sources.items() if source.shared]
        own = sources.keys() - shared
        self.running = {name: statistics[name](linears[0].shape, device) for name in shared}
        self.apart = {
            x.name: {name: statistics[name](x.shape, device) for name in sorted(own)}
            for x in linears
        }

    def update(self, x: Tensor) -> None:
        """Add the inputs of one micro-batch, with any leading shape."""
        flat = x.reshape(-1, x.shape[-1])
        self.tokens += len(flat)
        for name, statistic in self.running.items():
            statistic.update(self.sources[name].rows(self.linears[0], flat))
        for linear in self.linears:
            for name, statistic in self.apart[linear.name].items():
                statistic.update(self.sources[name].rows(linear, flat))

    def every(self) -> list[Statistic]:
        """All statistics, in an order that is the same in every process."""
        return [*self.running.values(), *(x for own in self.apart.values() for x in own.values())]

    def merge(self, ranks: Ranks) -> None:
        """Add up the statistics that the processes have gathered, each from its own windows.

        Each sum passes alone, so no process holds more than one copy of one sum besides its own.
        """
        self.tokens = sum(ranks.gather(self.tokens))
        for statistic in self.every():
            ranks.total(statistic.total)

    def value(self) -> dict[str, Tensor]:
        """The statistics that the group shares.

        Raises:
            NumericalError: the inputs overflowed; the message names the first linear that reads
                them.
        """
        return _values(self.linears[0], self.running)

    def own(self, linear: Linear) -> dict[str, Tensor]:
        """The statistics that a linear of the group has for itself.

        Raises:
            NumericalError: its numbers overflowed.
        """
        return _values(linear, self.apart[linear.name])

    def release(self) -> None:
        """Forget the sums. Values that were read stay."""
        self.running.clear()


def _values(linear: Linear, gathered: Mapping[str, Statistic]) -> dict[str, Tensor]:
    try:
        return {name: statistic.value() for name, statistic in gathered.items()}
    except NumericalError as error:
        raise NumericalError(error.what, where=linear.name, remedy=error.remedy) from None


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
        records.append(_verify(linear, task, solution, lost, started))
    return records


def _verify(
    linear: Linear, task: LinearTask, solution: Solution, lost: float | None, started: float
) -> LinearRecord:
    """Compare the stored zeros of a linear with the number that its pattern requires."""
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
        name=linear.name,
        shape=linear.shape,
        asked=task.sparsity,
        pruned=pruned,
        zeros=zeros,
        error=solution.error,
        lost=lost,
        seconds=time.perf_counter() - started,
    )


def exchange(
    linears: Sequence[Linear],
    owners: Sequence[int],
    own: Sequence[LinearRecord],
    ranks: Ranks,
) -> list[LinearRecord]:
    """Give every process the pruned linears of the others. Return the records of all.

    Args:
        linears: the linears that the processes have pruned.
        owners: the process that has pruned each.
        own: the records of this process.
        ranks: the processes.
    """
    gathered = ranks.gather([record.to_json() for record in own])
    by_name = {entry["name"]: entry for entries in gathered for entry in entries}
    for linear, owner in zip(linears, owners, strict=True):
        for parameter in linear.module.parameters(recurse=False):
            ranks.share(parameter, owner)
    return [LinearRecord.model_validate(by_name[linear.name]) for linear in linears]


def lost_energy(weight: Weight, mask: Mask, statistics: Statistics) -> float | None:
    """The share of its output's energy that a linear loses; None without statistics of the inputs.

    lost = Σ over pruned w² ‖X_j‖² / Σ over all w² ‖X_j‖²
    """
    if "column_norm" in statistics:
        power = statistics["column_norm"].square()
    elif "gram" in statistics:
        power = statistics["gram"].diagonal()
    else:
        return None
    energy = weight.detach().float().square() * power
    total = float(energy.sum())
    return float(energy.masked_fill(mask, 0.0).sum()) / total if total > 0 else None


def collapsed(records: Sequence[LinearRecord]) -> dict[str, float]:
    """The collapsed linears, with their lost energy."""
    known = {r.name: r.lost if r.error is None else r.error for r in records}
    # an error that is not a number counts as the largest
    return {n: lost for n, lost in known.items() if lost is not None and not lost <= COLLAPSED}


def format_collapsed(lost: Mapping[str, float]) -> str:
    """Describe the collapsed linears of a layer in one line."""
    return ", ".join(f"{name} lost {share:.1%} of its output" for name, share in lost.items())


def collapse_error(layer: str, lost: Mapping[str, float]) -> VerificationError:
    """The error that ends a run after a collapsed layer."""
    return VerificationError(
        f"the layer has collapsed: {format_collapsed(lost)}",
        where=layer,
        remedy="start anew with --restart and a lower --sparsity, or less for this layer "
        f"(--overrides '{layer}.*=0.3'); the finished layers were kept, and --resume "
        "--on-collapse warn goes on with the same sparsity",
    )


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
