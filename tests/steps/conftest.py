"""What the tests of several verbs share."""

from __future__ import annotations

from pathlib import Path

import pytest
from zoo import tiny_windows

from secateur.calibration.windows import save_windows


@pytest.fixture(scope="session")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration windows in a file."""
    file = tmp_path_factory.mktemp("text") / "windows.safetensors"
    save_windows(tiny_windows(), file)
    return file
