"""What is gathered of a group of linears: statistics of their shared input, and their target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.calibration.statistics import Sources, Statistic, statistics
from secateur.errors import located
from secateur.models.architecture import Linear
from secateur.parallel.ranks import Ranks
from secateur.sparsity.hessian import dense_target

_ROWS = 512  # the largest float32 product besides the sums of a cross gram


class CrossGram:
    """M = Σ_t y_t x̂_tᵀ, float32 [rows, in]: y_t in the dense model, x̂_t in the pruned one.

    Products are float32 and their sums float64, as in `Gram`.

    Args:
        rows: the size of y, which is inputs or outputs of the linear.
        in_features: the number of input features.
        device: where the sums are kept and computed.
        of_outputs: whether y is the output that the only linear of a group should have. Else it is
            the dense input of all its linears.
    """

    def __init__(
        self,
        rows: int,
        in_features: int,
        device: torch.device | str = "cpu",
        *,
        of_outputs: bool = False,
    ) -> None:
        self.of_outputs = of_outputs
        self.total = torch.zeros(rows, in_features, dtype=torch.float64, device=device)

    def update(self, target: Float[Tensor, "tokens rows"], x: Float[Tensor, "tokens in"]) -> None:
        """Add y and x̂ of the same tokens, some rows of y at a time."""
        targets, inputs = target.detach().float(), x.detach().float()
        for columns, sums in zip(targets.split(_ROWS, 1), self.total.split(_ROWS), strict=True):
            sums += columns.t() @ inputs

    def value(self) -> Float[Tensor, "rows in"]:
        """M, float32. It takes the place of the sums."""
        self.total = self.total.float()
        return self.total


class GroupStatistics:
    """Running statistics of a group of linears that share an input.

    Args:
        sources: sources of the statistics, by their names.
        linears: the linears of the group.
        device: device of the sums.
        cross: the products of inputs and targets, which need the gram among the statistics; None
            where the target of a linear is its own output.

    Attributes:
        tokens: number of inputs so far.
    """

    def __init__(
        self,
        sources: Sources,
        linears: Sequence[Linear],
        device: torch.device,
        cross: CrossGram | None = None,
    ) -> None:
        self.sources, self.linears, self.cross, self.tokens = sources, linears, cross, 0
        shared = [name for name, source in sources.items() if source.shared]
        own = sorted(sources.keys() - shared)  # one statistic for each linear
        self._shared = {name: statistics[name](linears[0].shape, device) for name in shared}
        self._own = {x.name: {n: statistics[n](x.shape, device) for n in own} for x in linears}

    def update(self, x: Tensor, target: Tensor | None = None) -> None:
        """Add the inputs of one micro-batch, with any leading shape, and their targets if any."""
        flat = x.reshape(-1, x.shape[-1])
        self.tokens += len(flat)
        for name, statistic in self._shared.items():
            statistic.update(self.sources[name].rows(self.linears[0], flat))
        for linear in self.linears:
            for name, statistic in self._own[linear.name].items():
                statistic.update(self.sources[name].rows(linear, flat))
        if self.cross is not None and target is not None:
            self.cross.update(target.reshape(-1, target.shape[-1]), flat)

    def merge(self, ranks: Ranks) -> None:
        """Add up the statistics that the processes have gathered, each from its own windows.

        Each sum passes alone, so no process holds more than one copy of one sum besides its own.
        """
        self.tokens = sum(ranks.gather(self.tokens))
        every: list[Statistic | CrossGram] = [*self._shared.values()]
        every += (statistic for own in self._own.values() for statistic in own.values())
        for statistic in (*every, self.cross):  # in the same order in every process
            if statistic is not None:
                ranks.total(statistic.total)

    def value(self) -> dict[str, Tensor]:
        """The statistics that the group shares.

        Raises:
            NumericalError: the inputs overflowed; the message names the first linear that reads
                them.
        """
        return _values(self.linears[0], self._shared)

    def own(self, linear: Linear) -> dict[str, Tensor]:
        """The statistics that a linear of the group has for itself.

        Raises:
            NumericalError: its numbers overflowed.
        """
        return _values(linear, self._own[linear.name])

    def weights(self, damping: float) -> Callable[[Linear], Tensor]:
        """Return a function that gives the weight [out, in] to prune in place of a linear's own.

        It is its own weight, or the one that fits its target best.

        Args:
            damping: strength of the pull of a fit towards the dense weights.
        """
        if self.cross is None:
            return lambda linear: linear.weight
        gram, moments = self._shared["gram"].value(), self.cross.value()
        if self.cross.of_outputs:
            return lambda linear: dense_target(gram, moments, linear.weight.float(), damping)
        # A fit of the dense inputs serves all linears: [in, in], with W on its left.
        identity = torch.eye(len(gram), device=gram.device)
        shared = dense_target(gram, moments, identity, damping)
        return lambda linear: linear.weight.float() @ shared

    def release(self) -> None:
        """Forget the sums that the group shares. Values that were read stay."""
        self._shared.clear()
        self.cross = None


def _values(linear: Linear, gathered: Mapping[str, Statistic]) -> dict[str, Tensor]:
    with located(linear.name):
        return {name: statistic.value() for name, statistic in gathered.items()}
