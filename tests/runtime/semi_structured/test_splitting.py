"""6:8 and 8:16 as wider 2:4 matrices: every pattern, counted; products against the dense ones."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from secateur.errors import PatternError, ShapeError
from secateur.runtime.semi_structured.layout import (
    SPLITTINGS,
    Splitting,
    StoredParts,
    assignments,
    is_n_of_m,
    lifted,
    sliding,
)

BY_NAME = {one.name: one for one in SPLITTINGS}


def drawn(rows: int, columns: int, n: int, m: int, fewer: bool) -> Tensor:
    """A random n:m matrix of float64 integers; with `fewer`, blocks keep 0 to n."""
    draw = torch.Generator().manual_seed(columns + n)
    order = torch.rand(rows, columns // m, m, generator=draw).argsort(2)
    most = torch.randint(0, n + 1, (rows, columns // m, 1), generator=draw) if fewer else n
    weight = torch.randint(1, 9, (rows, columns), generator=draw).double()
    return weight * (order < most).view(rows, columns)


@pytest.mark.parametrize("name", ["6:8", "8:16"])
@pytest.mark.parametrize("fewer", [False, True])
def test_the_wide_product_is_the_dense_one(name: str, fewer: bool) -> None:
    splitting = BY_NAME[name]
    weight = drawn(64, 128, splitting.n, splitting.m, fewer)
    wide, columns = splitting.split(weight), splitting.columns(128)
    assert is_n_of_m(wide, 2, 4)
    assert wide.shape[1] == splitting.lifted(128) == 192
    x = torch.randint(-9, 9, (5, 128)).double()
    assert torch.equal(lifted(x, columns) @ wide.t(), x @ weight.t())
    assert int(wide.count_nonzero()) == int(weight.count_nonzero())


@pytest.mark.parametrize("splitting", [*SPLITTINGS, sliding(6), sliding(10)], ids=lambda s: s.name)
def test_every_pattern_has_places(splitting: Splitting) -> None:
    """All sets of at most n columns: each column in one place of its own, 2 in each window."""
    table = assignments(splitting)
    places = torch.tensor(splitting.windows).flatten()
    bits = torch.arange(2**splitting.m)
    kept = bits[:, None] >> torch.arange(splitting.m) & 1
    promised = kept.sum(1) <= splitting.n
    taken = torch.zeros_like(kept).index_add_(1, places, table.long())
    assert torch.equal(taken[promised], kept[promised])
    assert int(table.view(len(table), -1, 4).sum(2).max()) == 2
    assert not table[~promised].any()


def test_five_windows_cannot_take_8_of_16() -> None:
    """By counting, for all ways to give 16 columns the 20 places of 5 windows: 12 or more columns
    are in one window only, so some window is the only one of 3 columns, and takes 2."""
    for twice in range(5):  # columns that are in more than one window; 20 places less 16 columns
        alone = 16 - twice
        assert -(-alone // 5) >= 3
    five = Splitting(
        8, 16, ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15), (3, 7, 11, 15))
    )
    with pytest.raises(PatternError, match="do not take every 8:16"):
        assignments(five)


def test_4_of_8_is_one_of_6_of_8() -> None:
    for kept in combinations(range(8), 4):
        weight = torch.zeros(1, 8)
        weight[0, list(kept)] = 1
        assert is_n_of_m(BY_NAME["6:8"].split(weight), 2, 4)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="12 columns are no whole number of blocks of 8"):
        BY_NAME["6:8"].split(torch.zeros(4, 12))
    weight = torch.zeros(4, 16)
    weight[2, 8:15] = 1
    with pytest.raises(PatternError, match="a block of 8 weights keeps more than 6"):
        BY_NAME["6:8"].split(weight)


@pytest.mark.parametrize("name", ["6:8", "8:16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_come_back_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    splitting = BY_NAME[name]
    weight = drawn(32, 128, splitting.n, splitting.m, fewer=True).to(dtype)
    parts = StoredParts.of(splitting.split(weight), 128, splitting.columns(128))
    assert torch.equal(parts.dense, weight)
    named = parts.named("a")
    assert list(named) == ["a.packed", "a.meta", "a.columns"]
    stored = sum(8 * value.nbytes for part, value in named.items() if part != "a.columns")
    assert stored == 13.5 * weight.numel()
