"""A distillation chooses its learning rate by trials, and they leave no trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import secateur
from secateur.calibration.windows import save_windows
from secateur.errors import NumericalError
from secateur.progress import Silent
from secateur.training.distillation import RateTrials, held_out_windows, trial_steps
from secateur.training.training_plan import default_rate
from stopped_stage import StopAt, StoppedError
from tiny import save_tiny
from zoo import tiny_model, tiny_windows

HIGHEST = default_rate(32, tiny_windows(1).shape[1])
"""Of the tiny models."""


def choose(losses: dict[float, float], steps: int = 1) -> float:
    """The choice among rates with known losses; every trial is followed by a reset."""
    calls: list[str] = []
    now = [0.0]

    def train(rate: float, short: int) -> None:
        assert short == trial_steps(steps)
        calls.append("train")
        now[0] = losses[rate]

    found = RateTrials(train, lambda: now[0], lambda: calls.append("reset"), steps).choose(1.0)
    assert calls == ["train", "reset"] * (len(calls) // 2)
    return found


def test_the_rate_falls_by_quarters_while_the_loss_falls() -> None:
    assert choose({1.0: 2.0, 0.25: 2.1}) == 1.0
    assert choose({1.0: 2.0, 0.25: 1.9, 1 / 16: 1.95}) == 0.25
    assert choose({1.0: 2.0, 0.25: 1.9, 1 / 16: 1.8, 1 / 64: 1.7}) == 1 / 64
    assert choose({1.0: 2.0, 0.25: 2.0}) == 1.0


def test_the_longer_training_gets_the_higher_rate() -> None:
    assert choose({1 / 8: 2.0, 1 / 32: 2.1}, steps=512) == 1.0
    assert choose({1 / 8: 2.0, 1 / 32: 1.9, 1 / 128: 1.95}, steps=512) == 0.25
    falling = {1 / 8: 2.0, 1 / 32: 1.9, 1 / 128: 1.8, 1 / 512: 1.7}
    assert choose(falling, steps=512) == 1 / 64


def test_a_lost_trial_is_no_choice() -> None:
    def train(rate: float, short: int) -> None:
        if rate > 0.2:
            raise NumericalError("the loss is nan")

    assert RateTrials(train, lambda: 1.0, lambda: None, 1).choose(1.0) == 0.25 / 4


def test_sizes() -> None:
    assert [held_out_windows(n) for n in (1, 7, 8, 16, 32, 1000)] == [0, 0, 2, 4, 8, 8]
    assert [trial_steps(n) for n in (2, 8, 192, 1000)] == [1, 2, 48, 64]


def test_trials_change_nothing_but_the_rate() -> None:
    windows = tiny_windows(8)
    options = {"method": "wanda", "sparsity": 0.5, "calibration": windows, "distill_epochs": 2}
    chosen, given = tiny_model("llama"), tiny_model("llama")
    rates: list[float] = []

    class Rates(Silent):
        def start(self, label: str, steps: int) -> None:
            rates.append(float(steps)) if label.startswith("choosing") else None

    secateur.prune(chosen, **options, progress=Rates())
    assert len(rates) >= 2
    assert set(rates) == {4.0}  # a quarter of 16 steps
    same = []
    for factor in (1, 1 / 4, 1 / 16, 1 / 64):
        given = tiny_model("llama")
        secateur.prune(given, **options, distill_learning_rate=HIGHEST * factor)
        pairs = zip(chosen.parameters(), given.parameters(), strict=True)
        same.append(all(torch.equal(one, two) for one, two in pairs))
    assert same.count(True) == 1


def test_a_rate_that_hurts_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = tiny_windows(16)
    monkeypatch.setattr("secateur.training.distillation.default_rate", lambda *_: 0.4)
    losses = []
    for rate in (None, 0.4):
        model, dense = tiny_model("llama"), tiny_model("llama")
        secateur.prune(
            model, method="wanda", sparsity=0.5, calibration=windows, distill_epochs=2,
            distill_learning_rate=rate,
        )  # fmt: skip
        with torch.no_grad():
            log_p, log_q = (m(windows).logits.log_softmax(-1) for m in (dense, model))
        losses.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
    assert losses[0] < losses[1]


def test_a_resumed_run_keeps_the_rate(tmp_path: Path) -> None:
    folder, file = save_tiny(tmp_path / "model"), tmp_path / "windows.safetensors"
    save_windows(tiny_windows(8), file)
    options = {"method": "wanda", "sparsity": 0.5, "calibration": str(file), "distill_epochs": 2}
    whole = secateur.prune(folder, output=tmp_path / "whole", **options)

    stop = StopAt("distilling", 0)
    with pytest.raises(StoppedError):
        secateur.prune(folder, output=tmp_path / "stopped", **options, progress=stop)
    (stored,) = (tmp_path / "stopped.partial").rglob("rate.json")
    rate = json.loads(stored.read_text())["learning_rate"]
    assert rate == whole.manifest.distillation["learning_rate"]
    assert not list((tmp_path / "stopped.partial").rglob("start"))
    stored.write_text(json.dumps({"learning_rate": rate / 2}))
    again = secateur.prune(folder, output=tmp_path / "stopped", **options, resume=True)
    assert again.manifest.distillation["learning_rate"] == rate / 2
