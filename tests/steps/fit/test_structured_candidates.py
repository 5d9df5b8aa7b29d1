"""Cuts as branches of a fit: what may win is made whole, and the result says what was cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny import save_tiny
from zoo import tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.steps.fitting.candidates import StructuredCandidate
from secateur.steps.fitting.models import ModelEvaluator

CUTS = (
    StructuredCandidate("one layer cut", "layers", {"keep_layers": 2}),
    StructuredCandidate("a third of the layers cut", "third", {"keep_layers": 0.67}),
    StructuredCandidate("half of the neurons cut", "ffn", {"ffn": 0.5}),
    StructuredCandidate("no such layers", "none", {"keep_layers": 9}),
)


@pytest.mark.slow
def test_a_cut_that_wins_is_packed_named_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget far below what formats reach without harm; an uncut rival is made to look bad."""
    save_tiny(tmp_path / "dense", num_hidden_layers=3, hidden_size=64, intermediate_size=128)
    save_windows(tiny_windows(6, 24), tmp_path / "windows.safetensors")
    monkeypatch.setattr("secateur.steps.fitting.candidates.STRUCTURED_CANDIDATES", CUTS)
    monkeypatch.setattr("secateur.steps.fitting.candidates.WORTH", -1.0)
    real = ModelEvaluator.packed

    def packed(self: ModelEvaluator, folder: Path) -> float:
        return real(self, folder) + (0.0 if "branches" in folder.parts else 100.0)

    monkeypatch.setattr(ModelEvaluator, "packed", packed)
    result = secateur.fit(
        tmp_path / "dense", output=tmp_path / "cut", calibration=tmp_path / "windows.safetensors",
        effort="fast", structure=True, max_size="75KiB",
    )  # fmt: skip
    outcomes = {one.name: one.outcome for one in result.branches}
    assert outcomes["a third of the layers cut"].startswith("the same cut")
    assert outcomes["no such layers"].startswith("cannot be cut")
    assert outcomes["one layer cut"].startswith("made")
    assert result.winner.name in ("one layer cut", "half of the neurons cut")
    assert result.packed.file_bytes <= result.winner.file_bytes <= 75 * 1024
    notes = tmp_path / "cut" / "secateur"
    steps = json.loads((notes / "steps" / "structure" / "steps.json").read_text())
    assert any(step["cut"] for step in steps)
    assert "one layer cut" in str(result)
    options = yaml.safe_load((notes / "recipe.yaml").read_text(encoding="utf-8"))
    assert "structure" in options["steps"][0]
    secateur.chain(options.pop("model"), **{**options, "output": tmp_path / "again"})
    for file in (tmp_path / "cut").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
