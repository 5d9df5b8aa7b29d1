"""The end of memory during a run is an error that says what needs most, and nothing is lost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny
from zoo import tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.cli.errors import InternalError, to_error
from secateur.engine.plan import is_shortage
from secateur.engine.prune import run
from secateur.engine.prune.layer import OpenLayer
from secateur.errors import MemoryBudgetError


def allocate_too_much() -> None:
    """What torch raises where a processor's memory ends."""
    torch.empty(2**50)


def on_a_gpu() -> None:
    """What it raises where a GPU's memory ends."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.14 GiB")


@pytest.mark.parametrize("ends", [allocate_too_much, on_a_gpu])
def test_memory_that_ends_in_a_layer_is_explained_and_the_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: Any
) -> None:
    save_tiny(tmp_path / "dense", num_hidden_layers=3)
    save_windows(tiny_windows(4, 20), tmp_path / "windows.safetensors")
    options: dict[str, Any] = {
        "method": "sparsegpt", "sparsity": 0.5, "calibration": tmp_path / "windows.safetensors",
    }  # fmt: skip
    whole = run.prune_layer

    def prune_layer(layer: OpenLayer, *rest: Any) -> Any:
        if layer.index == 1:
            ends()
        return whole(layer, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(run, "prune_layer", prune_layer)
        with pytest.raises(MemoryBudgetError) as error:
            secateur.prune(tmp_path / "dense", output=tmp_path / "model", **options)
    assert "memory has ended: " in error.value.what
    assert re.search(r"the plan was \d+\.\d\d GiB", error.value.what)
    assert str(error.value.where).endswith("GiB")
    assert "resume" in str(error.value.remedy)
    secateur.prune(tmp_path / "dense", output=tmp_path / "model", resume=True, **options)
    secateur.prune(tmp_path / "dense", output=tmp_path / "again", **options)
    ours = load_file(tmp_path / "model" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.equal(ours[name], tensor), name


def test_other_errors_are_no_shortage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["secateur", "evaluate", "DIR"])
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path))
    assert is_shortage(MemoryError())
    assert not is_shortage(RuntimeError("shape '[2]' is invalid"))
    error = to_error(MemoryError())
    assert isinstance(error, MemoryBudgetError)
    assert "secateur evaluate DIR" in str(error.remedy)
    assert isinstance(to_error(RuntimeError("shape '[2]' is invalid")), InternalError)
