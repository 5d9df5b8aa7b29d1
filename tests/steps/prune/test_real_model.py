"""A short pass over a real pretrained model, SmolLM2-135M."""

from __future__ import annotations

from pathlib import Path

import pytest

import secateur

MODEL = "smollm2-135m"
SHORT = {"calibration": "boolq-calibration", "windows": 8, "sequence_length": 128}


def perplexity(model: str | Path) -> float:
    """On four short windows of text that was not used for calibration."""
    return secateur.evaluate(
        model, text="boolq-held-out", sequence_length=128, windows=4
    ).perplexity


@pytest.mark.slow
@pytest.mark.real_model
def test_pruned_and_measured(tmp_path: Path) -> None:
    found = {"dense": perplexity(MODEL)}
    for method in ("sparsegpt", "magnitude"):
        report = secateur.prune(
            MODEL, output=tmp_path / method, method=method, sparsity=0.5, **SHORT
        )
        assert report.sparsity == pytest.approx(0.5, abs=1e-3)
        assert report.manifest.cost.peak_resident_bytes < 2.5 * 2**30
        found[method] = perplexity(tmp_path / method)
    assert found["dense"] < 60
    assert found["dense"] < found["sparsegpt"] < found["magnitude"]
    assert found["sparsegpt"] < 6 * found["dense"]
