"""Times of calls on a busy machine: measured again while they cannot be, and else said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fixed_times import PARENT

from reporting.examples import write_draft
from secateur.evaluation.acceptance import too_fast
from secateur.reporting.fit import DraftResult
from secateur.runs.records import read_record
from secateur.steps import draft as drafts
from secateur.steps.draft import TRIALS, TURNS, time_calls
from secateur.timing import seconds_of


@dataclass
class Clock:
    """A machine that is busy for a while: calls of two tokens take a hundred times as long.

    Attributes:
        busy: for how many calls of two tokens.
        now: seconds.
        calls: of the parent with two tokens.
    """

    busy: int
    now: float = 0.0
    calls: int = 0

    def step(self, name: str, tokens: Sequence[Any]) -> None:
        """A call."""
        slow = name == "parent" and len(tokens) == 2
        self.calls += slow
        own = 0.25 if name == "draft" else PARENT[len(tokens) - 1]
        self.now += own * (100 if slow and self.calls <= self.busy else 1)


def timed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The times of a parent and its draft by this clock."""

    class Decoder:
        together = len(PARENT)
        lengths = (8,)

        def __init__(self, model: str, capacity: int) -> None:
            self.model = model

        def read(self, slot: int, ids: Any) -> None: ...

        def rewind(self, slot: int, length: int) -> None: ...

        def step(self, tokens: Sequence[Any]) -> None:
            clock.step(self.model, tokens)

    monkeypatch.setattr(drafts, "SlotDecoder", Decoder)
    monkeypatch.setattr(drafts, "seconds_of", lambda call: seconds_of(call, lambda: clock.now))
    return time_calls("parent", "draft", torch.arange(8))


def test_other_work_in_most_turns_changes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    parents, draft = timed(clock := Clock(busy=TURNS - 2), monkeypatch)
    assert parents == pytest.approx(PARENT)
    assert draft == pytest.approx(0.25)
    assert clock.calls == TURNS + 1  # one warms up


def test_times_that_cannot_be_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    parents, _ = timed(clock := Clock(busy=2 * TURNS), monkeypatch)
    assert parents == pytest.approx(PARENT)
    assert clock.calls == 2 * TURNS + 1


def test_it_ends_where_the_machine_stays_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    parents, _ = timed(clock := Clock(busy=10**6), monkeypatch)
    assert too_fast(parents) == (2, 3)
    assert clock.calls == TRIALS * TURNS + 1


def shown(result: DraftResult) -> str:
    return " ".join(str(result).split())


def test_what_is_not_known_is_said(tmp_path: Any) -> None:
    file = write_draft(tmp_path / "draft") / "secateur" / "draft.json"
    result = read_record(DraftResult, file)
    assert not result.broken
    assert "secateur generate" in shown(result)
    times = (0.015, 0.135, 0.00084, *result.parent_seconds[3:])
    result = result.model_copy(update={"parent_seconds": times})
    (said,) = result.broken
    assert "135.00 ms" in said
    assert "0.84 ms" in said


def test_a_draft_that_does_not_pay_is_not_recommended(tmp_path: Any) -> None:
    file = write_draft(tmp_path / "slow", speedup=1.01) / "secateur" / "draft.json"
    text = shown(read_record(DraftResult, file))
    assert "1.01 x" in text
    assert "secateur generate" not in text
    assert "faster" not in text.partition("next:")[2]
    assert "secateur bench" in text
