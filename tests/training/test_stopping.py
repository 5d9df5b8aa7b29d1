"""Stopped and gone on with: the same weights, bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from learning import EXACT, SEQUENCES, batches, pruned_model, watched, weights
from stopped_stage import StopAt, StoppedError

from secateur.recipes.train import GradualOptions
from secateur.sparsity.schedules import schedules
from secateur.training.gradual import GradualPruning
from secateur.training.loop import Loop, Outcome, TrainingTask
from secateur.training.masks import Masks, open_masks
from secateur.training.objectives import next_token
from secateur.training.training_plan import TrainingPlan


def loop_of(
    saved: Path | None, stop: StopAt | None = None, optimizer: str = "AdamW", gradual: bool = False
) -> Loop:
    """The training of these tests, from its beginning."""
    model = pruned_model()
    masks = Masks(open_masks(model)) if gradual else Masks.of(model)
    cubic, how = schedules["cubic"](0.8), GradualOptions(every=2, end=0.8)
    hooks = [GradualPruning(masks.kept, cubic, options=how)] if gradual else []
    watching = watched(SEQUENCES[:4])
    return Loop(
        TrainingTask(model, batches(), next_token(model), masks, watching, hooks),
        TrainingPlan(steps=8, optimizer=optimizer, save_minutes=0, validations=4, **EXACT),
        saved=saved,
        progress=stop,
    )


@pytest.fixture(scope="module")
def straight(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Path, Loop, Outcome]]:
    """Runs that nobody stops: the folder, the loop at its end, the outcome."""

    @functools.cache
    def whole(optimizer: str) -> tuple[Path, Loop, Outcome]:
        folder = tmp_path_factory.mktemp("straight")
        loop = loop_of(folder, optimizer=optimizer)
        return folder, loop, loop.run()

    return whole


def same(one: Loop, other: Loop, done: Outcome, again: Outcome) -> None:
    """Weights, losses and validations do not differ in a bit."""
    for name, value in weights(one.model).items():
        assert torch.equal(value, other.model.get_parameter(name)), name
    assert done.log == again.log
    assert done.validations == again.validations
    assert done.best_step == again.best_step


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Rprop", "NAdam"])
@pytest.mark.parametrize("stop", [1, 5])
def test_a_stopped_run_goes_on_as_if_nothing_had_been(
    optimizer: str, stop: int, straight, tmp_path: Path
) -> None:
    _, whole, done = straight(optimizer)
    with pytest.raises(StoppedError):
        loop_of(tmp_path / "stopped", StopAt("training", stop), optimizer).run()
    again = loop_of(tmp_path / "stopped", optimizer=optimizer)
    same(whole, again, done, again.run())


def test_masks_that_change_are_gone_on_with(tmp_path: Path) -> None:
    whole = loop_of(tmp_path / "straight", gradual=True)
    done = whole.run()
    with pytest.raises(StoppedError):
        loop_of(tmp_path / "stopped", StopAt("training", 3), gradual=True).run()
    again = loop_of(tmp_path / "stopped", gradual=True)
    same(whole, again, done, again.run())
    assert whole.masks is not None
    assert whole.masks.sparsity == pytest.approx(0.8, abs=0.01)


def test_a_finished_run_is_not_done_again(straight) -> None:
    folder, whole, done = straight("AdamW")
    again = loop_of(folder, StopAt("training", 9))  # one step after all eight
    same(whole, again, done, again.run())
