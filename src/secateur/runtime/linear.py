"""Modules with packed weights that replace the linears and the embedding of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ShapeError
from secateur.runtime.kernels.dispatch import by_kernel, by_tiles
from secateur.runtime.kernels.matrix import KernelMatrix
from secateur.runtime.kernels.prompt import by_blocks, takes_blocks
from secateur.runtime.operator import numbered

__all__ = ["PackedEmbedding", "PackedLinear", "ReadLinear"]


class PackedLinear(nn.Module):
    """y = x Wᵀ + b, with W packed; for inference on a CPU.

    The product is the operator `torch.ops.secateur.linear`, which torch.compile does not trace
    into.

    Args:
        matrix: W [out, in].
        bias: b [out], or None.
        kernel_up_to: the most tokens for the kernel; more are multiplied by blocks of integers
            (`blocks`), or tile by tile. `install.settle` sets both after measuring.
    """

    def __init__(
        self, matrix: KernelMatrix, bias: Tensor | None = None, kernel_up_to: int = 8
    ) -> None:
        super().__init__()
        self.matrix = matrix
        self.in_features, self.out_features = matrix.columns, matrix.rows
        self.kernel_up_to = kernel_up_to
        self.blocks = takes_blocks(matrix)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.number = numbered(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give a copy its own number."""
        super().__setstate__(state)
        self.number = numbered(self)

    def forward(self, x: Tensor) -> Tensor:
        """The product for activations [..., in], float32, bfloat16 or float16.

        Raises:
            ShapeError: the activations do not fit, or are not on the CPU.
        """
        if x.shape[-1] != self.in_features or x.device.type not in ("cpu", "meta"):
            raise ShapeError(
                f"activations of shape {tuple(x.shape)} on {x.device} for a packed linear of "
                f"{self.in_features} inputs on the cpu"
            )
        tokens = x.reshape(-1, self.in_features)
        y: Tensor = torch.ops.secateur.linear(tokens, self.number, self.out_features)
        if self.bias is not None:
            y += self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the weight, without values, for model code that reads them."""
        return stand_in(self.matrix)

    def product(self, x: Tensor) -> Tensor:
        """The product x Wᵀ [tokens, out] without the bias, by the faster way."""
        if len(x) == 0:
            return x.new_empty(0, self.out_features)
        if x.dtype == torch.float16:  # torch multiplies it slowly, kernels take float32
            return self.product(x.float()).half()
        if len(x) <= self.kernel_up_to:
            return by_kernel(self.matrix, x)
        return (by_blocks if self.blocks else by_tiles)(self.matrix, x)

    def extra_repr(self) -> str:
        """Shape and storage, for printing."""
        m = self.matrix
        share = 1 - m.nonzeros / (m.rows * m.columns)
        stored = str(m.dtype).removeprefix("torch.") if m.group is None else "int4"
        return (
            f"in_features={m.columns}, out_features={m.rows}, bias={self.bias is not None}, "
            f"{stored}, sparsity={share:.3f}"
        )


class PackedEmbedding(nn.Module):
    """An embedding whose rows are int8 with a scale each; a tied head shares the matrix.

    Args:
        matrix: dense [vocabulary, hidden], of int8 or without a scale.
        dtype: of what it gives.
        factor: that the model multiplies its embeddings with, as Gemma does.
    """

    def __init__(
        self, matrix: KernelMatrix, dtype: torch.dtype, factor: float | None = None
    ) -> None:
        super().__init__()
        self.matrix, self.dtype = matrix, dtype
        self.factor = None if factor is None else torch.tensor(factor, dtype=dtype, device="cpu")
        self.num_embeddings, self.embedding_dim = matrix.rows, matrix.columns

    def forward(self, ids: Tensor) -> Tensor:
        """The embeddings [..., hidden] of token ids."""
        width = self.matrix.words * 64
        table = self.matrix.values[: self.matrix.rows * width].view(self.matrix.rows, width)
        rows = table[ids][..., : self.matrix.columns]
        if self.matrix.scale is not None:
            rows = rows.float() * self.matrix.scale[ids, None]
        rows = rows.to(self.dtype)
        return rows if self.factor is None else rows * self.factor

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the weight, without values, for model code that reads them."""
        return stand_in(self.matrix)


class ReadLinear(PackedLinear):
    """A linear whose weight the code of its model also reads, so that it is held dense.

    Args:
        matrix: W [out, in], dense.
        bias: b [out], or None.
    """

    def __init__(self, matrix: KernelMatrix, bias: Tensor | None) -> None:
        super().__init__(matrix, bias)
        self.values = matrix.tile(0, matrix.rows).clone()

    @property
    def weight(self) -> Tensor:
        """The weight with its values."""
        return self.values


def stand_in(matrix: KernelMatrix) -> Tensor:
    """A tensor on the meta device, which transformers takes for initialised."""
    found = torch.empty(matrix.rows, matrix.columns, dtype=matrix.dtype, device="meta")
    found._is_hf_initialized = True  # type: ignore[attr-defined]
    return found
