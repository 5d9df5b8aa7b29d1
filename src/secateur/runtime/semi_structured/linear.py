"""A linear on a GPU that takes each way to multiply only where it was measured to be faster.

| way        | what it does                                                 | tokens |
|------------|--------------------------------------------------------------|--------|
| dense      | torch's dense product                                        | any    |
| CUTLASS    | torch's 2:4 product on sparse tensor cores, by CUTLASS       | any    |
| cuSPARSELt | the same by cuSPARSELt, where torch has it                   | any    |
| Triton     | our kernel on the parts of CUTLASS, without tensor cores     | 1 to 4 |
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import ShapeError
from secateur.runtime.kernels.gpu.timing import Call, Clock, Fastest, race
from secateur.runtime.semi_structured.layout import StoredParts, lifted

DENSE, CUTLASS, CUSPARSELT, TRITON = "dense", "CUTLASS", "cuSPARSELt", "Triton"
LIBRARIES = (CUTLASS, CUSPARSELT)
FEW = 4
"""The most tokens of our kernel."""

TRIED = (1, FEW, 16, 64, 256, 1024, 4096)
"""Tokens of a product that are tried: decoding, and prompts."""


class Form(Protocol):
    """A weight as a way takes it."""

    @property
    def nbytes(self) -> int:
        """Its memory."""
        ...

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product of activations [tokens, in] and the weight, with a bias [out]."""
        ...


@dataclass(frozen=True)
class DenseForm:
    """W itself."""

    weight: Tensor

    @property
    def nbytes(self) -> int:
        """Its memory."""
        return self.weight.nbytes

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """By torch."""
        return functional.linear(x, self.weight, bias)


@dataclass(frozen=True)
class WideForm:
    """The wide matrix as a tensor of a library for sparse tensor cores."""

    weight: Tensor
    columns: Tensor | None
    nbytes: int

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """By torch, which calls the library."""
        return functional.linear(lifted(x, self.columns), self.weight, bias)


@dataclass(frozen=True)
class PartsForm:
    """The parts as they are stored."""

    parts: StoredParts

    @property
    def nbytes(self) -> int:
        """Their memory."""
        return self.parts.nbytes

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """By our kernel."""
        from secateur.runtime.kernels.gpu.two_of_four_kernel import multiply_two_of_four

        y = multiply_two_of_four(x, self.parts.packed, self.parts.meta, self.parts.columns)
        return y if bias is None else y + bias


class SparseLinear(nn.Module):
    """y = x Wᵀ + b by the fastest way for the number of tokens; for inference.

    Where dense is faster for some numbers of tokens and sparse for others, both forms are held: 25
    bits for each weight of a 2:4 matrix, 29.5 for a 6:8 one. CUTLASS and our kernel share theirs.

    Args:
        parts: W [out, in].
        bias: b [out], or None.
        fastest: which way to take.
        forms: the weight for each way that `fastest` uses.
    """

    def __init__(
        self, parts: StoredParts, bias: Tensor | None, fastest: Fastest, forms: Mapping[str, Form]
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = parts.in_features, len(parts.packed)
        self.dtype = parts.packed.dtype
        self.fastest, self.forms = fastest, dict(forms)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """The product for activations [..., in] of the dtype of W.

        Raises:
            ShapeError: the activations do not fit.
        """
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"x {list(x.shape)} for a linear of {self.in_features} inputs")
        tokens = x.reshape(-1, self.in_features)
        if len(tokens) == 0:
            return x.new_empty(*x.shape[:-1], self.out_features)
        y = self.forms[self.fastest.way(len(tokens))].multiply(tokens, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    @property
    def nbytes(self) -> int:
        """The memory of W in all forms; CUTLASS and our kernel share theirs."""
        sizes = {way: form.nbytes for way, form in self.forms.items()}
        if CUTLASS in sizes:
            sizes.pop(TRITON, None)
        return sum(sizes.values())

    @property
    def weight(self) -> Tensor:
        """Shape and dtype without values, for model code that reads them."""
        shape = self.out_features, self.in_features
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def extra_repr(self) -> str:
        """Shape and ways, for printing."""
        ways = ", ".join(f"{tokens}: {way}" for tokens, way in self.fastest.ways.items())
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bias={self.bias is not None}, by tokens: {ways}"


def chosen_linear(parts: StoredParts, bias: Tensor | None, fastest: Fastest) -> nn.Module:
    """A linear with the forms that it needs; an `nn.Linear` if sparse is never faster."""
    if fastest.used != {DENSE}:
        forms = {way: form(way, parts) for way in sorted(fastest.used)}
        return SparseLinear(parts, bias, fastest, forms)
    plain = nn.Linear(parts.in_features, len(parts.packed), bias is not None, device="meta")
    plain.weight = nn.Parameter(parts.dense, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias, requires_grad=False)
    return plain


def measured(parts: StoredParts, clock: Clock | None = None) -> Fastest:
    """Time all ways, in turns.

    For many tokens the wide matrix is held in one form, so of several libraries the one that is
    faster for the most tokens takes part.

    Args:
        parts: a matrix of its kind.
        clock: None for the current GPU.
    """
    seconds = seconds_of(parts, TRIED, clock)
    last = seconds[TRIED[-1]]
    best = min(last.keys() & set(LIBRARIES), key=lambda way: last[way], default=DENSE)
    compared = {
        tokens: {way: x for way, x in taken.items() if way in (DENSE, TRITON, best)}
        for tokens, taken in seconds.items()
    }
    return Fastest.of(DENSE, compared)


def seconds_of(
    parts: StoredParts, tried: Sequence[int], clock: Clock | None = None
) -> dict[int, dict[str, float]]:
    """Seconds of a product by every way that there is, for each number of tokens."""
    forms = {DENSE: form(DENSE, parts)}
    for way in other_ways():
        with suppress(RuntimeError):  # a library does not know this GPU
            forms[way] = form(way, parts)

    def calls(tokens: int) -> dict[str, Call]:
        like = parts.packed
        x = torch.randn(tokens, parts.in_features, device=like.device).to(like.dtype)
        able = (way for way in forms if way != TRITON or tokens <= FEW)
        return {way: lambda way=way: forms[way].multiply(x) for way in able}

    return race(tried, DENSE, calls, clock)


def other_ways() -> list[str]:
    """The ways besides the dense product that this installation has."""
    has = {
        CUTLASS: True,
        CUSPARSELT: torch.backends.cusparselt.is_available(),
        TRITON: find_spec("triton") is not None,
    }
    return [way for way, there in has.items() if there]


def form(way: str, parts: StoredParts) -> Form:
    """A weight as a way takes it."""
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    if way == DENSE:
        return DenseForm(parts.dense)
    if way == TRITON:
        return PartsForm(parts)
    made: Tensor
    with warnings.catch_warnings():  # torch warns once that its interface is a prototype
        warnings.simplefilter("ignore")
        if way == CUSPARSELT:
            made = SparseSemiStructuredTensorCUSPARSELT.from_dense(parts.wide)
        else:
            shape = torch.Size((len(parts.packed), 2 * parts.packed.shape[1]))
            own = parts.packed, parts.meta
            made = SparseSemiStructuredTensorCUTLASS(shape, *own, None, None, None)
    return WideForm(made, parts.columns, parts.nbytes)
