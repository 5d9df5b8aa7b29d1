"""The operator through which packed linears multiply.

`torch.ops.secateur.linear` takes a tensor and the number of a module. torch.compile does not trace
into it, and engines that compile a model can capture what it launches.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

import torch
from torch import Tensor


class Multiplies(Protocol):
    """A linear without its bias."""

    def product(self, x: Tensor) -> Tensor:
        """The product x Wᵀ [tokens, out] for activations [tokens, in]."""
        ...


_numbers = itertools.count(1)
_linears: weakref.WeakValueDictionary[int, Multiplies] = weakref.WeakValueDictionary()
"""Modules by number, because the operator accepts only tensors and numbers."""

_operators = torch.library.Library("secateur", "DEF")
_operators.define("linear(Tensor x, int module, int out_features) -> Tensor")


@torch.no_grad()  # a caller who needs gradients of other parts may have enabled them
def _linear(x: Tensor, module: int, out_features: int) -> Tensor:
    return _linears[module].product(x)


_operators.impl("linear", _linear, "CPU")
_operators.impl("linear", _linear, "CUDA")
torch.library.register_fake(
    "secateur::linear",
    lambda x, module, out_features: x.new_empty((x.shape[0], out_features)),
    lib=_operators,
)


def numbered(linear: Multiplies) -> int:
    """A number for a module, under which the operator finds it while it is alive."""
    number = next(_numbers)
    _linears[number] = linear
    return number
