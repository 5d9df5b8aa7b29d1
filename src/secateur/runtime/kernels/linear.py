"""Modules with packed weights that replace the linears and the embedding of a model.

Where a matrix is integers, its activations are rounded to int8 (`quantization.activations`): in the
kernels, and in torch where there are none.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import ShapeError
from secateur.quantization.activations import GROUP, integers_of, shares_of, spread_order
from secateur.registry import Registry
from secateur.runtime.formats import Layout
from secateur.runtime.kernels.dispatch import by_blocks, by_kernel
from secateur.runtime.kernels.matrix import KernelMatrix

AT_ONCE = 2**22
"""Weights that are float32 at the same time on a CPU."""
EXPANDED = 2**26
"""Weights that are float32 at the same time on a GPU: 256 MiB, and most matrices whole."""


def activations_of(model: nn.Module) -> str:
    """How a model rounds activations: `int8 g64` where they meet integers, or `none`."""
    rounds = any(getattr(module, "rounds_inputs", None) is True for module in model.modules())
    return f"int8 g{GROUP}" if rounds else "none"


class InferenceLinear(nn.Module):
    """y = x Wᵀ + b for inference, with W in a form that is no parameter.

    Args:
        shape: of W, [out, in].
        bias: b [out], or None.
        dtype: the one that `weight` has.
    """

    def __init__(
        self, shape: tuple[int, int], bias: Tensor | None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.dtype = dtype
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """The product for activations [..., in].

        Raises:
            ShapeError: the activations do not fit.
        """
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"x {list(x.shape)} for a linear of {self.in_features} inputs")
        y = self.affine(x.reshape(-1, self.in_features))
        return y.view(*x.shape[:-1], self.out_features)

    def affine(self, x: Tensor) -> Tensor:
        """The product for activations [tokens, in], with the bias."""
        y = self.multiply(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def multiply(self, x: Tensor) -> Tensor:
        """The product x Wᵀ [tokens, out] without the bias."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the weight, without values, for model code that reads them."""
        return _stand_in(self.out_features, self.in_features, self.dtype, "meta")


class Product(Protocol):
    """The contract of a product that reads the parts of one format as they are stored."""

    def why_not(self, layout: Layout, device: torch.device) -> str | None:
        """Why it cannot multiply a matrix on a device; None if it can."""
        ...

    def linear(
        self, parts: Mapping[str, Tensor], layout: Layout, bias: Tensor | None, device: torch.device
    ) -> InferenceLinear:
        """A linear layer that holds the parts on the device.

        Args:
            parts: checked parts of W [out, in], by suffix, on the CPU.
            layout: how they are stored.
            bias: b [out], or None.
            device: where x will be.
        """
        ...


products: Registry[Product] = Registry("product", "secateur.runtime.kernels")
"""Products by the name of the format that they read."""


def product_of(layout: Layout, device: torch.device) -> Product | None:
    """The product that multiplies this matrix as it is stored; None leaves it to our kernels."""
    if layout.format not in products:
        return None
    product = products[layout.format]
    return product if product.why_not(layout, device) is None else None


class _NumberedModule(nn.Module):
    """A module whose computation is an operator of `torch.ops.secateur`.

    The operator takes a tensor and the number of a module. torch.compile does not trace into it,
    and engines that compile a model can capture what it launches.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give a copy its own number."""
        super().__setstate__(state)
        self.take_number()

    def take_number(self) -> None:
        """Be the module of a new number."""
        self.number = next(_numbers)
        _modules[self.number] = self


class OperatorLinear(_NumberedModule, InferenceLinear):
    """A linear whose product is the operator `torch.ops.secateur.linear`."""

    def __init__(self, shape: tuple[int, int], bias: Tensor | None) -> None:
        super().__init__(shape, bias)
        self.take_number()

    def multiply(self, x: Tensor) -> Tensor:
        """The product by the operator, which calls `product`."""
        y: Tensor = torch.ops.secateur.linear(x, self.number, self.out_features)
        return y

    def product(self, x: Tensor) -> Tensor:
        """The product x Wᵀ [tokens, out] without the bias, by the faster way."""
        raise NotImplementedError


# An operator of torch takes tensors and numbers only, so a module is passed as its number.
_numbers = itertools.count(1)
_modules: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""Modules by number, because the operator accepts only tensors and numbers."""

_operators = torch.library.Library("secateur", "DEF")
_operators.define("linear(Tensor x, int module, int out_features) -> Tensor")
_operators.define("rows(Tensor ids, int module, int columns) -> Tensor")


@torch.no_grad()  # a caller who needs gradients of other parts may have enabled them
def _linear(x: Tensor, module: int, out_features: int) -> Tensor:
    found: Tensor = _modules[module].product(x)
    return found


def _rows(ids: Tensor, module: int, columns: int) -> Tensor:
    found: Tensor = _modules[module].matrix.gathered(ids)
    return found


_operators.impl("linear", _linear, "CPU")
_operators.impl("linear", _linear, "CUDA")
torch.library.register_fake(
    "secateur::linear",
    lambda x, module, out_features: x.new_empty((x.shape[0], out_features)),
    lib=_operators,
)
_operators.impl("rows", _rows, "CPU")
torch.library.register_fake(
    "secateur::rows",
    lambda ids, module, columns: ids.new_empty((ids.shape[0], columns), dtype=torch.bfloat16),
    lib=_operators,
)


class PackedLinear(OperatorLinear):
    """y = x Wᵀ + b, with W packed; for inference on a CPU.

    Args:
        matrix: W [out, in].
        bias: b [out], or None.
        kernel_up_to: the most tokens for the kernel; more are multiplied by blocks. None where
            there are no kernels, and torch multiplies. `install.settle` sets it after measuring.
    """

    def __init__(
        self, matrix: KernelMatrix, bias: Tensor | None = None, kernel_up_to: int | None = 8
    ) -> None:
        super().__init__((matrix.rows, matrix.columns), bias)
        self.matrix, self.kernel_up_to = matrix, kernel_up_to

    @property
    def weight(self) -> Tensor:
        """Shape, device and dtype of the weight, for model code that reads them.

        Some code gives activations the dtype of the weight. For integers it is float32.
        """
        dtype = torch.float32 if self.matrix.integers else self.matrix.dtype
        return _stand_in(self.matrix.rows, self.matrix.columns, dtype)

    @property
    def rounds_inputs(self) -> bool:
        """Whether activations are rounded."""
        return self.matrix.integers

    def product(self, x: Tensor) -> Tensor:
        """The product x Wᵀ [tokens, out] without the bias, by the faster way."""
        if len(x) == 0:
            return x.new_empty(0, self.out_features)
        if self.kernel_up_to is None:
            assert self.matrix.weight is not None  # nothing is packed where there are no kernels
            return functional.linear(x, self.matrix.weight.to(x.dtype))
        if x.dtype == torch.float16:  # torch multiplies it slowly, kernels take float32
            return self.product(x.float()).half()
        if len(x) <= self.kernel_up_to:
            return by_kernel(self.matrix, x)
        return by_blocks(self.matrix, x)

    def extra_repr(self) -> str:
        """Shape and storage, for printing."""
        m = self.matrix
        share = 1 - m.nonzeros / (m.rows * m.columns)
        stored = str(m.dtype).removeprefix("torch.") if m.group is None else "int4"
        return (
            f"in_features={m.columns}, out_features={m.rows}, bias={self.bias is not None}, "
            f"{stored}, sparsity={share:.3f}"
        )


class IntegerLinear(InferenceLinear):
    """y = x Wᵀ + b in torch, on any device, with W of integers and rounded x.

    On a CPU it computes what the kernels for prompts compute, bit for bit: integer products are
    exact in float32, and each group's sum times its scales is added with one rounding. Elsewhere
    it is `expanded_product`.

    Args:
        codes: the integers of W, int8 [out, in].
        scales: float32 [out]; or [out, groups] where columns are in groups.
        group: consecutive columns that share a scale of a row; None for whole rows.
        bias: b [out], or None.

    Attributes:
        codes: in the order of the rounded activations, int8 [out, ⌈in / 64⌉ · 64]: zeros past the
            columns.
        scales: of runs of `codes` that are equally long, float32 [out, runs].
    """

    rounds_inputs = True

    def __init__(
        self, codes: Tensor, scales: Tensor, group: int | None = None, bias: Tensor | None = None
    ) -> None:
        super().__init__((codes.shape[0], codes.shape[1]), bias)
        self.group = group
        codes = functional.pad(codes, (0, -self.in_features % GROUP))
        if group is None:
            codes, scales = codes[:, spread_order(self.in_features, codes.device)], scales[:, None]
        else:
            # No run is longer than a group of activations. A negative padding cuts.
            scales = scales.repeat_interleave(max(1, group // GROUP), 1)
            runs = codes.shape[1] // min(group, GROUP)
            scales = functional.pad(scales, (0, runs - scales.shape[1]))
        # no buffers: they would be cast with the model, and looked for in its files
        self.codes, self.scales = codes, scales

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> IntegerLinear:
        """Move the integers along; a cast of the model leaves them."""
        super()._apply(fn, recurse)
        # what `fn` does to an empty tensor tells where it moves things, whatever it casts them to
        device = fn(torch.empty(0, device=self.codes.device)).device
        self.codes, self.scales = self.codes.to(device), self.scales.to(device)
        return self

    def multiply(self, x: Tensor) -> Tensor:
        """The product for activations [tokens, in], of their dtype."""
        integers, steps = integers_of(x, shares_of(self.group))
        if x.device.type != "cpu":
            return expanded_product(integers, steps, self.codes, self.scales, x.dtype)
        # some rows of W at a time: their codes become float32
        rows = max(1, AT_ONCE // max(len(integers), self.in_features))
        parts = zip(self.codes.split(rows), self.scales.split(rows), strict=True)
        return torch.cat([self.rows(integers, steps, *part) for part in parts], -1).to(x.dtype)

    def rows(self, x: Tensor, steps: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        """The product with some rows of W, float32 [tokens, rows].

        Args:
            x: rounded activations as integers, from `integers_of` [tokens, ⌈in / 64⌉ · 64].
            steps: their scales [tokens, ⌈in / 64⌉].
            codes: of the rows.
            scales: of the rows.
        """
        # Columns whose products have one scale: a group of activations, or of weights if smaller.
        width = min(self.group or GROUP, GROUP)
        sums = torch.zeros(len(x), len(codes), device=x.device)
        for begin in range(0, self.in_features, width):
            run = slice(begin, begin + width)
            # at most 64 · 127 · 127, so the sum of products is exact in float32
            dots = x[:, run] @ codes[:, run].float().T
            scale = steps[:, begin // GROUP, None]
            if self.group is not None:
                scale = scale * scales[:, begin // width]
            # as a fused multiply-add of the kernels: one rounding for product and sum
            sums = (sums.double() + dots.double() * scale.double()).float()
        return sums if self.group is not None else sums * scales[:, 0]


def expanded_product(
    x: Tensor, steps: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype
) -> Tensor:
    """The product with W expanded, [tokens, out]: as many launches for any matrix of one block.

    Rounded activations and weights are rounded to `dtype`. torch adds the products, in float32.

    Args:
        x: rounded activations as integers, from `integers_of` [tokens, ⌈in / 64⌉ · 64].
        steps: their scales [tokens, ⌈in / 64⌉].
        codes: of W, as `IntegerLinear` holds them; or two codes of 4 bits in a byte.
        scales: of their runs.
        dtype: of the product.
    """
    inputs = (x.unflatten(1, (-1, GROUP)) * steps[..., None]).flatten(1).to(dtype)
    rows = max(1, EXPANDED // x.shape[1])
    found = []
    for part, scale in zip(codes.split(rows), scales.split(rows), strict=True):
        whole = part if part.shape[1] == x.shape[1] else both_halves(part)
        weight = (whole.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)
        found.append(functional.linear(inputs, weight.to(dtype)))
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def in_halves(codes: Tensor) -> Tensor:
    """Codes of 4 bits, int8 [out, in], two in a byte: byte i of 32 has codes i and i + 32 of 64."""
    low, high = codes.unflatten(1, (-1, 2, GROUP // 2)).unbind(2)
    return ((low & 15) | (high << 4)).flatten(1)


def both_halves(packed: Tensor) -> Tensor:
    """The inverse of `in_halves`."""
    bytes_ = packed.unflatten(1, (-1, GROUP // 2))
    # a shift to the right copies the sign
    return torch.stack([bytes_ << 4 >> 4, bytes_ >> 4], 2).flatten(1)


class PackedEmbedding(_NumberedModule):
    """An embedding that is stored as integers; a tied head shares the matrix.

    Only the rows that are looked up become numbers of `dtype`.

    Args:
        matrix: dense [vocabulary, hidden], of int8, int4 or without a scale.
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
        self.take_number()

    def forward(self, ids: Tensor) -> Tensor:
        """The embeddings [..., hidden] of token ids."""
        rows = self.rows(ids).to(self.dtype)
        return rows if self.factor is None else rows * self.factor

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix [..., hidden]."""
        if self.matrix.group is not None:
            found: Tensor = torch.ops.secateur.rows(
                ids.long().flatten(), self.number, self.embedding_dim
            )
            return found.view(*ids.shape, -1)
        # the dense layout without its padding: a view, so a lookup copies only its rows
        width = self.matrix.words * 64
        table = self.matrix.values[: self.matrix.rows * width].view(self.matrix.rows, width)
        rows = table[ids][..., : self.matrix.columns]
        return rows if self.matrix.scale is None else rows.float() * self.matrix.scale[ids, None]

    @property
    def weight(self) -> Tensor:
        """Shape, device and dtype of the weight, for model code that reads them."""
        return _stand_in(self.num_embeddings, self.embedding_dim, self.dtype)


class ReadEmbedding(PackedEmbedding):
    """An embedding whose weight the code of its model also reads, so that it is held dense too."""

    def __init__(
        self, matrix: KernelMatrix, dtype: torch.dtype, factor: float | None = None
    ) -> None:
        super().__init__(matrix, dtype, factor)
        self.values = self.rows(torch.arange(matrix.rows)).to(dtype)

    @property
    def weight(self) -> Tensor:
        """The weight with its values."""
        return self.values


class ReadLinear(PackedLinear):
    """A linear whose weight the code of its model also reads, so that it is held dense.

    Its activations are never rounded, because the model multiplies by the weight itself.

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


def _stand_in(rows: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """A tensor of NaN that takes no memory, and that transformers takes for initialised."""
    found = torch.full((1, 1), torch.nan, dtype=dtype, device=device).expand(rows, columns)
    found._is_hf_initialized = True  # type: ignore[attr-defined]
    return found
