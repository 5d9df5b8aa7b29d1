"""Statistics: what must be known of a linear, gathered while calibration streams by.

A statistic takes batch after batch, can be merged with one gathered elsewhere (another process,
another share of the tokens), and returns its value at the end. It keeps no tokens, so its memory
does not grow with them. One file each.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.errors import NumericalError
from secateur.registry import Registry
from secateur.types import STORED, Weight

__all__ = ["GradientMean", "Statistic", "check_finite", "of_gradients", "of_inputs", "statistics"]

S = TypeVar("S", bound="Statistic")


class Statistic(Protocol):
    """The contract of a statistic.

    Args:
        shape: (out, in) of the linear's weight.
        device: where the sums are kept and computed.
    """

    reads: ClassVar[Literal["inputs", "gradients"]]
    """What it is updated with: the inputs of the linear, or the gradients of its weight."""

    total: Tensor
    """The running sum: what merging adds up, and what processes may all-reduce."""

    def __init__(self, shape: tuple[int, int], device: torch.device | str = "cpu") -> None: ...

    def update(self, x: Float[Tensor, "rows in"]) -> None:
        """Add one batch, of any floating dtype: inputs [tokens, in], or a gradient [out, in]."""
        ...

    def merge(self: S, other: S) -> None:
        """Add all that `other` has seen; `other` is not changed."""
        ...

    def value(self) -> Tensor:
        """The statistic over everything so far, float32; afterwards nothing is added any more."""
        ...

    @staticmethod
    def nbytes(shape: tuple[int, int]) -> int:
        """Bytes that it holds for a weight of this shape, (out, in)."""
        ...


class GradientMean:
    """The mean over windows of something of their gradients: the base of statistics of gradients.

    Args:
        shape: (out, in) of the weight.
        device: where the sums are kept and computed.
    """

    reads: ClassVar[Literal["inputs", "gradients"]] = "gradients"

    def __init__(self, shape: tuple[int, int], device: torch.device | str = "cpu") -> None:
        # the last number counts the windows, so that all-reducing `total` merges both
        self.total = torch.zeros(shape[0] * shape[1] + 1, device=device)
        self.sum = self.total[:-1].view(shape)

    def merge(self, other: GradientMean) -> None:
        """Add what `other` has seen."""
        self.total += other.total.to(self.total.device)

    def value(self) -> Weight:
        """The mean, float32 [out, in]; 0 before any window."""
        return self.sum / max(int(self.total[-1]), 1)

    @staticmethod
    def nbytes(shape: tuple[int, int]) -> int:
        """Four bytes for each weight."""
        return 4 * shape[0] * shape[1]


statistics: Registry[type[Statistic]] = Registry("statistic", __name__)


def of_inputs(names: Iterable[str]) -> frozenset[str]:
    """Those of the names that are statistics of inputs: a forward gathers them.

    Raises:
        RecipeError: a name is unknown.
    """
    return _reading("inputs", names)


def of_gradients(names: Iterable[str]) -> frozenset[str]:
    """Those of the names that are statistics of gradients: a backward gathers them.

    Raises:
        RecipeError: a name is unknown.
    """
    return _reading("gradients", names)


def _reading(source: str, names: Iterable[str]) -> frozenset[str]:
    return frozenset(n for n in names if n != STORED and statistics[n].reads == source)


def check_finite(square_sums: Tensor) -> None:
    """Refuse inputs that overflowed, seen in their sums of squares [in].

    Raises:
        NumericalError: a sum is infinite or NaN.
    """
    bad = (~torch.isfinite(square_sums)).nonzero()[:, 0]
    if len(bad):
        raise NumericalError(
            f"{len(bad)} of {len(square_sums)} calibration inputs are infinite or not a number; "
            f"the first is feature {int(bad[0])}",
            remedy="load the model in bfloat16 or float32, which do not overflow as float16 does",
        )
