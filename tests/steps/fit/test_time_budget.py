"""What does not fit into the minutes is dropped, by the times that were measured."""

from __future__ import annotations

from pathlib import Path

from secateur.steps.fitting.models import TimeBudget


class Clock:
    """A clock that only a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_are_measured_and_kept(tmp_path: Path) -> None:
    clock = Clock()
    budget = TimeBudget(1.0, tmp_path / "pace.json", 100.0, clock)
    for seconds in (20.0, 5.0):
        with budget.phase("level"):
            clock.now += seconds
    assert budget.expected("level") == 20.0
    assert budget.expected("level", "level", "unknown") == 40.0
    assert budget.left == 35.0
    again = TimeBudget(1.0, tmp_path / "pace.json", clock.now, clock)
    assert again.expected("level") == 20.0
    assert again.left == 60.0


def test_what_does_not_fit_is_named_once(tmp_path: Path) -> None:
    clock = Clock()
    budget = TimeBudget(1.0, tmp_path / "pace.json", 100.0, clock)
    assert budget.allows("more", 60.0)
    assert not budget.allows("more", 61.0)
    clock.now += 59.0
    assert not budget.allows("cuts", 2.0)
    assert not budget.allows("cuts", 2.0)
    assert budget.dropped == ["more", "cuts"]


def test_without_minutes_everything_fits(tmp_path: Path) -> None:
    budget = TimeBudget(None, tmp_path / "pace.json", 0.0, Clock())
    assert budget.allows("anything", 1e12)
    assert budget.dropped == []
