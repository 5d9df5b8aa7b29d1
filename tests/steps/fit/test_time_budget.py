"""What does not fit into the minutes is dropped, by the times that were measured."""

from __future__ import annotations

from pathlib import Path

from secateur.steps.fitting.bench import TimeBudget


class Clock:
    """A clock that only a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_does_not_fit_by_the_longest_phase_is_named_once(tmp_path: Path) -> None:
    clock = Clock()
    budget = TimeBudget(1.0, tmp_path / "pace.json", 100.0, clock)
    assert budget.allows("more", "unmeasured")
    for seconds in (20.0, 5.0):
        with budget.phase("making"):
            clock.now += seconds
    assert budget.allows("more", "making")  # 25 of 60 seconds are gone
    clock.now += 16.0
    for what in ("more", "more", "cuts"):
        assert not budget.allows(what, "making")
    assert budget.dropped == ["more", "cuts"]
    again = TimeBudget(1.0, tmp_path / "pace.json", clock.now, clock)
    assert again.took == {"making": 20.0}
    assert again.allows("more", "making")
    assert TimeBudget(None, tmp_path / "pace.json", -1e12, clock).allows("anything", "making")
