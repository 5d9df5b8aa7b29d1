"""What tests of several rooms use."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from commands import Outcome, runner


@pytest.fixture
def secateur(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Run a command in this process."""
    return runner(monkeypatch, capsys)
