"""How work is divided among processes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import RecipeError
from secateur.parallel.ranks import micro_batches, owners, rows_of


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 9))
def test_every_window_has_one_process_and_the_last_are_idle_first(
    windows: int, largest: int, ranks: int
) -> None:
    if windows < ranks:
        with pytest.raises(RecipeError, match=f"{ranks} processes have only {windows}"):
            micro_batches(windows, largest, ranks)
        return
    cut = micro_batches(windows, largest, ranks)
    shares = [rows_of(rank, cut, ranks) for rank in range(ranks)]
    read = [row for share in shares for batch in share for row in range(batch.start, batch.stop)]
    assert read == list(range(windows))
    assert all(0 < batch.stop - batch.start <= largest for batch in cut)
    numbers = [len(share) for share in shares]
    assert numbers[0] == max(numbers)
    assert max(numbers) - min(numbers) <= 1
    assert cut == micro_batches(windows, largest)
    if len(cut) < ranks:
        assert numbers[len(cut) :] == [0] * (ranks - len(cut))


def test_one_process_cuts_as_before() -> None:
    assert micro_batches(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]


def test_the_busiest_process_has_at_most_a_third_more_than_the_best() -> None:
    costs = [4096**3, 4096**2 * 1024, 4096**2 * 1024, 4096**3, 4096**2 * 11008, 4096**2 * 11008]
    costs.append(11008**2 * 4096)
    for ranks in (1, 2, 3, 7, 9):
        found = owners(costs, ranks)
        busy = [
            sum(c for c, own in zip(costs, found, strict=True) if own == r) for r in range(ranks)
        ]
        best = max(max(costs), sum(costs) / ranks)
        assert max(busy) <= 4 / 3 * best
    assert owners([1, 1, 1], 3) == [0, 1, 2]
    assert owners([], 2) == []
