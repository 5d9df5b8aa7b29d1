"""A command run in this process, and what it printed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from secateur.calibration.windows import save_windows
from secateur.cli import main
from tiny import save_tiny
from zoo import tiny_windows


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command; every refusal has to be one that was raised on purpose."""

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), told.out, told.err)

    return run


@pytest.fixture
def refused(run: Callable[..., Outcome]) -> Callable[..., str]:
    """Run a command that has to be refused, and give what it said."""

    def refused(*words: object) -> str:
        done = run(*words)
        assert done.code in (1, 2), done
        assert done.err.lstrip().startswith("error: "), done.err
        assert "fault in secateur" not in done.err
        assert "remedy: " in done.err
        return done.err

    return refused


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model in float32."""
    return save_tiny(tmp_path / "model")


@pytest.fixture
def windows(tmp_path: Path) -> Path:
    """Calibration windows for it."""
    save_windows(tiny_windows(), tmp_path / "windows.safetensors")
    return tmp_path / "windows.safetensors"
