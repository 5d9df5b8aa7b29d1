"""The kernel for 2:4 matrices in Triton's interpreter, as `parts_interpreted.py`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.runtime.semi_structured.layout import StoredParts, split, window_columns
from secateur.runtime.semi_structured.load import SparseLinear


def weight_of(
    pattern: str, shape: tuple[int, int], dtype: torch.dtype
) -> tuple[StoredParts, Tensor]:
    """A matrix whose blocks keep a random number of weights, up to what the pattern allows."""
    n, m = map(int, pattern.split(":"))
    draw = torch.Generator().manual_seed(shape[1])
    blocks = torch.randn(shape[0], shape[1] // m, m, generator=draw)
    most = torch.randint(0, n + 1, (*blocks.shape[:2], 1), generator=draw)
    kept = torch.rand(blocks.shape, generator=draw).argsort(2) < most
    weight = (blocks * kept).view(shape).to(dtype)
    if pattern == "2:4":
        return StoredParts.of(weight, shape[1]), weight
    return StoredParts.of(split(weight), shape[1], window_columns(shape[1])), weight


@pytest.mark.parametrize(
    ("pattern", "shape", "dtype", "tokens"),
    [
        ("2:4", (32, 64), torch.bfloat16, 1),
        ("2:4", (64, 320), torch.bfloat16, 1),
        ("2:4", (64, 192), torch.float16, 3),
        ("6:8", (32, 176), torch.bfloat16, 1),
        ("6:8", (32, 64), torch.float16, 4),
    ],
    ids=str,
)
def test_products_are_those_of_the_dense_matrix(
    pattern: str, shape: tuple[int, int], dtype: torch.dtype, tokens: int
) -> None:
    parts, weight = weight_of(pattern, shape, dtype)
    x, bias = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    y = SparseLinear(parts, bias)(x)
    assert (y.dtype, y.shape) == (dtype, (tokens, shape[0]))
    expected = x.double() @ weight.double().t() + bias.double()
    size = x.double().abs() @ weight.double().abs().t() + bias.double().abs()
    assert ((y.double() - expected).abs() <= 2**-7 * size).all()


@pytest.mark.parametrize("programs", [1, 4])
def test_tiles_can_be_divided_among_programs(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.runtime.kernels.gpu import bitmask as matrix

    monkeypatch.setattr(matrix, "PROGRAMS", programs)
    parts, weight = weight_of("2:4", (32, 320), torch.bfloat16)  # five tiles
    y = SparseLinear(parts, None)(torch.eye(320)[:1].bfloat16())
    assert torch.equal(y[0], weight[:, 0])
