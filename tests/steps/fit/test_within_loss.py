"""The smallest model within a loss: what was measured decides, and sizes close in on it."""

from __future__ import annotations

import pytest
from trained import LENGTH, save_trained, source_ids

import secateur
from secateur.calibration.windows import save_windows
from secateur.reporting.fit import FitResult
from secateur.steps.fit import STEP, SizeBracket

BOUND = 0.03


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    """A fit of a model that has learned, so that few bits lose much."""
    place = tmp_path_factory.mktemp("within-loss")
    save_trained(place / "dense", steps=100)
    windows = source_ids(held_out=True)[: 72 * LENGTH].view(72, LENGTH)
    save_windows(windows, place / "windows.safetensors")
    return secateur.fit(
        place / "dense", output=place / "small", max_loss_increase=BOUND, effort="fast",
        calibration=place / "windows.safetensors",
    )  # fmt: skip


def test_the_winner_is_the_smallest_that_was_made_within_the_bound(found: FitResult) -> None:
    rises = {one.file_bytes: one.rise for one in found.finalists}
    within = [size for size, rise in rises.items() if rise is not None and rise <= BOUND]
    assert found.winner.file_bytes == min(within)
    assert len(rises) == len(found.finalists)  # no model twice


def test_sizes_close_in_from_both_sides(found: FitResult) -> None:
    """No size is left out between the winner and the next smaller model that loses too much."""
    won = found.winner
    smaller = [one.file_bytes for one in found.finalists if one.file_bytes < won.file_bytes]
    assert smaller
    near = won.rise is not None and won.rise > 0.8 * BOUND
    assert near or max(smaller) > 0.93 * won.file_bytes


def tried(
    threshold: float, predicted: list[float], low: float = 100, high: float = 1000
) -> list[float]:
    """The sizes that are tried where models from a threshold on keep the bound."""
    bracket, sizes = SizeBracket(low, high), []
    for guess in predicted:
        if bracket.closed:
            break
        sizes.append(size := bracket.next(guess))
        bracket = bracket.after(size, keeps=size >= threshold)
    return sizes


def test_a_prediction_is_followed_until_both_sides_are_known() -> None:
    assert tried(300, [200, 250, 400, 333])[:3] == [200, 250, 400]
    assert tried(300, [200, 250, 400, 333])[3] == pytest.approx((250 * 400) ** 0.5)


@pytest.mark.parametrize("threshold", [100, 101, 300, 999])
@pytest.mark.parametrize("guess", [10, 100, 300, 1000, 5000])
def test_no_size_is_tried_twice_and_the_threshold_is_found(threshold: float, guess: float) -> None:
    """Whatever is predicted, even if it is always the same."""
    sizes = tried(threshold, [guess] * 30)
    assert len(set(sizes)) == len(sizes) <= 12
    kept = [size for size in sizes if size >= threshold]
    assert min(kept, default=1000) <= max(threshold / (1 - STEP), threshold + 2)
