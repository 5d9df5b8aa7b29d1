"""Running statistics of the input that a group of linears shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from secateur.calibration.cross_gram import CrossGram
from secateur.calibration.statistics import of_inputs, statistics
from secateur.errors import NumericalError
from secateur.models.architecture import Linear
from secateur.parallel.ranks import Ranks
from secateur.sparsity.hessian import dense_target

HELD_SHARE = 4
"""One token in so many is kept apart."""


class GroupStatistics:
    """Running statistics of the input that a group of linears shares.

    Args:
        names: names of the statistics. The gradient pass gathers the statistics of gradients.
        linear: the first linear of the group.
        device: device of the sums.
        target_size: size of the group's target for one token; 0 for no target.
        held_out: keep a quarter of the tokens of each micro-batch apart, until `take_in`.

    Attributes:
        tokens: number of inputs so far.
        held: the statistics of the tokens that are kept apart.
    """

    def __init__(
        self,
        names: Iterable[str],
        linear: Linear,
        device: torch.device,
        *,
        target_size: int = 0,
        held_out: bool = False,
    ) -> None:
        self.name, self.tokens = linear.name, 0
        self.running = {
            name: statistics[name](linear.shape, device) for name in sorted(of_inputs(names))
        }
        self.cross = CrossGram(target_size, linear.shape[1], device) if target_size else None
        self.held: GroupStatistics | None = None
        if held_out and target_size:
            self.held = GroupStatistics(names, linear, device, target_size=target_size)

    def update(self, x: Tensor, target: Tensor | None = None) -> None:
        """Add the inputs of one micro-batch, with any leading shape, and their targets."""
        flat = x.reshape(-1, x.shape[-1])
        if self.held is not None:
            assert target is not None
            target, rest = target.reshape(len(flat), -1), len(flat) - len(flat) // HELD_SHARE
            self.held.update(flat[rest:], target[rest:])
            flat, target = flat[:rest], target[:rest]
        self.tokens += len(flat)
        for statistic in self.running.values():
            statistic.update(flat)
        if self.cross is not None:
            assert target is not None
            self.cross.update(target.reshape(len(flat), -1), flat)

    def merge(self, ranks: Ranks) -> None:
        """Add up the statistics that the processes have gathered, each from its own windows.

        Each sum passes alone, so no process holds more than one copy of one sum besides its own.
        """
        self.tokens = sum(ranks.gather(self.tokens))
        for statistic in self.running.values():
            ranks.total(statistic.total)
        if self.cross is not None:
            ranks.total(self.cross.total)
        if self.held is not None:
            self.held.merge(ranks)

    def take_in(self) -> None:
        """Add the statistics of the tokens that were kept apart."""
        held, self.held = self.held, None
        assert held is not None
        assert held.cross is not None
        assert self.cross is not None
        self.tokens += held.tokens
        for name, statistic in self.running.items():
            statistic.merge(held.running[name])
        self.cross.total += held.cross.total

    def value(self) -> dict[str, Tensor]:
        """The statistics so far.

        Raises:
            NumericalError: the inputs overflowed; the message names the first linear that reads
                them.
        """
        try:
            return {name: statistic.value() for name, statistic in self.running.items()}
        except NumericalError as error:
            raise NumericalError(error.what, where=self.name, remedy=error.remedy) from None

    def fitted(self, writer: bool, damping: float) -> Callable[[Linear], Tensor]:
        """Return a function that gives the weight [out, in] to prune for each linear.

        That is the linear's own weight, or the weight that fits the targets best.

        Args:
            writer: whether the targets are outputs of the only linear, not its dense inputs.
            damping: strength of the pull towards the dense weights.
        """
        if self.cross is None:
            return lambda linear: linear.weight
        gram, moments = self.running["gram"].value(), self.cross.value()
        if writer:
            return lambda x: dense_target(gram, moments, x.weight.float(), damping)
        identity = torch.eye(len(gram), device=gram.device)
        shared = dense_target(gram, moments, identity, damping)
        return lambda linear: linear.weight.float() @ shared
