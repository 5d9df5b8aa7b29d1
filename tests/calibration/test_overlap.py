"""Text that is judged must not be text that was learned."""

from __future__ import annotations

import pytest
import torch

from secateur.calibration.continuation import shared_share


def by_looking(training: torch.Tensor, judged: torch.Tensor, length: int) -> float:
    """The definition."""

    def sequences(windows: torch.Tensor) -> list[tuple[int, ...]]:
        rows = windows.tolist()
        return [tuple(r[i : i + length]) for r in rows for i in range(len(r) - length + 1)]

    known = set(sequences(training))
    asked = sequences(judged)
    return sum(s in known for s in asked) / len(asked)


@pytest.mark.parametrize("length", [1, 3, 8])
def test_the_share_is_what_one_finds_by_looking(length: int) -> None:
    draw = torch.Generator().manual_seed(0)
    training = torch.randint(0, 6, (5, 40), generator=draw)
    judged = torch.randint(0, 6, (4, 30), generator=draw)
    judged[1, 5:20] = training[2, 11:26]
    expected = by_looking(training, judged, length)
    assert shared_share(training, judged, length) == pytest.approx(expected)
    assert expected > 0


def test_all_and_nothing() -> None:
    windows = torch.arange(400).view(4, 100)
    assert shared_share(windows, windows[:2]) == 1.0
    assert shared_share(windows, windows + 1000) == 0.0
    assert shared_share(windows, windows[:, 50:70]) == 1.0  # shorter than the usual sequence
