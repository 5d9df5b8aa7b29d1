"""What is done to one group of linears once the statistics of its input are complete."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.cross_gram import CrossGram
from secateur.calibration.statistics import statistics
from secateur.engine.prune.collapse import lost_energy
from secateur.engine.stream.targets import Target
from secateur.errors import NumericalError, VerificationError
from secateur.models.architecture import Linear, linears_of
from secateur.progress import Progress
from secateur.sparsity.dense_target import dense_target
from secateur.sparsity.methods import Method

__all__ = [
    "GroupStatistics",
    "LinearRecord",
    "all_zero",
    "check_finite",
    "prune_group",
    "refuse_unusable",
]

INPUT_STATISTICS = frozenset({"column_mean", "column_norm", "column_variance", "gram"})


@dataclass(frozen=True)
class LinearRecord:
    """What became of one linear.

    Attributes:
        name: its full name.
        shape: (out, in).
        asked: the sparsity asked of it.
        pruned: how many weights the mask removes.
        zeros: how many weights are zero afterwards (a source may have zeros of its own).
        error: relative squared error of its output on the calibration inputs, where known.
        lost: an estimate of that error where the solver measures none (`engine.prune.collapse`).
        seconds: spent on scoring, masking and solving.
        tokens: how many inputs the linear of an expert saw; None elsewhere, where it is all.
    """

    name: str
    shape: tuple[int, int]
    asked: float
    pruned: int
    zeros: int
    error: float | None
    lost: float | None
    seconds: float
    tokens: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As it is written to the ledger."""
        return asdict(self)


class GroupStatistics:
    """Running statistics of the input that a group of linears shares.

    Attributes:
        tokens: inputs seen so far.
    """

    def __init__(
        self, names: frozenset[str], linear: Linear, device: torch.device, *, wanted: int = 0
    ) -> None:
        self.name, self.tokens = linear.name, 0
        self.running = {
            name: statistics[name](linear.shape[1], device)
            for name in sorted(names & INPUT_STATISTICS)
        }
        self.cross = CrossGram(wanted, linear.shape[1], device) if wanted else None

    def update(self, x: Tensor, wanted: Tensor | None = None) -> None:
        """Add the inputs of one micro-batch, of any leading shape, and what is wanted of them."""
        flat = x.reshape(-1, x.shape[-1])
        self.tokens += len(flat)
        for statistic in self.running.values():
            statistic.update(flat)
        if self.cross is not None:
            assert wanted is not None
            self.cross.update(wanted.reshape(len(flat), -1), flat)

    def value(self) -> dict[str, Tensor]:
        """The statistics so far.

        Raises:
            NumericalError: the inputs overflowed; names the first linear that receives them.
        """
        try:
            return {name: statistic.value() for name, statistic in self.running.items()}
        except NumericalError as error:
            raise NumericalError(error.what, where=self.name, remedy=error.remedy) from None

    def fitted(self, writer: bool, damping: float) -> Callable[[Linear], Tensor]:
        """Gives of each linear the weight [out, in] that is to be pruned.

        Args:
            writer: the outputs wanted of the one linear were gathered, not its dense inputs.
            damping: how strongly the weights that fit are drawn towards the dense ones.
        """
        if self.cross is None:
            return lambda linear: linear.weight
        gram, moments = self.running["gram"].value(), self.cross.value()
        if writer:
            return lambda x: dense_target(gram, moments, x.weight.float(), damping)
        identity = torch.eye(len(gram), device=gram.device)
        shared = dense_target(gram, moments, identity, damping)
        return lambda linear: linear.weight.float() @ shared


def check_finite(linears: Sequence[Linear]) -> None:
    """Refuse weights that are NaN or infinite before work is spent on them.

    Raises:
        NumericalError: naming the tensor and how many values are bad.
    """
    for linear in linears:
        weight = linear.weight
        # One reduction decides; only a bad matrix is looked at in detail.
        if not torch.isfinite(weight.sum(dtype=torch.float32)):
            bad = int((~torch.isfinite(weight)).sum())
            if bad:
                raise NumericalError(
                    f"{bad} of {weight.numel()} weights are NaN or infinite",
                    where=f"{linear.name}.weight",
                    remedy="the checkpoint is damaged: get it again, or mend it before pruning",
                )


def all_zero(linears: Iterable[Linear]) -> list[str]:
    """The names of linears that have no weight other than zero."""
    return [linear.name for linear in linears if not linear.weight.any()]


def refuse_unusable(target: Target, progress: Progress) -> None:
    """Read all matrices once, and refuse those that no run could be finished with.

    Raises:
        NumericalError: a weight is NaN or infinite, or every matrix of every decoder layer is zero.
    """
    count, zero = 0, 0
    progress.start("checking weights", len(target.layers))
    for index in range(len(target.layers)):
        with target.layer(index) as layer:
            linears = list(linears_of(layer, target.architecture.layer_name(index)).values())
            check_finite(linears)
            count, zero = count + len(linears), zero + len(all_zero(linears))
        progress.step(note=f"layer {index}")
    progress.finish()
    if zero == count > 0:
        raise NumericalError(
            f"all {count} matrices of the decoder are zero",
            where=target.architecture.layers_path,
            remedy="the checkpoint holds no trained weights: get it again",
        )


def prune_group(
    linears: Sequence[Linear],
    shared: Mapping[str, Tensor],
    own: Callable[[Linear], Mapping[str, Tensor]],
    method_for: Callable[[str], Method],
    sparsity_of: Mapping[str, float],
    fitted: Callable[[Linear], Tensor] = lambda linear: linear.weight,
) -> list[LinearRecord]:
    """Prune linears that share an input.

    Args:
        linears: the linears to work on.
        shared: statistics of their input.
        own: statistics of each linear itself (gradient, fisher).
        method_for: how, by the name of a linear; they differ in the pattern only.
        sparsity_of: the sparsity of each linear, by name.
        fitted: gives the weight [out, in] that is pruned in the place of a linear's own.
    """
    if not linears:
        return []
    prepared = method_for(linears[0].name).solver.prepare(shared)
    records = []
    for linear in linears:
        started = time.perf_counter()
        method = method_for(linear.name)
        sparsity = sparsity_of[linear.name]
        weight = fitted(linear)
        mask = None
        if not method.solver_selects:
            known = {**shared, **own(linear), "stored": linear.weight}
            mask = method.mask(weight, known, sparsity)
        solution = method.solver.solve(weight, prepared, method.pattern, sparsity, mask=mask)
        lost = lost_energy(weight, solution.mask, shared) if solution.error is None else None
        linear.assign(solution.weight)
        if solution.shift is not None:
            linear.shift(solution.shift)
        records.append(verified(linear, method, sparsity, solution, lost, started))
    return records


def verified(
    linear: Linear,
    method: Method,
    sparsity: float,
    solution: Any,
    lost: float | None,
    started: float,
) -> LinearRecord:
    """Count the zeros of a linear as stored, against what its pattern promises.

    Raises:
        VerificationError: fewer zeros than asked, or not finite.
    """
    weight = linear.weight
    expected = method.pattern.pruned(linear.shape, sparsity)
    pruned = weight.numel() - int(solution.mask.sum())
    zeros = weight.numel() - int(torch.count_nonzero(weight))
    if pruned != expected or zeros < expected:
        raise VerificationError(
            f"{expected} zeros were asked for, the mask has {pruned}, the weight {zeros}",
            where=linear.name,
            remedy="this is a fault in secateur or in a plug-in; please report it",
        )
    if not torch.isfinite(weight.sum(dtype=torch.float32)):
        check_finite([linear])
    return LinearRecord(
        linear.name,
        linear.shape,
        sparsity,
        pruned,
        zeros,
        solution.error,
        lost,
        time.perf_counter() - started,
    )
