"""Contenders in turns: each with its own checkpoint, and none heard twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur import timing
from secateur.evaluation import speed

LOG: list[str] = []


class Scripted(speed.Process):
    """Stands in for a process; `slow` takes two seconds a token, `broken` ends after a round."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.asked = name, folder, 0
        self.rounds = []
        self.ready: dict[str, Any] = {}

    def load(self, prompt: Sequence[int], new_tokens: int, device: str) -> None:
        self.ready = {"resident_bytes": len(self.folder.name)}

    def ask(self, question: Any) -> dict[str, Any]:
        LOG.append(self.folder.name)
        self.asked += 1
        if self.folder.name == "broken" and self.asked == 2:
            return {"failure": "it broke"}
        each = 2.0 if self.folder.name == "slow" else 0.5
        return {"each_token": each, "first_token": 1.0}

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
    assert [*names, *names, *ends] == LOG


def test_no_round_begins_when_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "Process", Scripted)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    [found] = speed.take_turns(
        [("packed", Path("quick"))], prompt=[1, 2], new_tokens=2, rounds=50, seconds=25
    )
    assert len(found.each_token) == 4  # the clock is read before the third round, and so on
    [found] = speed.take_turns(
        [("packed", Path("quick"))], prompt=[1, 2], new_tokens=2, rounds=50, seconds=1e-9
    )
    assert len(found.each_token) == 2  # two are made in any case


@pytest.mark.parametrize("bias", [True, False])
def test_int8_of_torch_is_the_linear_with_rounded_weights(bias: bool) -> None:
    linear = torch.nn.Linear(32, 16, bias=bias)
    x = torch.randn(2, 3, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        ours = speed._TorchInt8(linear)(x).float()
        assert torch.allclose(ours, linear(x.float()), atol=0.05)
