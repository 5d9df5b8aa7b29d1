"""Curves for TensorBoard: every step, every validation, and nothing twice after a stop."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from learning import EXACT, batches, pruned_model

from secateur.errors import RecipeError
from secateur.training.loop import Loop
from secateur.training.masks import Masks
from secateur.training.objectives import NextToken
from secateur.training.training_plan import TrainingPlan

TRAINING = {"training/loss", "training/learning_rate", "training/gradient_norm"}


def loop(folder: Path, steps: int = 6) -> Loop:
    """A short training that draws."""
    model = pruned_model()
    how = TrainingPlan(steps=steps, validations=2, save_minutes=0, **EXACT)
    return Loop(
        model,
        batches(),
        NextToken.of(model),
        Masks.of(model),
        how,
        validation=batches().windows[:2],
        saved=folder / "saved",
        board=folder / "curves",
    )


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What is drawn, as TensorBoard reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "curves"))
    read.Reload()
    return {n: [(x.step, x.value) for x in read.Scalars(n)] for n in read.Tags()["scalars"]}


def test_every_step_and_validation_is_drawn(tmp_path: Path) -> None:
    done = loop(tmp_path).run()
    found = curves(tmp_path)
    assert found.keys() == TRAINING | {"validation/loss"}
    for name in TRAINING:
        wanted = [(x["step"], x[name.removeprefix("training/")]) for x in done.log]
        assert found[name] == [(step, pytest.approx(value)) for step, value in wanted]
    assert found["validation/loss"] == [(s, pytest.approx(v)) for s, v in done.validations]


def test_a_run_that_goes_on_draws_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Loop.step

    def failing(self: Loop) -> None:
        if self.outcome.step == 4:
            raise KeyboardInterrupt
        plain(self)

    monkeypatch.setattr(Loop, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path).run()
    monkeypatch.setattr(Loop, "step", plain)
    loop(tmp_path).run()
    log = (tmp_path / "saved" / "log.jsonl").read_text().splitlines()
    wanted = [(x["step"], pytest.approx(x["loss"])) for x in map(json.loads, log)]
    assert [step for step, _ in wanted] == [1, 2, 3, 4, 5, 6]
    assert curves(tmp_path)["training/loss"] == wanted


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "torch.utils.tensorboard":
            raise ImportError(name)
        return there(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(RecipeError, match="package tensorboard"):
        loop(tmp_path).run()
