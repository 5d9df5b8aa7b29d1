"""What tests of several rooms use."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from commands import Outcome, runner
from tiny import save_tiny
from zoo import tiny_windows

from secateur.calibration.windows import save_windows
from secateur.runs import environment
from secateur.sparsity.allocation.search import Search


@pytest.fixture(scope="session", autouse=True)
def _quicker_runs() -> Iterator[None]:
    """No file of a test has to outlive a power failure, and no package gets another version.

    Waiting for the disk and reading versions again took a tenth of the time of every run.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", os.fstat)  # the error of a bad descriptor is kept
        patched.setattr(environment, "version", functools.cache(environment.version))
        yield


@pytest.fixture
def short_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocation `search` has three levels and takes two small generations."""
    small = Search(levels=1, generations=2, offspring=2, stages=((2, 40), (1, 80)))
    values = tuple(getattr(small, field.name) for field in fields(Search))
    monkeypatch.setattr(Search.__init__, "__defaults__", values)


@pytest.fixture
def secateur(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Run a command in this process."""
    return runner(monkeypatch, capsys)


run = command = secateur
"""The same, where a file has the library under that name."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny Llama in float32 with its tokenizer."""
    return save_tiny(tmp_path / "model")


@pytest.fixture
def windows(tmp_path: Path) -> Path:
    """Calibration windows in a file."""
    save_windows(tiny_windows(), tmp_path / "windows.safetensors")
    return tmp_path / "windows.safetensors"


@pytest.fixture
def exact_matmuls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracles are compared digit by digit, on machines with fast bfloat16 too."""
    monkeypatch.setattr("secateur.machine._fast_bfloat16", lambda device: False)
