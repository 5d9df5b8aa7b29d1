"""A linear on a GPU that takes sparse tensor cores only where they were measured to be faster."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import ShapeError
from secateur.runtime.kernels.gpu.timing import Call, Clock, Fastest, race
from secateur.runtime.semi_structured.layout import Parts, lifted

__all__ = ["DENSE", "SparseLinear", "chosen_linear", "measured", "seconds_of"]

DENSE = "dense"
TRIED = (1, 16, 64, 256, 1024, 4096)
"""Tokens of a product that are tried: decoding, and prompts."""


class SparseLinear(nn.Module):
    """y = x Wᵀ + b by the fastest way for the number of tokens; for inference.

    Where dense is faster for some numbers of tokens and sparse for others, both forms are held: 25
    bits for each weight of a 2:4 matrix, 29.5 for a 6:8 one.

    Args:
        parts: W [out, in].
        bias: b [out], or None.
        fastest: which way to take.
        forms: the weight for each way that `fastest` uses: W for `dense`, the wide 2:4 matrix for
            others.
    """

    def __init__(
        self, parts: Parts, bias: Tensor | None, fastest: Fastest, forms: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = parts.in_features, len(parts.packed)
        self.columns, self.dtype = parts.columns, parts.packed.dtype
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
        way = self.fastest.way(len(tokens))
        inputs = tokens if way == DENSE else lifted(tokens, self.columns)
        y = functional.linear(inputs, self.forms[way], self.bias)
        return y.view(*x.shape[:-1], self.out_features)

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


def chosen_linear(parts: Parts, bias: Tensor | None, fastest: Fastest) -> nn.Module:
    """A linear with the forms that it needs; an `nn.Linear` if sparse is never faster."""
    if fastest.used != {DENSE}:
        forms = {way: form(way, parts) for way in sorted(fastest.used)}
        return SparseLinear(parts, bias, fastest, forms)
    plain = nn.Linear(parts.in_features, len(parts.packed), bias is not None, device="meta")
    plain.weight = nn.Parameter(parts.dense, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias, requires_grad=False)
    return plain


def measured(parts: Parts, clock: Clock | None = None) -> Fastest:
    """Time the dense product and those on sparse tensor cores, in turns.

    The wide matrix is held in one form, so of several libraries the one that is faster for the most
    tokens is compared with the dense product.

    Args:
        parts: a matrix of its kind.
        clock: None for the current GPU.
    """
    seconds = seconds_of(parts, TRIED, clock)
    last = seconds[TRIED[-1]]
    best = min(last.keys() - {DENSE}, key=lambda way: last[way], default=DENSE)
    compared = {
        tokens: {way: x for way, x in taken.items() if way in (DENSE, best)}
        for tokens, taken in seconds.items()
    }
    return Fastest.of(DENSE, compared)


def seconds_of(
    parts: Parts, tried: Sequence[int], clock: Clock | None = None
) -> dict[int, dict[str, float]]:
    """Seconds of a product by every way that there is, for each number of tokens."""
    forms = {DENSE: form(DENSE, parts)}
    for library in libraries():
        with suppress(RuntimeError):  # it does not know this GPU
            forms[library] = form(library, parts)

    def product(way: str, x: Tensor) -> Tensor:
        inputs = x if way == DENSE else lifted(x, parts.columns)
        return functional.linear(inputs, forms[way])

    def ways(tokens: int) -> dict[str, Call]:
        like = parts.packed
        x = torch.randn(tokens, parts.in_features, device=like.device).to(like.dtype)
        return {way: lambda way=way: product(way, x) for way in forms}

    return race(tried, DENSE, ways, clock)


def libraries() -> tuple[str, ...]:
    """What torch can multiply 2:4 matrices with."""
    return ("CUTLASS", "cuSPARSELt") if torch.backends.cusparselt.is_available() else ("CUTLASS",)


def form(way: str, parts: Parts) -> Tensor:
    """A weight as a way takes it."""
    if way == DENSE:
        return parts.dense
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    with warnings.catch_warnings():  # torch warns once that its interface is a prototype
        warnings.simplefilter("ignore")
        if way == "cuSPARSELt":
            return SparseSemiStructuredTensorCUSPARSELT.from_dense(parts.wide)
        shape = torch.Size((len(parts.packed), 2 * parts.packed.shape[1]))
        return SparseSemiStructuredTensorCUTLASS(shape, parts.packed, parts.meta, None, None, None)
