"""A distillation chooses its learning rate by trials, and they leave no trace."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stopped_stage import StopAt, StoppedError
from tiny import save_tiny
from zoo import tiny_model, tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.errors import NumericalError
from secateur.progress import Silent
from secateur.recipes.shared import Distill, trial_steps
from secateur.training.distillation import DistillationData, choose_rate, distillation_plan
from secateur.training.loop import Loop, TrainingTask
from secateur.training.masks import Masks
from secateur.training.objectives import Distil, ModelTeacher
from secateur.training.training_plan import default_rate

HIGHEST = default_rate(32, tiny_windows(1).shape[1])
"""Of the tiny models."""


def data_of(windows: int, on_grid: bool = False) -> DistillationData:
    """One step for each window."""
    return DistillationData(torch.zeros(windows, 4).long(), Distill(epochs=1), 0, on_grid)


def choose(losses: dict[float, float], steps: int = 1, *, on_grid: bool = False) -> float:
    """The choice among rates with known losses. Every trial is followed by a reset, and the best
    so far is kept before.
    """
    calls: list[float | str] = []

    def train(rate: float, short: int) -> list[float]:
        assert short == trial_steps(steps)
        calls.append(losses[rate])
        return [losses[rate]] * short

    rate, found = choose_rate(
        1.0,
        data_of(steps, on_grid),
        train,
        lambda: calls[-1],
        lambda: calls.append("keep"),
        lambda: calls.append("reset"),
    )
    tried = [x for x in calls if isinstance(x, float)]
    best, expected = math.inf, []
    for loss in tried:
        expected += [loss, "keep", "reset"] if loss < best else [loss, "reset"]
        best = min(best, loss)
    assert calls == expected
    assert found == [best] * trial_steps(steps)
    return rate


def test_on_a_grid_a_trial_has_the_rate_of_the_training_and_higher_ones_are_tried() -> None:
    assert choose({1.0: 3.0, 2.0: 2.9, 4.0: 2.8}, steps=64, on_grid=True) == 4.0
    assert choose({1.0: 3.0, 2.0: 2.9, 4.0: 2.95}, steps=64, on_grid=True) == 2.0


def test_on_a_grid_lower_rates_are_tried_if_twice_is_worse() -> None:
    assert choose({1.0: 3.0, 2.0: 3.2, 0.5: 3.1}, steps=64, on_grid=True) == 1.0
    lower = {1.0: 3.0, 2.0: 3.2, 0.5: 2.9, 0.25: 2.95}
    assert choose(lower, steps=64, on_grid=True) == 0.5


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
    def train(rate: float, short: int) -> list[float]:
        if rate > 0.2:
            raise NumericalError("the loss is nan")
        return [1.0]

    for on_grid, rate in ((False, 0.25 / 4), (True, 0.25 / 2)):
        data = data_of(1, on_grid)
        found, _ = choose_rate(1.0, data, train, lambda: 1.0, lambda: None, lambda: None)
        assert found == rate


def test_sizes() -> None:
    assert [data_of(n).held_out for n in (1, 7, 8, 16, 32, 1000)] == [0, 0, 2, 4, 8, 8]
    assert [trial_steps(n) for n in (2, 8, 192, 1000)] == [1, 1, 24, 64]


def test_the_best_trial_is_the_beginning_of_the_training() -> None:
    """Oracle: its rate, for its steps, and then the rest of the windows at the chosen rate."""
    windows, steps = tiny_windows(8), {}
    options = {"method": "wanda", "sparsity": 0.5, "calibration": windows}
    chosen, dense = tiny_model("llama"), tiny_model("llama")

    class Steps(Silent):
        def start(self, label: str, count: int) -> None:
            steps.setdefault(label, []).append(count)

    secateur.prune(chosen, **options, distill_epochs=4, progress=Steps())
    assert set(steps["choosing the learning rate"]) == {4}  # an eighth of 32 steps
    assert steps["distilling"] == [28]
    data, same = DistillationData(windows, Distill(epochs=4), seed=0), []
    trial, rest = data.batches_of_trials, data.batches_after(4)
    for rate in (HIGHEST, HIGHEST / 4, HIGHEST / 16, HIGHEST / 64):
        again = tiny_model("llama")
        secateur.prune(again, **options)
        names = frozenset(n for n, _ in again.named_parameters() if ".layers." in n)
        objective, masks = Distil.between(again, ModelTeacher(dense)), Masks.of(again)
        for batches, count, peak in ((trial, 4, rate / 8), (rest, 28, rate)):
            plan = distillation_plan(count, peak)
            Loop(TrainingTask(again, batches, objective, masks, trained=names), plan).run()
        pairs = zip(chosen.parameters(), again.parameters(), strict=True)
        same.append(all(torch.equal(one, two) for one, two in pairs))
    assert same.count(True) == 1
    read = [trial.numbers(i)[0] for i in range(4)] + [rest.numbers(i)[0] for i in range(28)]
    assert sorted(read) == sorted(4 * list(range(8)))
    assert not {6, 7} & set(read[:4])


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


@pytest.mark.parametrize(("title", "step"), [("choosing the learning rate", 2), ("distilling", 3)])
@pytest.mark.parametrize("sweep_windows", [0, 2])
def test_a_run_stopped_anywhere_ends_with_the_same_bits(
    tmp_path: Path, title: str, step: int, sweep_windows: int
) -> None:
    folder, file = save_tiny(tmp_path / "model"), tmp_path / "windows.safetensors"
    save_windows(tiny_windows(8), file)
    options = {"method": "wanda", "sparsity": 0.5, "calibration": str(file), "distill_epochs": 4,
               "distill_sweep_windows": sweep_windows}  # fmt: skip
    whole = secateur.prune(folder, output=tmp_path / "whole", **options)
    with pytest.raises(StoppedError):
        secateur.prune(folder, output=tmp_path / "stopped", **options, progress=StopAt(title, step))
    again = secateur.prune(folder, output=tmp_path / "stopped", **options, resume=True)
    assert again.manifest.distillation == whole.manifest.distillation
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], two[name]) for name in one)
