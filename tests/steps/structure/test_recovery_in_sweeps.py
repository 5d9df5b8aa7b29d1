"""A cut model learns from the uncut one with one decoder layer in memory."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from slow import slow
from stopped_stage import StopAt, StoppedError
from tiny import save_tiny, tensors_of
from torch import Tensor
from zoo import tiny_windows

import secateur
from secateur.calibration.windows import save_windows

OPTIONS: dict[str, Any] = {
    "keep_layers": 4, "ffn": 0.5, "effort": "fast", "distill_epochs": 3,
    "distill_learning_rate": 2e-3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def few_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few steps would have sweeps over one window."""
    monkeypatch.setattr("secateur.training.distilled_checkpoint.FEWEST_SWEEPS", 1)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "windows.safetensors"
    save_windows(tiny_windows(8, 24), file)
    return {**OPTIONS, "calibration": str(file)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", num_hidden_layers=6)


def moved(one: dict[str, Tensor], other: dict[str, Tensor], part: str) -> float:
    return sum(float((one[n] - other[n]).square().sum()) for n in one if part in n)


def test_sweeps_over_one_window_are_the_usual_steps(
    source: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no gradient is clipped, and but for the last norm, which learns only in memory."""
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda parameters, most: Tensor([0.0]))
    monkeypatch.setattr("secateur.machine._fast_bfloat16", lambda device: False)
    monkeypatch.setattr("secateur.training.objectives.TOP_K", 95)
    before = secateur.structure(
        source, output=tmp_path / "plain", **options | {"distill_epochs": 0}
    )
    assert before.manifest.distillation is None
    plain, found = tensors_of(tmp_path / "plain"), []
    for size in (0, 1):
        out = tmp_path / f"out-{size}"
        report = secateur.structure(
            source, output=out, **options, distill_next_token=1.0, distill_sweep_windows=size
        )
        record = report.manifest.distillation
        assert record["loss_after"] < record["loss_before"]
        assert record.get("sweep_windows", 0) == size
        found.append(tensors_of(out))
    assert moved(found[0], plain, ".layers.") > 1
    assert moved(found[0], found[1], ".layers.") < 0.05**2 * moved(found[0], plain, ".layers.")
    assert moved(found[1], plain, "model.norm") == 0
    assert torch.equal(found[1]["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])


def test_sweeps_take_over_where_both_models_do_not_fit_and_resume(
    source: Path, tmp_path: Path, options: dict[str, Any], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole = secateur.structure(
        source, output=tmp_path / "whole", **options, distill_sweep_windows=16
    )
    monkeypatch.setattr("secateur.engine.plan_memory.distilling_bytes", lambda *x: 2**60)
    with caplog.at_level(logging.WARNING), pytest.raises(StoppedError):
        secateur.structure(
            source, output=tmp_path / "out", **options, progress=StopAt("distilling", 7)
        )
    assert "sweeps of 16" in caplog.text
    monkeypatch.setattr("secateur.engine.plan_memory.distilling_bytes", lambda *x: 0)
    again = secateur.structure(source, output=tmp_path / "out", **options, resume=True)
    one, two = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert whole.manifest.distillation == again.manifest.distillation


@pytest.mark.parametrize("cut", [slow({"hidden_size": 24}), slow({"kv_groups": 0.5})])
def test_other_cuts_learn_in_sweeps_too(
    source: Path, tmp_path: Path, options: dict[str, Any], cut: dict[str, Any]
) -> None:
    options = {k: v for k, v in options.items() if k not in ("keep_layers", "ffn")}
    report = secateur.structure(
        source, output=tmp_path / "out", **options, **cut, distill_next_token=1.0,
        distill_sweep_windows=4,
    )  # fmt: skip
    record = report.manifest.distillation
    assert record["loss_after"] < record["loss_before"]


@pytest.mark.parametrize("size", [0, slow(4)])
def test_a_cut_mixture_learns(tmp_path: Path, options: dict[str, Any], size: int) -> None:
    """In memory its experts are fused, and in the file they may not be."""
    options = {k: v for k, v in options.items() if k not in ("keep_layers", "ffn")}
    report = secateur.structure(
        save_tiny(tmp_path / "model", "mixtral"), output=tmp_path / "out", **options,
        keep_layers=1, distill_sweep_windows=size,
    )  # fmt: skip
    record = report.manifest.distillation
    assert record["loss_after"] < record["loss_before"]
