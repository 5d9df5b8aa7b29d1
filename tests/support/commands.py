"""A command of `secateur`, run in this process, and what it printed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from secateur.cli import main


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def runner(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """A function that runs a command of these words."""

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), printed.out, printed.err)

    return run
