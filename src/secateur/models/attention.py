"""Attention written out for fast training, in place of a model's attention function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from secateur.machine import fast_dtype

LONGEST = 512
"""The longest window, in tokens, whose scores are stored in full."""


class WrittenOut(TorchFunctionMode):
    """Within this context, attention is two products and a softmax, all in bfloat16.

    torch's fused kernel for CPUs reaches a fraction of the speed of its bfloat16 products, so this
    is faster on short windows. The costs: probabilities are kept for the backward, and scores are
    rounded to 8 bits before the softmax.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace torch's attention without dropout, and pass every other function on."""
        named = kwargs or {}
        if func is scaled_dot_product_attention and not named.get("dropout_p"):
            return self.attend(*args, **named)
        return func(*args, **named)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """softmax(scale · Q Kᵀ + mask) V in bfloat16; arguments as in torch's function.

        Query heads that read the same keys are rows of one product: nothing is repeated.
        """
        *_, heads, rows, width = query.shape
        groups, columns = key.shape[-3:-1]
        together = heads // groups
        kind = torch.bfloat16
        q = query.to(kind) * (width**-0.5 if scale is None else scale)
        # [windows · groups, heads of a group · rows, width], so that no key is repeated
        q = q.reshape(-1, together * rows, width)
        k, v = (x.to(kind).reshape(-1, columns, x.shape[-1]) for x in (key, value))
        scores = torch.baddbmm(_added(attn_mask, is_causal, query, columns, together), q, k.mT)
        return (scores.softmax(-1) @ v).view(*query.shape[:-1], -1)


def _added(mask: Tensor | None, causal: bool, query: Tensor, columns: int, together: int) -> Tensor:
    """The mask to add to the scores: [windows · groups, heads of a group · rows, columns]."""
    *outer, heads, rows, _ = query.shape
    if mask is None:
        mask = query.new_ones(rows, columns, dtype=torch.bool)
        mask = mask.tril() if causal else mask
    if mask.dtype == torch.bool:
        least = torch.finfo(torch.bfloat16).min  # −∞ would make a row that sees nothing NaN
        mask = torch.zeros_like(mask, dtype=torch.bfloat16).masked_fill(~mask, least)
    mask = mask.to(torch.bfloat16)
    if mask.numel() == rows * columns:  # one mask for all windows and heads
        return mask.reshape(rows, columns).repeat(together, 1)
    return mask.expand(*outer, heads, rows, columns).reshape(-1, together * rows, columns)


def writes_out(device: torch.device, length: int) -> bool:
    """Whether training writes the scores out for windows of this many tokens.

    It does on processors with bfloat16 products, up to `LONGEST` tokens. At 1024 tokens it is not
    faster, and the probabilities grow with its square.
    """
    return device.type == "cpu" and fast_dtype(device) is not None and length <= LONGEST
