"""6:8 as a wider 2:4 matrix: every pattern, counted; products against the dense ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.errors import PatternError, ShapeError
from secateur.runtime.semi_structured import load
from secateur.runtime.semi_structured.layout import (
    StoredParts,
    is_n_of_m,
    lifted,
    lifted_columns,
    split,
    window_columns,
)


def drawn(rows: int, columns: int, fewer: bool) -> Tensor:
    """A random 6:8 matrix of float64 integers; with `fewer`, blocks keep 0 to 6."""
    draw = torch.Generator().manual_seed(columns)
    order = torch.rand(rows, columns // 8, 8, generator=draw).argsort(2)
    most = torch.randint(0, 7, (rows, columns // 8, 1), generator=draw) if fewer else 6
    weight = torch.randint(1, 9, (rows, columns), generator=draw).double()
    return weight * (order < most).view(rows, columns)


@pytest.mark.parametrize("fewer", [False, True])
def test_the_wide_product_is_the_dense_one(fewer: bool) -> None:
    weight = drawn(64, 128, fewer)
    wide = split(weight)
    assert is_n_of_m(wide, 2, 4)
    assert wide.shape[1] == lifted_columns(128) == 192
    x = torch.randint(-9, 9, (5, 128)).double()
    assert torch.equal(lifted(x, window_columns(128)) @ wide.t(), x @ weight.t())
    assert int(wide.count_nonzero()) == int(weight.count_nonzero())


def test_every_pattern_has_places() -> None:
    """All sets of at most 6 of 8 columns: each column in one place, 2 in each window."""
    kept = torch.arange(256)[:, None] >> torch.arange(8) & 1
    kept = kept[kept.sum(1) <= 6].double()
    wide = split(kept)
    assert is_n_of_m(wide, 2, 4)
    assert torch.equal(torch.zeros_like(kept).index_add_(1, window_columns(8), wide), kept)


@pytest.mark.parametrize("weight", [torch.zeros(4, 12), torch.ones(4, 16)])
def test_what_is_not_6_of_8_is_refused(weight: Tensor) -> None:
    with pytest.raises(PatternError):
        split(weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    weight = drawn(32, 128, fewer=True).to(dtype)
    parts = StoredParts.of(split(weight), 128, window_columns(128))
    assert torch.equal(parts.dense, weight)
    named = parts.named("a")
    assert list(named) == ["a.packed", "a.meta", "a.columns"]
    stored = sum(8 * value.nbytes for part, value in named.items() if part != "a.columns")
    assert stored == 13.5 * weight.numel()


@pytest.mark.parametrize("pattern", ["2:4", "6:8"])
def test_a_linear_is_the_dense_product(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's product on sparse tensor cores by the dense one, which has no CPU."""
    monkeypatch.setattr(load, "as_torch_multiplies", lambda parts: parts.wide)
    weight, bias = drawn(32, 128, fewer=True).bfloat16(), torch.randn(32).bfloat16()
    if pattern == "2:4":
        weight[:, 1::4] = weight[:, 2::4] = 0
        parts = StoredParts.of(weight, 128)
    else:
        parts = StoredParts.of(split(weight), 128, window_columns(128))
    found = load.SparseLinear(parts, bias)
    found.few = 0  # no Triton on a CPU
    for shape in ((1, 128), (2, 3, 128), (300, 128), (0, 128)):
        x = torch.randn(shape).bfloat16()
        expected = x.double() @ weight.double().t() + bias.double()
        y = found(x)
        assert (y.shape, y.dtype) == (expected.shape, torch.bfloat16)
        torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=0.1)
    with pytest.raises(ShapeError, match="128"):
        found(torch.ones(1, 64).bfloat16())
    assert (found.weight.shape, found.weight.dtype) == ((32, 128), torch.bfloat16)
    assert found.nbytes == parts.nbytes
