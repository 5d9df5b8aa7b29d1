"""Exact counts, against Python's own arithmetic and sort."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import patterns as oracles
from secateur.errors import PatternError
from secateur.sparsity import exact_count
from secateur.sparsity.exact_count import keep_largest
from secateur.sparsity.patterns import pruned_count


@given(total=st.integers(0, 10**11), sparsity=st.floats(0, 1, exclude_max=True))
def test_pruned_count_is_the_nearest(total, sparsity):
    assert pruned_count(total, sparsity) == oracles.nearest_count(total, sparsity)


@given(total=st.integers(1, 10**11), data=st.data())
def test_a_count_survives_being_written_as_a_sparsity(total, data):
    count = data.draw(st.integers(0, total))
    assert pruned_count(total, count / total) == count


@pytest.mark.parametrize(
    ("total", "sparsity", "expected"),
    [
        (45, 0.7, 32),  # 31.5, although 0.7 * 45 is below it in floating point
        (3, 0.5, 2),
        (5, 0.5, 3),
        (1, 0.49, 0),
        (0, 0.5, 0),
        (45_088_768, 0.5, 22_544_384),
        (10, 0.0, 0),
    ],
)
def test_halves_round_up(total, sparsity, expected):
    assert pruned_count(total, sparsity) == expected


# Few different values, so that ties are everywhere.
values = st.sampled_from([-math.inf, -2.0, -0.0, 0.0, 1e-40, 1.0, 1.5, 3e38, math.inf])


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 20),
    groups=st.integers(1, 6),
    data=st.data(),
)
def test_keep_largest_is_a_stable_sort(n, groups, data):
    rows = data.draw(
        st.lists(st.lists(values, min_size=n, max_size=n), min_size=groups, max_size=groups)
    )
    pruned = data.draw(st.integers(0, n))
    mask = keep_largest(torch.tensor(rows), pruned)
    assert mask.tolist() == [oracles.keep(row, pruned) for row in rows]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(9, 3000),
    groups=st.integers(1, 5),
    levels=st.integers(1, 5000),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_long_rows(n, groups, levels, fraction, seed):
    random = torch.Generator().manual_seed(seed)
    score = torch.randint(levels, (groups, n), generator=random).float()
    pruned = int(fraction * n)
    mask = keep_largest(score, pruned)
    gone = score.sort(dim=1, stable=True).indices[:, :pruned]
    expected = torch.ones_like(mask).scatter_(1, gone, False)
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("levels", [1, 4, 2**30])
@pytest.mark.parametrize("n", [3, 8, 9, 100])
def test_rows_in_several_chunks(monkeypatch, levels, n):
    monkeypatch.setattr(exact_count, "_CHUNK", 64)
    score = torch.randint(levels, (57, n), generator=torch.Generator().manual_seed(0)).float()
    expected = [oracles.keep(row, n // 2) for row in score.tolist()]
    assert keep_largest(score, n // 2).tolist() == expected


def test_a_row_of_millions():
    # Beyond 2**24 scores float32 cannot count, and torch.quantile gives up.
    n = 2**24 + 3
    score = torch.zeros(1, n)
    score[0, 5:9] = 1.0
    mask = keep_largest(score, n - 6)
    assert mask[0].nonzero()[:, 0].tolist() == [5, 6, 7, 8, n - 2, n - 1]


@pytest.mark.parametrize("pruned", [-1, 5])
def test_more_than_there_is_is_refused(pruned):
    with pytest.raises(PatternError, match=f"cannot prune {pruned} of 4"):
        keep_largest(torch.zeros(2, 4), pruned)


INFINITE = math.inf
ROWS = {
    "one": torch.tensor([3.0]),
    "two": torch.tensor([2.0, -1.0]),
    "all equal": torch.full((997,), 0.25),
    "zeros of both signs": torch.tensor([0.0, -0.0] * 40 + [1.0, -1.0]),
    "infinite": torch.tensor([INFINITE, -INFINITE, 0.0, 1.0, -1.0] * 30),
    "ties": torch.randint(0, 9, (5000,), generator=torch.Generator().manual_seed(0)).float(),
    "of all sizes": torch.randn(4096, generator=torch.Generator().manual_seed(1)).mul(9).exp(),
    "of both signs": torch.randn(4097, generator=torch.Generator().manual_seed(2)),
    "too small to be normal": torch.arange(-300, 300) * 1.4e-45,
    "close together": 1 + torch.arange(5000).flip(0) * 2**-23,
}


@pytest.mark.parametrize("name", ROWS)
def test_the_histogram_of_a_gpu_finds_what_kthvalue_finds(name: str) -> None:
    rows = torch.stack([ROWS[name], -ROWS[name].flip(0)])
    n = rows.shape[1]
    for pruned in sorted({1, 2, n // 3, n // 2, n - 1, n} & set(range(1, n + 1))):
        for score in (rows, rows[:1]):
            found = exact_count._smallest_by_histogram(score, pruned)
            expected = torch.kthvalue(score, pruned, dim=1, keepdim=True).values
            assert torch.equal(found, expected), pruned


@pytest.mark.parametrize("name", ROWS)
def test_a_gpu_prunes_long_rows_as_a_cpu_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_histogram(score: Any, pruned: int) -> Any:
        return exact_count._smallest_by_histogram(torch.from_numpy(score), pruned).numpy()

    score = torch.stack([ROWS[name], ROWS[name].flip(0)])
    n = score.shape[1]
    counts = sorted({1, n // 2, n - 1} & set(range(1, n)))
    expected = [exact_count._by_threshold(score, pruned) for pruned in counts]
    monkeypatch.setattr(exact_count, "_smallest", by_histogram)
    for pruned, mask in zip(counts, expected, strict=True):
        assert torch.equal(exact_count._by_threshold(score, pruned), mask)
