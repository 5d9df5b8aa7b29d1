"""Activations as 8-bit integers: symmetric, one scale for each 64 columns of a token.

    scale_b = max_j |x_j| / 127                 over the columns j of share b
    q_j     = round(x_j · (127 / max_j |x_j|))  half to even; 0 for a share of zeros
    x_j    ≈ scale_b · q_j

Matrices of integers meet activations that are rounded like this, in every kernel and
without kernels. All numbers are float32.

Beside 4 bits or fewer the columns of a share are consecutive. Beside int8 they are spread over a
block of 64k columns: share g of its k shares has the columns c with ⌊c / 4⌋ mod k = g. A row,
filled up with zeros to a multiple of 64, is cut into blocks with k = 8, and what is left into one
with k = 4, one with 2 and one with 1, where they fit. So each lane of a register meets one scale in
a whole block, and sums are scaled once for a block, not once for 64 columns.

"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

GROUP = 64
"""How many columns share a scale."""

LARGEST = 127.0

Shares = Literal["consecutive", "spread"]
"""How the columns lie that share a scale."""


def shares_of(group: int | None) -> Shares:
    """How the columns lie beside integers in groups, or with one scale for each row (None)."""
    return "spread" if group is None else "consecutive"


@lru_cache
def spread_order(columns: int, device: torch.device | str = "cpu") -> Tensor:
    """The columns 0 to ⌈columns / 64⌉ · 64 − 1, one spread share after the other, int64."""
    # `words` of 64 columns; a block has 8 of them, and at the end 4, 2 or 1.
    words, found, first, block = -(-columns // GROUP), [], 0, 8
    while first < words:
        while block > words - first:
            block //= 2
        own = torch.arange(first * GROUP, (first + block) * GROUP, device="cpu")
        # Column c of the block is [c // 4k, c // 4 mod k, c mod 4]: the share comes to the front.
        found.append(own.view(16, block, 4).transpose(0, 1).reshape(-1))
        first += block
    return torch.cat(found).to(device)


def integers_of(x: Tensor, shares: Shares) -> tuple[Tensor, Tensor]:
    """Activations as integers with scales.

    Args:
        x: activations [..., in], any floating dtype.
        shares: how the columns lie that share a scale.

    Returns:
        q, one share after the other (`spread_order`), float32 [..., ⌈in / 64⌉ · 64], zeros past the
        columns; and the scales of the shares, float32 [..., ⌈in / 64⌉].
    """
    filled = functional.pad(x.float(), (0, -x.shape[-1] % GROUP))
    if shares == "spread":
        filled = filled[..., spread_order(x.shape[-1], x.device)]
    blocks = filled.unflatten(-1, (-1, GROUP))  # [..., shares, 64]
    most = blocks.abs().amax(-1, keepdim=True)
    largest = torch.full_like(most, LARGEST)  # torch would multiply a number by 1 / most
    # Multiplied by the inverse, as the kernels do: dividing by the scale could round otherwise.
    inverse = torch.where(most > 0, largest / most, 0.0)
    return (blocks * inverse).round_().flatten(-2), (most / largest).squeeze(-1)


def round_activations(x: Tensor, shares: Shares) -> Tensor:
    """What kernels multiply instead of x.

    Args:
        x: activations [..., in], any floating dtype.
        shares: how the columns lie that share a scale.

    Returns:
        The rounded activations, scale · q, float32 [..., in].

    Example:
        >>> import torch
        >>> from secateur.quantization.activations import round_activations
        >>> round_activations(torch.tensor([[127.0, -1.4, 0.6]]), "spread")
        tensor([[127.,  -1.,   1.]])
    """
    integers, scales = integers_of(x, shares)
    rounded = (integers.unflatten(-1, (-1, GROUP)) * scales[..., None]).flatten(-2)
    if shares == "spread":
        # Back to the order of the columns: share position i belongs to column order[i].
        order = spread_order(x.shape[-1], x.device)
        rounded = torch.empty_like(rounded).index_copy_(-1, order, rounded)
    return rounded[..., : x.shape[-1]]
