"""Prunes one group of linears: statistics of its input, weights, records, checks.

A linear has collapsed when it has lost four fifths of the energy of its output, a relative error
of 0.9. Solvers that repair weights measure that error. For solvers that only set weights to zero,
the norms of the inputs give an estimate that assumes uncorrelated inputs (`lost_energy`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from secateur.calibration.cross_gram import CrossGram
from secateur.calibration.statistics import ForwardSource, Statistic, statistics
from secateur.engine.prune.tasks import LinearTask
from secateur.engine.stream.targets import Target, walk_layers
from secateur.errors import NumericalError, VerificationError
from secateur.models.architecture import Linear, linears_of
from secateur.models.checkpoint import not_finite
from secateur.parallel.ranks import Ranks
from secateur.runs.records import LinearRecord
from secateur.sparsity.hessian import dense_target
from secateur.sparsity.solvers import Solution
from secateur.types import STORED, Mask, Statistics, Weight

HELD_SHARE = 4
"""One token in so many is kept apart."""

DAMPINGS = (0.05, 0.2, 0.8, 3.2)
"""The values that are tried, as fractions of the mean diagonal of the gram."""

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

    def __init__(
        self, sources: Mapping[str, ForwardSource], linears: Sequence[Linear], device: torch.device
    ) -> None:
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


class TargetStatistics(GroupStatistics):
    """Running statistics of the input of a group, and of the outputs that it should have.

    The gram must be among the statistics.

    Args:
        sources: sources of the statistics, by their names.
        linears: the linears of the group.
        device: device of the sums.
        target_size: size of the group's target for one token.
        held_out: keep a quarter of the tokens of each micro-batch apart, until `take_in`.

    Attributes:
        held: the statistics of the tokens that are kept apart.
    """

    def __init__(
        self,
        sources: Mapping[str, ForwardSource],
        linears: Sequence[Linear],
        device: torch.device,
        target_size: int,
        *,
        held_out: bool = False,
    ) -> None:
        super().__init__(sources, linears, device)
        self.cross = CrossGram(target_size, linears[0].shape[1], device)
        self.held = TargetStatistics(sources, linears, device, target_size) if held_out else None

    def add(self, x: Tensor, target: Tensor) -> None:
        """Add the inputs of one micro-batch, with any leading shape, and their targets."""
        flat = x.reshape(-1, x.shape[-1])
        target = target.reshape(len(flat), -1)
        if self.held is not None:
            rest = len(flat) - len(flat) // HELD_SHARE
            self.held.add(flat[rest:], target[rest:])
            flat, target = flat[:rest], target[:rest]
        self.update(flat)
        self.cross.update(target, flat)

    def merge(self, ranks: Ranks) -> None:
        """Add up the statistics that the processes have gathered, each from its own windows."""
        super().merge(ranks)
        ranks.total(self.cross.total)
        if self.held is not None:
            self.held.merge(ranks)

    def take_in(self) -> None:
        """Add the statistics of the tokens that were kept apart, if there are any."""
        held, self.held = self.held, None
        if held is None:
            return
        self.tokens += held.tokens
        for statistic, part in zip(self.every(), held.every(), strict=True):
            statistic.merge(part)
        self.cross.total += held.cross.total

    def fitted(self, writer: bool, damping: float) -> Callable[[Linear], Tensor]:
        """Return a function that gives the weight [out, in] that fits a linear's targets best.

        Args:
            writer: whether the targets are outputs of the only linear, not its dense inputs.
            damping: strength of the pull towards the dense weights.
        """
        gram, moments = self.running["gram"].value(), self.cross.value()
        if writer:
            return lambda x: dense_target(gram, moments, x.weight.float(), damping)
        identity = torch.eye(len(gram), device=gram.device)
        shared = dense_target(gram, moments, identity, damping)
        return lambda linear: linear.weight.float() @ shared


def choose_dampings(
    statistics: TargetStatistics,
    linears: Sequence[Linear],
    tasks: Mapping[str, LinearTask],
    own: Callable[[Linear], Mapping[str, Tensor]],
    writer: bool,
) -> dict[str, float]:
    """Return the damping with the smallest error on held-out tokens for each linear of a group.

    With G and M the moments of the fitted tokens, and G', M' those of the held-out ones,

        Ŵ_λ = the pruned W*_λ, W*_λ = (M + λW)(G + λI)⁻¹          `sparsity.hessian.dense_target`
        λ   = argmin  ‖T' − Ŵ_λX̂'‖² = tr(Ŵ_λ G' Ŵ_λᵀ) − 2 tr(Ŵ_λ M'ᵀ) + rest

    The moments say the error of any weights, so each λ costs a solve and no forward.

    Args:
        statistics: the statistics of the group, with held-out tokens; not changed.
        linears: the linears that are solved.
        tasks: tasks of the linears, by name.
        own: returns the statistics of a linear's own gradients.
        writer: whether the targets are outputs of the only linear, not its dense inputs.
    """
    fit, held = copy.copy(statistics), copy.deepcopy(statistics.held)
    fit.held = None
    fit = copy.deepcopy(fit)  # `value` takes the place of the sums, which are needed again
    assert held is not None
    shared, gram, cross = fit.value(), held.value()["gram"], held.cross.value()
    prepared = tasks[linears[0].name].method.solver.prepare(shared)
    found = {}
    for linear in linears:
        task = tasks[linear.name]
        known = {**shared, **fit.own(linear), **own(linear), STORED: linear.weight}
        moments = cross if writer else linear.weight.float() @ cross
        errors = {}
        for damping in DAMPINGS:
            target = fit.fitted(writer, damping)(linear)
            solution = task.method.solve(target, prepared, known, task.sparsity)
            errors[damping] = _held_out_error(solution.weight, gram, moments)
        found[linear.name] = min(errors, key=errors.__getitem__)
    return found


def _held_out_error(weight: Tensor, gram: Tensor, moments: Tensor) -> float:
    """‖T − WX‖² − ‖T‖² = tr(W G Wᵀ) − 2 tr(W Mᵀ), with G = XXᵀ and M = TXᵀ in float32."""
    inner = (weight @ gram).sub_(moments, alpha=2.0)
    return float((inner * weight).sum())


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
