"""Statistics: what must be known of a linear's inputs, gathered while tokens stream by.

A statistic takes the inputs of one linear batch by batch, can be merged with one gathered
elsewhere (another process, another share of the tokens), and gives its value at the end. It
keeps no tokens, so its memory does not grow with them. One file each.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch
from torch import Tensor

from secateur.errors import NumericalError
from secateur.registry import Registry
from secateur.types import Inputs

__all__ = ["Statistic", "check_finite", "statistics"]

S = TypeVar("S", bound="Statistic")


class Statistic(Protocol):
    """The contract of a statistic."""

    total: Tensor
    """The running sum: what merging adds up, and what processes may all-reduce."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None: ...

    def update(self, x: Inputs) -> None:
        """Take in the inputs of more tokens, [tokens, in], any floating dtype."""
        ...

    def merge(self: S, other: S) -> None:
        """Take in all that `other` has seen; `other` is not changed."""
        ...

    def value(self) -> Tensor:
        """The statistic over all tokens so far, float32."""
        ...


statistics: Registry[type[Statistic]] = Registry("statistic", __name__)


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
