"""Contenders in turns: each with its own checkpoint, and none heard twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from secateur.evaluation import speed

LOG: list[str] = []


class Scripted:
    """Stands in for a process; `slow` takes two seconds a token, `broken` ends after a round."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.rounds = name, folder, 0
        self.ready: dict[str, Any] = {}

    def load(self, prompt: Sequence[int], new_tokens: int) -> None:
        self.ready = {"resident_bytes": len(self.folder.name)}

    def ask(self, question: Any) -> dict[str, Any]:
        LOG.append(self.folder.name)
        self.rounds += 1
        if self.folder.name == "broken" and self.rounds == 2:
            return {"failure": "it broke"}
        each = 2.0 if self.folder.name == "slow" else 0.5
        # the first round warms up, and would show if it counted
        return {"each_token": each if self.rounds > 1 else 100.0, "first_token": 1.0}

    def end(self) -> None:
        LOG.append(f"end of {self.folder.name}")


def test_one_contender_with_several_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "Process", Scripted)
    LOG.clear()
    names = ["slow", "broken", "quick"]
    found = speed.take_turns(
        [("packed", Path(name)) for name in names], prompt=[1, 2], new_tokens=2, rounds=2
    )
    assert [s.name for s in found] == ["packed"] * 3
    assert found[0].each_token == (2.0, 2.0)
    assert found[1].failure == "it broke"
    assert found[2].each_token == (0.5, 0.5)
    assert [s.resident_bytes for s in found] == [4, 0, 5]
    ends = [f"end of {name}" for name in names]
    assert [*names, *names, "slow", "quick", *ends] == LOG
