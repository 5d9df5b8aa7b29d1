"""Running statistics of the input that a group of linears shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from secateur.calibration.cross_gram import CrossGram
from secateur.calibration.statistics import of_inputs, statistics
from secateur.errors import NumericalError
from secateur.models.architecture import Linear
from secateur.sparsity.dense_target import dense_target

__all__ = ["GroupStatistics"]


class GroupStatistics:
    """Running statistics of the input that a group of linears shares.

    Args:
        names: of the statistics; those of gradients are left to the gradient pass.
        linear: the first of the group.
        device: where the sums are kept and computed.
        target_size: numbers that a target of the group has for one token; 0 for no target.

    Attributes:
        tokens: inputs seen so far.
    """

    def __init__(
        self,
        names: Iterable[str],
        linear: Linear,
        device: torch.device,
        *,
        target_size: int = 0,
    ) -> None:
        self.name, self.tokens = linear.name, 0
        self.running = {
            name: statistics[name](linear.shape, device) for name in sorted(of_inputs(names))
        }
        self.cross = CrossGram(target_size, linear.shape[1], device) if target_size else None

    def update(self, x: Tensor, target: Tensor | None = None) -> None:
        """Add the inputs of one micro-batch, of any leading shape, and their targets."""
        flat = x.reshape(-1, x.shape[-1])
        self.tokens += len(flat)
        for statistic in self.running.values():
            statistic.update(flat)
        if self.cross is not None:
            assert target is not None
            self.cross.update(target.reshape(len(flat), -1), flat)

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
        """A function that returns, for each linear, the weight [out, in] to prune.

        That is the linear's own weight, or the weight that best gives the targets.

        Args:
            writer: the targets are outputs of the one linear, not its inputs in the dense model.
            damping: how strongly the fit is drawn towards the dense weights.
        """
        if self.cross is None:
            return lambda linear: linear.weight
        gram, moments = self.running["gram"].value(), self.cross.value()
        if writer:
            return lambda x: dense_target(gram, moments, x.weight.float(), damping)
        identity = torch.eye(len(gram), device=gram.device)
        shared = dense_target(gram, moments, identity, damping)
        return lambda linear: linear.weight.float() @ shared
