"""Iterative pruning: prune a part, retrain, then prune the next part by the new weights.

    round r of n:   mask = pattern(score of the kept weights, schedule(r / n))
                    rewind
                    retrain with the mask held

`rewind` selects what is reset before each retraining: nothing, the learning rate, or the weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from secateur.errors import CheckpointError, RecipeError
from secateur.registry import did_you_mean
from secateur.sparsity.schedules import Schedule, levels
from secateur.training.gradual import Criterion, renew
from secateur.training.masks import Masks, stored_masks
from secateur.training.saved import write_whole

REWINDS = ("none", "rate", "weights")


@dataclass(frozen=True)
class PruningRounds:
    """The settings of iterative pruning.

    `rewind` selects what is reset before each retraining:

    - `none`: nothing. One schedule of the learning rate covers all rounds. Han et al. 2015,
      arXiv:1506.02626, with our schedule of the learning rate in place of a constant low one;
    - `rate`: the learning rate starts again at `rewind_step`; the weights stay. Renda et al. 2020,
      "Comparing Rewinding and Fine-tuning in Neural Network Pruning", arXiv:2003.02389;
    - `weights`: the weights go back to their values at `rewind_step` too. This finds lottery
      tickets. Step 0: Frankle and Carbin 2019, arXiv:1803.03635. An early step: Frankle et al.
      2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", arXiv:1912.05671.

    Deviation from all of them: any score and any pattern can choose the weights.

    Args:
        schedule: the sparsity after each round. `geometric` prunes the same fraction of the
            remaining weights in each round.
        rounds: number of rounds; 1 is one-shot pruning.
        criterion: chooses the weights.
        rewind: `none`, `rate` or `weights`.
        rewind_step: the step of a training to return to.

    Raises:
        RecipeError: a number is out of range, or `rewind` has another value.
    """

    schedule: Schedule
    rounds: int
    criterion: Criterion = field(default_factory=Criterion)
    rewind: str = "rate"
    rewind_step: int = 0

    def __post_init__(self) -> None:
        levels(self.schedule, self.rounds)
        if self.rewind not in REWINDS:
            raise RecipeError(
                f"unknown rewinding {self.rewind!r}",
                remedy=did_you_mean(self.rewind, list(REWINDS)),
            )
        if self.rewind_step < 0:
            raise RecipeError(f"rewind_step is {self.rewind_step}", remedy="give 0 or more")
        if self.rewind_step and self.rewind == "none":
            raise RecipeError(
                f"rewind_step is {self.rewind_step}, but nothing goes back",
                remedy="leave it out, or set rewind to rate or weights",
            )

    def span(self, number: int, steps: int) -> tuple[int, int, int]:
        """Return the first and last step of a round, and the length of the schedule.

        Args:
            number: number of the round, 1 to `rounds`.
            steps: number of steps in one training.

        Raises:
            RecipeError: `rewind_step` is after the end of the training.
        """
        if self.rewind == "none":
            return (number - 1) * steps, number * steps, self.rounds * steps
        if self.rewind_step >= steps:
            raise RecipeError(
                f"rewind_step is {self.rewind_step}, but one training has {steps} steps",
                remedy="go back to an earlier step",
            )
        return self.rewind_step, steps, steps


@dataclass(frozen=True)
class Round:
    """The facts of one round that the retraining receives.

    Attributes:
        number: number of this round, 1 to `rounds`.
        rounds: number of all rounds.
        sparsity: current sparsity of the masks.
        folder: folder for the files of the retraining. They are removed after the weights of the
            round are saved. None saves nothing.
    """

    number: int
    rounds: int
    sparsity: float
    folder: Path | None = None


Retrain = Callable[[Round], None]
"""Trains the model in place and holds the masks."""


class KeepEarly:
    """A hook of the training loop that writes the weights to a file after a given step.

    Args:
        step: the step to write after, from 1. For step 0, call `write_weights` before training.
        file: the file of the weights.
    """

    def __init__(self, step: int, file: Path) -> None:
        self.step, self.file = step, file

    def on_step(self, step: int, steps: int, model: Any, optimizer: Any) -> None:
        """Called after the optimizer's step, 1 to `steps`."""
        if step == self.step:
            write_weights(model, self.file)

    def state(self) -> Mapping[str, Tensor]:
        """Nothing: the file is the state."""
        return {}


def write_weights(model: Any, file: Path) -> None:
    """Write all parameters of a model. The file is complete, or it does not exist.

    Raises:
        MemoryBudgetError: the disk is full.
    """
    write_whole(file, dict(model.named_parameters()))


@torch.no_grad()
def read_weights(model: Any, file: Path) -> None:
    """Overwrite the parameters of a model with the values in a file.

    Raises:
        CheckpointError: the file is missing.
        RecipeError: the file has other parameters or other shapes.
    """
    if not file.is_file():
        raise CheckpointError(
            "there are no weights to go back to",
            where=str(file),
            remedy="keep them with KeepEarly while the model is trained",
        )
    own = dict(model.named_parameters())
    with safe_open(file, framework="pt") as stored:
        shapes = {n: tuple(stored.get_slice(n).get_shape()) for n in stored.keys()}  # noqa: SIM118
        wrong = [n for n, p in own.items() if shapes.get(n) != tuple(p.shape)]
        wrong += [n for n in shapes if n not in own]
        if wrong:
            raise RecipeError(
                "the weights in the file are of another model",
                where=f"{', '.join(wrong[:4])} in {file}",
                remedy="rewind to weights of the same training",
            )
        for name, parameter in own.items():
            parameter.copy_(stored.get_tensor(name))


def prune_in_rounds(
    model: Any,
    kept: Mapping[str, Tensor],
    how: PruningRounds,
    retrain: Retrain,
    early: Path | None = None,
    saved: Path | None = None,
) -> list[Round]:
    """Prune and retrain a model in rounds, in place.

    With a folder, each round stores its masks and weights there. A second call with the same
    folder resumes. It loads the last finished round, and the masks of the next one if they are
    stored.

    Args:
        model: a trained model, dense or pruned.
        kept: the masks that `retrain` holds, True = kept, by parameter; changed in place.
        how: sparsities, criterion, rewinding.
        retrain: called once for each round.
        early: file of the early weights, with rewind `weights`; see `KeepEarly`.
        saved: folder for the state of a resumed call; None saves nothing.

    Returns:
        The rounds that this call did.

    Raises:
        CheckpointError: rewind `weights` needs a file of early weights, and there is none.
        VerificationError: `retrain` did not hold the masks.
    """
    found = _Saved(saved)
    finished, done = found.resume(model, kept), []
    for number, sparsity in enumerate(levels(how.schedule, how.rounds), start=1):
        if number <= finished:
            continue
        masks = found.masks(number)
        if masks is None:
            masks = how.criterion.masks(model, kept, sparsity)
            found.keep_masks(number, masks)
        if how.rewind == "weights":
            read_weights(model, early or Path())
        renew(model, kept, masks)
        this = Round(number, how.rounds, sparsity, found.folder(number))
        retrain(this)
        Masks(kept).check(model)
        found.keep_round(number, model)
        done.append(this)
    return done


class _Saved:
    """The files of a run in rounds.

    round-N/                      the retraining of round N, while it runs
    round-N.masks.safetensors     from the beginning of round N to the end of round N + 1
    round-N.weights.safetensors   from the end of round N to the end of round N + 1
    """

    def __init__(self, place: Path | None) -> None:
        self.place = place
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)

    def file(self, number: int, what: str) -> Path:
        """A file of a round."""
        return (self.place or Path()) / f"round-{number}.{what}.safetensors"

    def folder(self, number: int) -> Path | None:
        """The folder for the retraining of a round."""
        return None if self.place is None else self.place / f"round-{number}"

    def resume(self, model: Any, kept: Mapping[str, Tensor]) -> int:
        """Load the last finished round; returns its number, 0 for none."""
        if self.place is None:
            return 0
        finished = self.place.glob("round-*.weights.safetensors")
        numbers = [int(file.name.split(".")[0].removeprefix("round-")) for file in finished]
        number = max(numbers, default=0)
        for older in set(numbers) - {number}:
            self.forget(older)
        if number:
            read_weights(model, self.file(number, "weights"))
            for name, mask in (self.masks(number) or {}).items():
                kept[name].copy_(mask)
        return number

    def masks(self, number: int) -> dict[str, Tensor] | None:
        """The masks of a round, if they are stored."""
        file = self.file(number, "masks")
        stored = self.place is not None and file.exists()
        return dict(stored_masks(file)) if stored else None

    def keep_masks(self, number: int, masks: Mapping[str, Tensor]) -> None:
        """Store the masks of a new round."""
        if self.place is not None:
            write_whole(self.file(number, "masks"), masks)

    def keep_round(self, number: int, model: Any) -> None:
        """Store the weights of a finished round, and remove files that no resumed run needs."""
        if self.place is None:
            return
        write_weights(model, self.file(number, "weights"))
        self.forget(number - 1)
        shutil.rmtree(self.place / f"round-{number}", ignore_errors=True)

    def forget(self, number: int) -> None:
        """Remove the files of a round."""
        for what in ("weights", "masks"):
            self.file(number, what).unlink(missing_ok=True)
