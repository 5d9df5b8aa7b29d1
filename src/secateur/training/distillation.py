"""Distillation: a pruned or cut model learns the next-token predictions of the dense one.

Layer-wise methods only bring the hidden states near the dense model's. The next-token predictions
matter more. So all decoder layers are trained together on the calibration windows, with one window
a step. `layerwise.py` does the same with one decoder layer in memory.

Short trials choose the learning rate, and the best of them is the beginning of the training:

    a trial:     the model learns for T of the S steps, with a whole schedule of the rate;
                 T = S/8, at most 64
    its loss:    the mean over a few windows that no trial reads
    its rate:    T/S of the highest, a quarter of that, and further down while the loss falls
    the choice:  S/T times the rate of the best trial
    the rest:    S − T steps from the weights of the best trial, on the windows that are left

The best rate depends on how much a model has lost: what repairs a model that lost much hurts one
that lost little, because Adam moves every weight by about the rate, however small the gradient is.
It also depends on the number of steps. The noise of the gradients moves every weight once by about
the rate, and this harm does not grow with the steps. What is learned grows by the rate in each
step. So the best rate of S steps is about S/T times that of T steps (docs/methods/distillation.md).

Weights on grids of few integers learn straight through: nothing changes before a weight has moved
by about half a step of its grid, and too high a rate moves many back and forth. There the best rate
does not depend on the number of steps. So a trial has the rate of the training: the usual highest
one, then twice and four times that while the loss falls. If twice is worse: half of it, and so on.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.calibration.run_windows import MOST_HELD_OUT
from secateur.engine.prune.reconstruction import RoundedWeight, RoundedWeights, in_float32
from secateur.engine.prune.tasks import Tasks
from secateur.errors import NumericalError
from secateur.machine import fast_matmuls
from secateur.models.architecture import Linear, describe, hidden_size
from secateur.models.skeleton import quiet_transformers
from secateur.models.targets import Target
from secateur.progress import Progress
from secateur.quantization.blocks import BlockGrid, Blocks
from secateur.quantization.groups import GroupGrid
from secateur.recipes.shared import Distill, trial_steps
from secateur.runs.output import write_json
from secateur.sparsity.column_sweep import kept_weights
from secateur.training.batches import Batch, Batches
from secateur.training.loop import Loop, TrainingTask
from secateur.training.masks import Masks
from secateur.training.objectives import Distil, ModelTeacher
from secateur.training.process_group import ProcessGroup
from secateur.training.saved import Saved
from secateur.training.training_plan import TrainingPlan, default_rate
from secateur.types import Windows

TRIED = "tried.json"
"""The file with the losses of finished trials, by rate."""

WINNER = "winner"
"""The folder with the weights of the best trial so far."""

CHOOSING = "choosing the learning rate"
"""The title of the progress bar of a trial."""

WARM_UP = 1 / 16
SAVE_MINUTES = 5.0

FEWEST_WINDOWS = 8
"""With fewer windows nothing is held out, and the highest rate is taken."""

LOWEST, MOST_ON_GRID = 1 / 64, 4.0
"""The lowest choice and, for weights on grids, the highest, as multiples of the usual highest."""


@dataclass(frozen=True)
class DistillationData:
    """What a smaller model learns from, one window a step.

    Args:
        windows: calibration tokens [samples, sequence_length].
        options: how often they are read, the learning rate, the terms of the loss.
        seed: seed of the order of the windows.
        on_grid: whether weights learn on grids of few integers, so that trials have the rate of the
            training.
    """

    windows: Windows
    options: Distill
    seed: int
    on_grid: bool = False

    @property
    def steps(self) -> int:
        """The number of steps."""
        return self.options.epochs * len(self.windows)

    @property
    def held_out(self) -> int:
        """How many of the last windows measure the trials; 0 for no trials."""
        count = len(self.windows)
        if self.options.peak_learning_rate or count < FEWEST_WINDOWS:
            return 0
        return min(MOST_HELD_OUT, count // 4)

    def highest_rate(self, width: int) -> float:
        """The learning rate of the options, or the highest one of a model of this width."""
        return self.options.peak_learning_rate or default_rate(width, self.windows.shape[1])

    @property
    def batches(self) -> Batches:
        """The window of each step."""
        return Batches(self.windows, 1, self.seed)

    @property
    def batches_of_trials(self) -> Batches:
        """The window of each step of a trial: none of the last ones."""
        return replace(self.batches, windows=self.windows[: -self.held_out])

    def batches_after(self, tried: int) -> Batches:
        """The window of each step after a trial of so many steps.

        Both together read every window as often as a training without a trial.
        """
        if not tried:
            return self.batches
        trial = self.batches_of_trials
        read = Counter(trial.numbers(step)[0] for step in range(tried))
        left = []
        for step in range(self.steps):
            (number,) = self.batches.numbers(step)
            if read[number]:
                read[number] -= 1
            else:
                left.append(number)
        return replace(self.batches, chosen=lambda step: (left[step],))


Losses = list[float]
"""The loss of each step."""


@dataclass(frozen=True)
class Student:
    """A module that learns, with the zeros and grids that it must keep.

    Args:
        model: the pruned or cut model in eval mode, or a module with some of its layers.
        trained: names of the trained parameters.
        width: the model's hidden size.
        masks: masks to hold.
        rounded: the matrices that stay on their grids.
    """

    model: Any
    trained: frozenset[str]
    width: int
    masks: Masks = field(default_factory=lambda: Masks({}))
    rounded: RoundedWeights = field(default_factory=lambda: RoundedWeights(()))

    @classmethod
    def of(cls, model: Any, target: Target, tasks: Tasks, layers: Collection[int]) -> Student:
        """Make the student for some pruned layers of a model.

        Args:
            model: a module in which the parameters have their names in the model.
            target: the model, for names and sizes; it may be empty.
            tasks: the task of each linear.
            layers: numbers of the layers that learn.
        """
        # with the dot: layer 1 is no prefix of layer 10
        starts = tuple(f"{target.architecture.layer_name(index)}." for index in layers)
        own = {name: task for name, task in tasks.items() if name.startswith(starts)}
        trained = [name for index in layers for name in trainable_names(target, index)]
        grids: dict[str, GroupGrid | Blocks | None] = {}
        for name, task in own.items():
            stored, grid = target.blocks(f"{name}.weight"), task.method.solver.grid
            if stored is not None:
                grids[name] = stored.blocks
            elif task.rounded and not isinstance(grid, BlockGrid):
                grids[name] = grid
        # A kept weight on a grid may be rounded to 0; its −0 tells it from a pruned one.
        kept = {}
        for name in (name for name, task in own.items() if task.sparsity > 0):
            weight = model.get_parameter(f"{name}.weight").detach()
            kept[f"{name}.weight"] = kept_weights(weight) if grids.get(name) else weight != 0
        rounded = (
            RoundedWeight(Linear(name, model.get_submodule(name)), grid)
            for name, grid in grids.items()
        )
        width = hidden_size(target.model)
        return cls(model, frozenset(trained), width, Masks(kept), RoundedWeights(rounded))

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name."""
        return {name: self.model.get_parameter(name) for name in sorted(self.trained)}


def distill(
    teacher: Any,
    student: Student,
    data: DistillationData,
    progress: Progress,
    saved: Path | None = None,
) -> dict[str, float]:
    """Train a student in place to predict what the dense model predicts.

    Args:
        teacher: the dense model, on the same device. It gets no more gradients.
        student: the smaller model.
        data: the windows, and how often they are read.
        progress: receives every step.
        saved: folder for the state of a resumed training and for the final weights; None saves
            nothing.

    Returns:
        The mean loss over the first and over the last eighth of the steps, and the highest
        learning rate. The loss is the divergence alone if the options add no other terms.

    Raises:
        NumericalError: the loss is NaN or infinite.
    """
    device = next(student.model.parameters()).device
    objective = Distil.between(
        student.model, ModelTeacher(teacher), next_token=data.options.next_token
    )
    if data.options.hidden:
        own, other = (len(describe(x).layers(x)) - 1 for x in (student.model, teacher))
        objective = replace(objective, hidden=data.options.hidden, pairs=((own, other),))

    def kept(name: str) -> Saved:  # in memory if nothing is saved
        return Saved(None if saved is None else saved / name, ProcessGroup(device))

    def train(read: Batches, steps: int, rate: float, label: str, on_end: bool = False) -> Losses:
        hooks = [student.rounded] if on_end and student.rounded.weights else []
        task = TrainingTask(
            student.model, read, objective, student.masks, hooks=hooks, trained=student.trained
        )
        loop = Loop(
            task,
            distillation_plan(steps, rate),
            saved=saved if on_end else None,
            progress=progress,
            label=label,
            # one process trains, also where several have pruned
            processes=ProcessGroup(device),
        )
        return [line["loss"] for line in loop.run().log]

    with (
        quiet_transformers(),
        in_float32(student.model, student.trained),
        student.rounded.in_forwards(),
    ):
        winner, parameters = kept(WINNER), student.parameters()
        rate, losses = data.highest_rate(student.width), Losses()
        if data.held_out:
            start, read = kept("start"), data.batches_of_trials
            start.keep_best(parameters)
            rate, losses = choose_rate(
                rate,
                data,
                lambda rate, steps: train(read, steps, rate, CHOOSING),
                partial(_held_out_loss, student.model, objective, data),
                partial(winner.keep_best, parameters),
                partial(start.restore_best, parameters),
                None if saved is None else saved / TRIED,
            )
            start.remove()
        winner.restore_best(parameters)  # a saved state of the training replaces it
        batches, left = data.batches_after(len(losses)), data.steps - len(losses)
        rest = train(batches, left, rate, "distilling", on_end=True)
        winner.remove()
    return {**summary([*losses, *rest]), "learning_rate": rate}


@torch.no_grad()
def _held_out_loss(model: Any, objective: Distil, data: DistillationData) -> float:
    """The mean loss over the windows that no trial reads."""
    device, windows = next(model.parameters()).device, data.windows
    with fast_matmuls(device):  # its copies of weights last as long as the context
        losses = [
            objective(model, Batch(windows[[i]].to(device), (i,))).item()
            for i in range(len(windows) - data.held_out, len(windows))
        ]
    return sum(losses) / len(losses)


def choose_rate(
    highest: float,
    data: DistillationData,
    train: Callable[[float, int], Losses],
    evaluate: Callable[[], float],
    keep: Callable[[], None],
    reset: Callable[[], None],
    tried: Path | None = None,
) -> tuple[float, Losses]:
    """Return the rate of a training, and the losses of the best trial; weights are reset.

    Args:
        highest: the highest choice, unless higher ones are tried too.
        data: what the training learns from.
        train: trains at a rate, for some steps. Returns the loss of each step.
        evaluate: returns the loss on the windows that are held out.
        keep: keeps the weights, those of the best trial so far.
        reset: puts the weights back with which the training begins.
        tried: keeps the losses of finished trials for a resumed run; None to store nothing.

    Example:
        >>> import torch
        >>> from secateur.recipes.shared import Distill
        >>> from secateur.training.distillation import DistillationData, choose_rate
        >>> data = DistillationData(torch.zeros(512, 8), Distill(epochs=1), seed=0)
        >>> tried = []
        >>> train = lambda rate, steps: tried.append(rate) or [0.5]
        >>> loss = lambda: abs(tried[-1] - 0.005)
        >>> choose_rate(1.0, data, train, loss, lambda: None, lambda: None)
        (0.0625, [0.5])
        >>> tried
        [0.125, 0.03125, 0.0078125, 0.001953125]
    """

    def trial(rate: float, best: float) -> tuple[float, Losses]:
        """Do a trial, unless it is done. Its loss is infinite if the training is lost."""
        done: dict[str, Any] = {}
        if tried is not None and tried.exists():
            done = json.loads(tried.read_text(encoding="utf-8"))
        if str(rate) not in done:
            result: tuple[float, Losses] = (math.inf, [])
            try:
                losses = train(rate, trial_steps(data.steps))
                result = evaluate(), losses
                if result[0] < best:
                    keep()
            except NumericalError:
                pass
            finally:
                reset()
            done[str(rate)] = result
            if tried is not None:
                write_json(tried, done)
        loss, losses = done[str(rate)]
        return loss, losses

    on_grid, steps = data.on_grid, data.steps
    # A trial of T steps has T/S of the rate of the training of S steps, except on grids.
    longer = 1.0 if on_grid else steps / trial_steps(steps)
    rate, (loss, losses) = highest, trial(highest / longer, math.inf)
    factors = [1 / 2 if on_grid else 1 / 4]
    if on_grid and math.isfinite(loss):
        factors.insert(0, 2.0)
    for by in factors:
        while LOWEST * highest <= rate * by <= MOST_ON_GRID * highest:
            other, of_other = trial(rate * by / longer, loss)
            # while every trial was lost, lower rates are tried whatever they give
            if other >= loss and math.isfinite(loss):
                break
            rate, loss, losses = rate * by, other, of_other
        if rate > highest:  # lower ones are worse
            break
    return rate, losses


def distillation_plan(steps: int, rate: float) -> TrainingPlan:
    """Return the plan of a distillation of some steps, whose highest rate is `rate`."""
    return TrainingPlan(
        steps=steps,
        learning_rate=rate,
        warm_up=WARM_UP,
        optimizer="Adam",
        validations=0,
        save_minutes=SAVE_MINUTES,
        diverged=0.0,
    )


def summary(losses: Sequence[float]) -> dict[str, float]:
    """The mean loss over the first and over the last eighth of the steps."""
    eighth = -(-len(losses) // 8)
    return {
        "loss_before": sum(losses[:eighth]) / eighth,
        "loss_after": sum(losses[-eighth:]) / eighth,
    }


def pruned_layers(target: Target, tasks: Tasks) -> list[int]:
    """The decoder layers with pruned or rounded weights. The others stay unchanged."""
    names = [name for name, task in tasks.items() if task.changes]
    starts = [target.architecture.layer_name(i) + "." for i in range(len(target.layers))]
    return [i for i, start in enumerate(starts) if any(name.startswith(start) for name in names)]


def trainable_names(target: Target, index: int) -> list[str]:
    """The full names of the floating-point parameters of one decoder layer."""
    prefix, layer = target.architecture.layer_name(index), target.layers[index]
    return [f"{prefix}.{n}" for n, p in layer.named_parameters() if p.is_floating_point()]
