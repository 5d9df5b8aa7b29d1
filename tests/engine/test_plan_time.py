"""The estimate of the time of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_tiny
from zoo import tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.engine import plan_time
from secateur.engine.plan_time import piece_seconds
from secateur.engine.prune.tasks import LinearTask, Settings
from secateur.sparsity.methods import compose, methods

INPUTS = {"column_norm", "gram", "column_mean", "column_variance"}


@pytest.mark.parametrize("method", sorted(methods))
def test_every_method_can_be_timed(method: str) -> None:
    composed = compose(method, "unstructured")
    task = LinearTask("x", (24, 32), composed, 0.5)
    gathering, _, solving = piece_seconds(task, Settings(), torch.device("cpu"))
    assert solving > 0
    assert (gathering > 0) == bool(composed.requires & INPUTS)


@pytest.mark.parametrize(("family", "linears", "groups"), [("llama", 21, 12), ("lfm2", 17, 12)])
def test_every_linear_and_token_counts(
    tmp_path: Path, family: str, linears: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second to gather a token, 1,000 to prepare a solver, a million to solve."""
    monkeypatch.setattr(plan_time, "piece_seconds", lambda *_: (1.0, 1e3, 1e6))
    monkeypatch.setattr(plan_time, "_forward_seconds", lambda *_: 1e9)
    monkeypatch.setattr(plan_time, "FILE_SECONDS", 0.0)
    save_windows(tiny_windows(4, 40), tmp_path / "w.safetensors")
    folder, times = save_tiny(tmp_path / "m", family), []
    for new in (0, 4):
        plan = secateur.prune(
            folder, dry_run=True, sparsity=0.5, method="wanda", generated_windows=new,
            calibration=tmp_path / "w.safetensors",
        )  # fmt: skip
        least, most = plan.seconds
        assert most / least == pytest.approx(plan_time.SLOWER / plan_time.QUICKER)
        assert plan.to_json()["seconds"] == (least, most)
        times.append(least / plan_time.QUICKER)
    assert times[0] == pytest.approx(160e9 + linears * 1e6 + groups * 1160)
    # 160 tokens are generated, and pass as the others do
    assert times[1] - times[0] == pytest.approx(320e9 + groups * 160)


def test_a_run_without_text_has_a_time(tmp_path: Path) -> None:
    plan = secateur.prune(save_tiny(tmp_path / "m"), dry_run=True, sparsity=0.5, method="magnitude")
    assert 0 < plan.seconds[0] < plan.seconds[1]
