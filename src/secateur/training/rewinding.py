"""Pruning in rounds with retraining in between, and where each retraining begins.

    round r of n:   prune to schedule(r / n) by the weights of now
                    go back, or not
                    retrain with the masks held

What goes back makes the method: nothing, the learning rate, or the weights as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.errors import CheckpointError, RecipeError
from secateur.registry import did_you_mean
from secateur.sparsity.schedules import Schedule, levels
from secateur.training.gradual import renew
from secateur.training.masks import Masks
from secateur.training.selecting import Criterion

__all__ = ["Early", "KeepEarly", "Retrain", "Round", "Rounds", "prune_in_rounds"]

REWINDS = ("nothing", "rate", "weights")


@dataclass(frozen=True)
class Rounds:
    """Iterative pruning.

    `rewind` says what goes back before each retraining:

    - `nothing`: fine-tuning, Han et al. 2015, arXiv:1506.02626: weights go on, at a low rate;
    - `rate`: weights go on, the learning rate runs once more from the step `rewind_step`; Renda et
      al. 2020, "Comparing Rewinding and Fine-tuning in Neural Network Pruning", arXiv:2003.02389;
    - `weights`: iterative magnitude pruning for lottery tickets: all parameters go back to what
      they were at `rewind_step`, then the rest of training is done again. Step 0: Frankle and
      Carbin 2019, arXiv:1803.03635; an early step: Frankle et al. 2020, "Linear Mode Connectivity
      and the Lottery Ticket Hypothesis", arXiv:1912.05671, which larger models need.

    Deviation from all of them: any score and any pattern may choose the weights.

    Args:
        schedule: the sparsity after each round; `geometric` prunes the same fraction of what
            remains in each.
        rounds: how many; 1 is one-shot.
        criterion: by what weights are chosen.
        rewind: what goes back.
        rewind_step: of the training that made the dense weights.

    Raises:
        RecipeError: a number is out of range, or there is no such rewinding.
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
            raise RecipeError(
                f"rewinding to step {self.rewind_step}", remedy="give 0 for the initial weights"
            )


@dataclass(frozen=True)
class Round:
    """One round, as the retraining is told of it.

    Attributes:
        number: 1 to `rounds`.
        rounds: how many there are.
        sparsity: that has been reached.
        first_step: where the schedule of the learning rate begins; None with `nothing`, where the
            caller's low rate is meant.
    """

    number: int
    rounds: int
    sparsity: float
    first_step: int | None


Retrain = Callable[[Round], None]
"""Trains the model with the masks held, in place, from `first_step` to the end."""


@dataclass(frozen=True)
class Early:
    """The parameters of a model at an early step.

    Attributes:
        step: after how many steps; 0 for initial weights.
        parameters: by name, on the CPU.
    """

    step: int
    parameters: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, step: int = 0) -> Early:
        """The parameters of this moment, copied."""
        named = model.named_parameters()
        return cls(step, {n: p.detach().to("cpu", copy=True).contiguous() for n, p in named})

    @classmethod
    def load(cls, file: Path) -> Early:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file does not end in its step.
        """
        step = file.stem.rpartition("-")[2]
        if not step.isdecimal():
            raise CheckpointError("the name does not end in a step", where=str(file))
        return cls(int(step), load_file(file))

    def save(self, folder: Path) -> Path:
        """Write the parameters into a folder; returns the file, named by its step."""
        file = folder / f"early-{self.step:08d}.safetensors"
        save_file(dict(self.parameters), file)
        return file

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Overwrite the parameters of a model.

        Raises:
            RecipeError: it has others, or of other shapes.
        """
        own = dict(model.named_parameters())
        wrong = [n for n, p in own.items() if _shape(self.parameters.get(n)) != p.shape]
        wrong += [n for n in self.parameters if n not in own]
        if wrong:
            raise RecipeError(
                f"the early weights of step {self.step} are of another model",
                where=", ".join(wrong[:4]),
                remedy="rewind to weights of the same training",
            )
        for name, parameter in own.items():
            parameter.copy_(self.parameters[name])


class KeepEarly:
    """A hook of the training loop that keeps the parameters after a step.

    Args:
        step: after how many steps; for step 0 call `Early.of` before training.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.early: Early | None = None

    def on_step(self, step: int, steps: int, model: Any, optimizer: Any) -> None:
        """Called after the optimizer's step, 1 to `steps`."""
        if step == self.step:
            self.early = Early.of(model, step)


def prune_in_rounds(
    model: Any,
    kept: Mapping[str, Tensor],
    how: Rounds,
    retrain: Retrain,
    early: Early | None = None,
    finished: int = 0,
) -> list[Round]:
    """Prune and retrain a trained model in rounds, in place.

    Args:
        model: trained, dense or pruned already; weights of finished rounds if there are any.
        kept: the masks that `retrain` holds, True = kept, by parameter; changed in place.
        how: sparsities, criterion, rewinding.
        retrain: called once a round.
        early: the weights to go back to, with rewind `weights`.
        finished: rounds that an earlier run has done.

    Returns:
        The rounds that were done now.

    Raises:
        RecipeError: weights are to go back, and there are none of that step.
        VerificationError: `retrain` did not hold the masks.
    """
    if how.rewind == "weights" and (early is None or early.step != how.rewind_step):
        there = "none were kept" if early is None else f"those of step {early.step} are here"
        raise RecipeError(
            f"rewinding needs the weights of step {how.rewind_step}, but {there}",
            remedy="keep them with KeepEarly while the dense model is trained",
        )
    done = []
    for number, sparsity in enumerate(levels(how.schedule, how.rounds), start=1):
        if number <= finished:
            continue
        masks = how.criterion.masks(model, kept, sparsity)
        if how.rewind == "weights":
            assert early is not None
            early.restore(model)
        renew(model, kept, masks)
        first_step = None if how.rewind == "nothing" else how.rewind_step
        this = Round(number, how.rounds, sparsity, first_step)
        retrain(this)
        Masks(kept).check(model)
        done.append(this)
    return done


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return tensor.shape if tensor is not None else None
