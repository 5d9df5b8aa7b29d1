"""A statistic of another kind: of the outputs of a linear, with a score that reads it."""

from typing import ClassVar

import torch
from torch import Tensor

from quince import MIB
from secateur.calibration.statistics import ForwardSource, StatisticSource, statistics
from secateur.models.architecture import Linear
from secateur.sparsity.scores import score
from secateur.types import Score, Statistics, Weight


class OutputSource(ForwardSource):
    """The outputs of a linear before it is pruned, [tokens, out], without its bias."""

    name = "outputs"

    def rows(self, linear: Linear, x: Tensor) -> Tensor:
        """The outputs for inputs [tokens, in]."""
        return x @ linear.weight.t()


@statistics.register("quince-output")
class OutputNorm:
    """‖y_i‖₂ over all tokens, float32 [out]."""

    source: ClassVar[StatisticSource] = OutputSource()

    def __init__(self, shape: tuple[int, int], device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(shape[0], dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> None:
        """Add the outputs of more tokens, [tokens, out]."""
        self.total += x.detach().double().square().sum(0)

    def merge(self, other: "OutputNorm") -> None:
        """Add all that `other` has seen."""
        self.total += other.total.to(self.total.device)

    def value(self) -> Tensor:
        """The norms, float32 [out]."""
        return self.total.sqrt().float()

    @staticmethod
    def nbytes(shape: tuple[int, int]) -> int:
        """2 MiB."""
        return 2 * MIB


@score(requires={"quince-output"}, working_bytes=lambda shape: 8 * shape[0] * shape[1])
def quince_output(weight: Weight, statistics: Statistics) -> Score:
    """S_ij = |W_ij| · ‖y_i‖, float32 [out, in]."""
    return weight.detach().float().abs() * statistics["quince-output"][:, None]
