"""Logits of one model whose weights lie in two places of memory.

A safetensors file promises no alignment of its tensors, and on some processors the order in which
a matrix product sums depends on it (AVX-512 with weights at 4 bytes past a multiple of 16: the
last bits of a router's logits differ). So weights are compared bit for bit, logits with a margin.
"""

from __future__ import annotations

import torch
from torch import Tensor

MARGINS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def assert_same_logits(found: Tensor, expected: Tensor) -> None:
    """Fail where two tensors differ by more than `MARGINS` of the largest logit."""
    assert found.dtype == expected.dtype
    largest = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=MARGINS[found.dtype] * largest)
