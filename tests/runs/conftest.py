"""Runs that are compared choose by times that are the same for both of them."""

from __future__ import annotations

import pytest
from fixed_times import use_fixed_times


@pytest.fixture(autouse=True)
def fixed_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of matrices and calls."""
    use_fixed_times(replace=monkeypatch.setattr)
