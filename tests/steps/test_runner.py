"""What the runner does for every verb."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import save_tiny

import secateur
from secateur.errors import MemoryBudgetError

OPTIONS = {"method": "magnitude", "sparsity": 0.5}


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    left = SimpleNamespace(total=usage.total, used=usage.total, free=100)
    monkeypatch.setattr("shutil.disk_usage", lambda place: left)


def test_a_run_that_does_not_fit_on_the_disk_writes_nothing(
    tmp_path: Path, full_disk: None
) -> None:
    dense = save_tiny(tmp_path / "dense")
    with pytest.raises(MemoryBudgetError, match=r"0\.00 MiB"):
        secateur.prune(dense, output=tmp_path / "out", **OPTIONS)
    assert [file.name for file in tmp_path.iterdir()] == ["dense"]


def test_a_finished_run_needs_no_disk(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    dense = save_tiny(tmp_path / "dense")
    made = secateur.prune(dense, output=tmp_path / "out", **OPTIONS)
    request.getfixturevalue("full_disk")
    again = secateur.prune(dense, output=tmp_path / "out", resume=True, **OPTIONS)
    assert again.manifest.cost == made.manifest.cost  # read, not made again
