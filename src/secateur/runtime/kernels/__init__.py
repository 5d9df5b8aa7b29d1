"""Kernels that multiply sparse matrices without expanding them; plain C in `csrc/`.

They take a matrix of any format, because `Format.kept` gives them its mask and its values. A format
whose parts can be multiplied as they are stored brings a `Product`, registered under its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from secateur.registry import Registry
from secateur.runtime.formats import Layout


class Product(Protocol):
    """The contract of a product that reads the parts of one format as they are stored."""

    def why_not(self, layout: Layout, device: torch.device) -> str | None:
        """Why it cannot multiply a matrix on a device; None if it can."""
        ...

    def linear(
        self, parts: Mapping[str, Tensor], layout: Layout, bias: Tensor | None, device: torch.device
    ) -> nn.Module:
        """y = x Wᵀ + b: an `InferenceLinear` that holds the parts on the device.

        Args:
            parts: checked parts of W [out, in], by suffix, on the CPU.
            layout: how they are stored.
            bias: b [out], or None.
            device: where x will be.
        """
        ...


products: Registry[Product] = Registry("product", __name__)


def product_of(layout: Layout, device: torch.device) -> Product | None:
    """The product of a format that can multiply this matrix; None leaves it to our kernels."""
    product = products[layout.format] if layout.format in products else None
    return product if product is not None and product.why_not(layout, device) is None else None
