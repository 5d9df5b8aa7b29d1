"""Gradual pruning: the training prunes a little more every few steps. Regrowth restores weights.

The pruning is a hook of the training loop. It changes the masks that the loop holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import RecipeError
from secateur.recipes.train import GradualOptions
from secateur.sparsity.schedules import Schedule
from secateur.training.selecting import Criterion, prunable


@dataclass(frozen=True)
class Gradual:
    """New masks every `every` steps, from the share `begin` to the share `end` of all steps
    (`GradualOptions`):

        sparsity = schedule((step − first) / (last − first))        cubic is usual

    The last renewal is exactly at `end`, whatever `every` is. In the remaining steps the masks do
    not change, and the kept weights recover.

    Paper: Zhu and Gupta 2017, arXiv:1710.01878 (schedule, and masks every n steps). With
    `regrowth`, after each renewal a fraction of the kept weights is exchanged for pruned ones of
    large gradient, as in GraNet, Liu et al. 2021, arXiv:2106.10404. The fraction falls along a half
    cosine, as in RigL, Evci et al. 2020, arXiv:1911.11134. Restored weights begin at 0, as in these
    papers. Deviations: the gradients come from the criterion's windows, not from the current batch;
    the last renewal restores no weight, because such a weight would have no steps to grow.

    Args:
        schedule: the sparsity from the first renewal to the last.
        criterion: chooses the weights.
        options: when masks are renewed, and how many weights are exchanged.

    Raises:
        RecipeError: the end is before the beginning, or there are no windows to take gradients
            from.
    """

    schedule: Schedule
    criterion: Criterion = field(default_factory=Criterion)
    options: GradualOptions = field(default_factory=lambda: GradualOptions())

    def __post_init__(self) -> None:
        begin, end = self.options.begin, self.options.end
        if begin > end:
            raise RecipeError(
                f"gradual pruning from {begin} to {end} of the steps",
                remedy="give shares with 0 <= begin <= end <= 1, for example 0 and 0.75",
            )
        if self.options.regrowth and self.criterion.windows is None:
            raise RecipeError(
                "regrowth takes gradients, but the criterion has no windows",
                remedy="give the criterion windows of token ids",
            )

    def due(self, step: int, steps: int) -> float | None:
        """Return the finished share of the pruning at a step; None if no renewal is due."""
        last = max(round(self.options.end * steps), 1)
        first = min(round(self.options.begin * steps), last - 1)
        if not first < step <= last or (step != last and (step - first) % self.options.every):
            return None
        return (step - first) / (last - first)

    def exchanged(self, done: float) -> float:
        """Return the fraction of the kept weights to exchange when this share is done."""
        return 0.5 * self.options.regrowth * (1 + math.cos(math.pi * done))


class GradualPruning:
    """The hook that renews the masks when a renewal is due.

    Args:
        kept: the masks that the loop holds, True = kept, by parameter, in its stored
            orientation. The hook changes them in place. `open_masks` makes them.
        how: the settings.
    """

    def __init__(self, kept: Mapping[str, Tensor], how: Gradual) -> None:
        self.kept, self.how = kept, how

    def on_step(self, step: int, steps: int, model: Any, optimizer: Any) -> None:
        """Called after the optimizer's step, 1 to `steps`.

        Raises:
            PatternError: the pattern cannot have the next sparsity.
            NumericalError: a score, or the loss behind the gradients, is not a number.
        """
        done = self.how.due(step, steps)
        if done is None:
            return
        sparsity, exchanged = self.how.schedule(done), self.how.exchanged(done)
        masks = self.how.criterion.masks(model, self.kept, sparsity, exchanged)
        renew(model, self.kept, masks, optimizer)

    def state(self) -> Mapping[str, Tensor]:
        """The masks."""
        return self.kept


def open_masks(model: Any) -> dict[str, Tensor]:
    """Masks of all matrices of the decoder layers: True wherever the weight is not zero."""
    linears = {f"{x.name}.weight": x for x in prunable(model)}
    return {name: x.module.get_parameter("weight").detach() != 0 for name, x in linears.items()}


@torch.no_grad()
def renew(
    model: nn.Module,
    kept: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Change masks in place, and set the newly pruned weights and their moments to 0.

    Restored weights begin at 0 with moments of 0, because the old mask held them there.

    Args:
        model: the model that owns the parameters.
        kept: the held masks; the function overwrites them.
        masks: the new masks.
        optimizer: the optimizer whose moments become 0; None if there is none yet.
    """
    for name, mask in masks.items():
        kept[name].copy_(mask)
        parameter = model.get_parameter(name)
        gone = ~kept[name]
        parameter.masked_fill_(gone, 0.0)
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        for moment in state.values():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                moment.masked_fill_(gone, 0.0)
