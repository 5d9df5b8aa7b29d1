"""The plan of a training: length, learning rate, optimizer. The defaults are safe."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import nn

from secateur.engine.prune.tasks import last_match
from secateur.errors import RecipeError
from secateur.models.attention import writes_out
from secateur.recipes.train import OptimizerOptions
from secateur.registry import did_you_mean

RATE_TIMES_WIDTH = 0.25
TOKENS_AT_ONCE = 2048
TOKENS_OF_RATE = 2048
"""Number of tokens in a step for which the default rate was chosen."""
NEED_MORE = {"LBFGS", "SparseAdam", "Optimizer"}
"""Optimizers that need a closure, or gradients of another kind."""
NEED_ALL = {"adafactor", "rprop"}
"""Optimizers whose steps torch cannot do where processes, or the host, have parts of a weight."""


class TrainingPlan(OptimizerOptions):
    """The learning rate rises over the first `warm_up` of the run and falls to 0 along half a
    cosine. The length of the run is `steps`, or `minutes`, measured by the clock.

    A pruned model is near a good one, so it needs small steps. The default learning rate is about a
    tenth of the usual rate for training a model of this width from scratch. The options of the
    optimizer are those of the recipe (`OptimizerOptions`). Of `rates`, the last match counts.

    Args:
        steps: number of steps of the optimizer; 0 with `minutes`.
        minutes: duration of the run in place of steps, including validation and saving.
        first_step: the step at which the training begins, in the middle of this schedule.
        last_step: the step after which it ends; 0 for the last one.
        micro_batch: maximum number of windows in one forward and backward; None means about 2048
            tokens. A step adds up the gradients of its parts.
        gradient_checkpointing: decoder layers keep only their inputs, and the backward runs them
            again.
        fast_matmuls: compute products in bfloat16 if the processor is faster at it. Weights and
            moments are always in float32.
        validations: number of validations during the run, besides the first; 0 for none.
        save_minutes: minutes between saves.
        diverged: limit of the median of the last losses, as a multiple of its lowest value so
            far; a tenth of the first loss is added. 0 sets no limit.

    Raises:
        RecipeError: there is no length or two, a rate is negative, or there is no such optimizer.
        pydantic.ValidationError: a number is out of range.

    Example:
        >>> from secateur.training.training_plan import TrainingPlan
        >>> plan = TrainingPlan(steps=100, warm_up=0.1)
        >>> peak = plan.peak(width=576, tokens=2048)
        >>> peak
        0.00043402777777777775
        >>> [round(plan.rate(done, 0.01, peak) / peak, 2) for done in (0, 0.09, 0.5, 0.99)]
        [0.1, 0.98, 0.5, 0.0]
    """

    steps: int = Field(0, ge=0)
    minutes: float = Field(0.0, ge=0)
    first_step: int = 0
    last_step: int = 0
    micro_batch: int | None = Field(None, gt=0)
    gradient_checkpointing: bool = False
    fast_matmuls: bool = True
    validations: int = 10
    save_minutes: float = 5.0
    diverged: float = 2.0

    @model_validator(mode="after")
    def check_plan(self) -> TrainingPlan:
        """One length, no negative rates, and an optimizer of torch."""
        if (self.steps > 0) == (self.minutes > 0):
            raise RecipeError(
                f"{self.steps} steps, {self.minutes} minutes",
                remedy="give the length to train, either in steps or in minutes",
            )
        if any(factor < 0 for factor in self.rates.values()):
            raise RecipeError("clip and rates cannot be negative", remedy="0 turns them off")
        if self.optimizer.lower() not in optimizers():
            raise RecipeError(
                f"torch has no optimizer {self.optimizer!r} that can be used here",
                remedy=did_you_mean(self.optimizer, [x.__name__ for x in optimizers().values()]),
            )
        return self

    def peak(self, width: int, tokens: int) -> float:
        """The highest learning rate.

        Args:
            width: hidden size of the model.
            tokens: number of tokens in a step, of all processes.
        """
        return self.learning_rate or default_rate(width, tokens)

    def rate(self, done: float, step_share: float, peak: float) -> float:
        """The learning rate of a step.

        Args:
            done: share of the run that is finished before the step.
            step_share: share of the run that the step takes.
            peak: the highest learning rate.
        """
        # counted with this step, so the first one has a rate above 0
        warm = min(1.0, (done + step_share) / self.warm_up) if self.warm_up else 1.0
        return peak * warm * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def at_once(self, length: int) -> int:
        """The number of windows of this length in one forward."""
        return self.micro_batch or max(1, TOKENS_AT_ONCE // length)

    def writes_out(self, device: torch.device, length: int) -> bool:
        """Whether attention keeps its probabilities; see `secateur.models.attention`."""
        saving = self.gradient_checkpointing or not self.fast_matmuls
        return not saving and writes_out(device, length)

    def factor(self, name: str) -> float:
        """The factor of the learning rate of a parameter."""
        factor = last_match(self.rates, name)
        return 1.0 if factor is None else factor

    def make_optimizer(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> Any:
        """Make the optimizer of the trained parameters. Each group has its `factor`.

        Raises:
            RecipeError: the optimizer does not take the options, or these parameters.
        """
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in parameters:
            groups.setdefault(self.factor(name), []).append(parameter)
        kind = optimizers()[self.optimizer.lower()]
        # the loop sets the rate before every step
        options = {"lr": 0.0, **DEFAULTS.get(kind.__name__, {}), **self.optimizer_options}
        sharded = any(hasattr(p, "to_local") for group in groups.values() for p in group)
        fuses = kind in FUSED_IN_PARTS or not sharded
        if fuses and "fused" in inspect.signature(kind).parameters:
            options.setdefault("fused", True)
        groups_of_torch = [{"params": group, "factor": factor} for factor, group in groups.items()]
        try:
            return kind(groups_of_torch, **options)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RecipeError(
                f"{kind.__name__} cannot be made: {str(error).splitlines()[0]}",
                where=f"optimizer_options: {dict(self.optimizer_options)}",
                remedy="see its page in the documentation of torch.optim",
            ) from error


BATCH = 4
"""Windows of a step, unless the processes need more."""


def shared_batch(given: int | None, processes: int) -> int:
    """The number of windows of a step, of which every process reads as many.

    Args:
        given: the number; None takes the first multiple of the processes from `BATCH` on.
        processes: the number of processes.

    Raises:
        RecipeError: the processes cannot share the windows.

    Example:
        >>> from secateur.training.training_plan import shared_batch
        >>> [shared_batch(None, processes) for processes in (1, 2, 3, 8)]
        [4, 4, 6, 8]
    """
    batch = given or -(-BATCH // processes) * processes
    if batch % processes:
        raise RecipeError(
            f"{processes} processes cannot share the {batch} windows of a step",
            remedy="make the batch a multiple of the number of processes, or leave it out",
        )
    return batch


FUSED_IN_PARTS = (torch.optim.Adam, torch.optim.AdamW)
"""Optimizers whose fused kernels also take tensors that are divided among processes."""

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "AdamW": {"betas": (0.9, 0.95), "weight_decay": 0.0},
    "Adam": {"betas": (0.9, 0.95)},
    "SGD": {"momentum": 0.9},
}
"""Defaults that differ from torch: language models use a shorter average of squares."""


def default_rate(width: int, tokens: int) -> float:
    """Return 0.25 / width · √(tokens / 2048), with the root at most 1: the default learning rate.

    Adam's best rate falls as 1 / width (Yang et al. 2022, arXiv:2203.03466). Fewer tokens in a step
    make its gradient noisier, and Adam normalises the noise to full size. So its best rate falls
    with the root of the number of tokens (Malladi et al. 2022, arXiv:2205.10287).

    Args:
        width: hidden size of the model.
        tokens: number of tokens in a step, of all processes.
    """
    return RATE_TIMES_WIDTH / width * math.sqrt(min(1.0, tokens / TOKENS_OF_RATE))


def optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """The optimizers of torch, by their lower-case names."""
    return {
        name.lower(): kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type)
        and issubclass(kind, torch.optim.Optimizer)
        and name not in NEED_MORE
    }
