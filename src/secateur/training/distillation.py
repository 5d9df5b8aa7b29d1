"""Distillation: a pruned or cut model learns the next-token predictions of the dense one.

Layer-wise methods only bring the hidden states near the dense model's. The next-token predictions
matter more. So all decoder layers are trained together on the calibration windows, with one window
a step. `layerwise.py` does the same with one decoder layer in memory.

Short trials choose the learning rate:

    a trial:     the model learns for T of the S steps, with a whole schedule of the rate;
                 T = S/4, at most 64
    its loss:    the mean over a few windows that no trial reads
    its rate:    T/S of the highest, a quarter of that, and further down while the loss falls
    the choice:  S/T times the rate of the best trial

The best rate depends on how much a model has lost: what repairs a model that lost much hurts one
that lost little, because Adam moves every weight by about the rate, however small the gradient is.
It also depends on the number of steps. The noise of the gradients moves every weight once by about
the rate, and this harm does not grow with the steps. What is learned grows by the rate in each
step. So the best rate of S steps is about S/T times that of T steps (docs/methods/distillation.md).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from secateur.calibration.run_windows import MOST_HELD_OUT
from secateur.engine.prune.reconstruction import RoundedWeight, RoundedWeights, in_float32
from secateur.engine.prune.tasks import Tasks
from secateur.engine.stream.targets import Target, walk_layers
from secateur.errors import NumericalError
from secateur.models.architecture import Linear, hidden_size
from secateur.models.skeleton import quiet_transformers
from secateur.precision import fast_matmuls
from secateur.progress import Progress
from secateur.recipes.shared import Distill
from secateur.runs.atomic import write_json
from secateur.sparsity.column_sweep import kept_weights
from secateur.training.batches import Batch, Batches
from secateur.training.loop import Loop
from secateur.training.masks import Masks
from secateur.training.objectives import Distil, Objective
from secateur.training.process_group import ProcessGroup
from secateur.training.saved import Saved
from secateur.training.teachers import ModelTeacher
from secateur.training.training_plan import TrainingPlan, default_rate
from secateur.types import Windows

FINAL = "final.safetensors"
"""The file with the weights of a finished training."""

LEARNED = "learned.json"
"""The file with the losses of a finished distillation."""

RATE = "rate.json"
"""The file with the chosen learning rate."""

WARM_UP = 1 / 16
SAVE_MINUTES = 5.0

FEWEST_WINDOWS = 8
"""With fewer windows nothing is held out, and the highest rate is taken."""

LOWEST = 1 / 64
"""The lowest choice, as a fraction of the highest."""


@dataclass(frozen=True)
class DistillationData:
    """What a smaller model learns from, one window a step.

    Args:
        windows: calibration tokens [samples, sequence_length].
        seed: seed of the order of the windows.
        epochs: number of passes over the windows.
        learning_rate: the highest learning rate; None to choose it by short trials.
        next_token: share of the next-token loss; the rest is the divergence.
    """

    windows: Windows
    seed: int
    epochs: int
    learning_rate: float | None = None
    next_token: float = 0.0

    @classmethod
    def of(cls, windows: Windows, how: Distill, seed: int) -> DistillationData:
        """The data of a distillation with these options."""
        return cls(windows, seed, how.epochs, how.peak_learning_rate, how.next_token)

    @property
    def steps(self) -> int:
        """The number of steps."""
        return self.epochs * len(self.windows)

    @property
    def batches(self) -> Batches:
        """The window of each step."""
        return Batches(self.windows, 1, self.seed)


@dataclass(frozen=True)
class Student:
    """A module that learns, with the zeros and grids that it must keep.

    Args:
        model: the pruned or cut model in eval mode, or a module with some of its layers.
        trained: names of the trained parameters.
        width: the model's hidden size.
        masks: masks to hold; None for none.
        rounded: the matrices that stay on their grids.
    """

    model: Any
    trained: frozenset[str]
    width: int
    masks: Masks | None = None
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
        starts = tuple(f"{target.architecture.layer_name(index)}." for index in layers)
        own = {name: task for name, task in tasks.items() if name.startswith(starts)}
        trained = [name for index in layers for name in trainable_names(target, index)]
        grids = {name: task.method.solver.grid for name, task in own.items() if task.rounded}
        weights = {
            name: model.get_parameter(f"{name}.weight").detach()
            for name, task in own.items()
            if task.sparsity > 0
        }
        return cls(
            model,
            frozenset(trained),
            hidden_size(target.model),
            Masks(
                {
                    f"{name}.weight": kept_weights(x) if grids.get(name) else x != 0
                    for name, x in weights.items()
                }
            ),
            RoundedWeights(
                RoundedWeight(Linear(name, model.get_submodule(name)), grid)
                for name, grid in grids.items()
                if grid
            ),
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name."""
        return {name: self.model.get_parameter(name) for name in sorted(self.trained)}

    def learn(
        self,
        teacher: Any,
        data: DistillationData,
        progress: Progress,
        saved: Path | None = None,
    ) -> dict[str, float]:
        """Train in place to predict what the dense model predicts.

        Args:
            teacher: the dense model, on the same device. It gets no more gradients.
            data: the windows, and how often they are read.
            progress: receives every step.
            saved: folder for the state of a resumed training, and for `FINAL`; None saves nothing.

        Returns:
            The mean loss over the first and over the last eighth of the steps, and the highest
            learning rate. The loss is the divergence alone if the next-token share is 0.

        Raises:
            NumericalError: the loss is NaN or infinite.
        """
        share = data.next_token
        objective = Distil.between(self.model, ModelTeacher(teacher), next_token=share)

        def choose(highest: float, held_out: int) -> float:
            return self._try_rates(objective, data, highest, held_out, progress, saved)

        with quiet_transformers(), self.rounded.in_forwards():
            rate = data.learning_rate
            if not rate:
                file = None if saved is None else saved / RATE
                rate = stored_rate(file, self.width, data.windows, choose)
            losses = self._train(
                objective, data.batches, data.steps, rate, progress, "distilling", saved
            )
        return {**summary(losses), "learning_rate": rate}

    def _train(
        self,
        objective: Objective,
        batches: Batches,
        steps: int,
        rate: float,
        progress: Progress,
        label: str,
        saved: Path | None = None,
    ) -> list[float]:
        """Train for some steps. Return the loss of each."""
        loop = Loop(
            self.model,
            batches,
            objective,
            self.masks,
            distillation_plan(steps, rate),
            saved=saved,
            hooks=[self.rounded] if self.rounded.weights else [],
            progress=progress,
            trained=self.trained,
            label=label,
        )
        return [line["loss"] for line in loop.run().log]

    def _try_rates(
        self,
        objective: Objective,
        data: DistillationData,
        highest: float,
        held_out: int,
        progress: Progress,
        saved: Path | None,
    ) -> float:
        """Return the best learning rate. The weights are reset after every trial."""
        batches = data.batches
        read = replace(batches, windows=batches.windows[:-held_out])
        device = next(self.model.parameters()).device
        start = Saved(None if saved is None else saved / "start", ProcessGroup(device), {})
        with in_float32(self.model, self.trained):
            parameters = self.parameters()
            start.keep_best(parameters)

            def train(rate: float, steps: int) -> None:
                label = "choosing the learning rate"
                self._train(objective, read, steps, rate, progress, label)

            @torch.no_grad()
            def evaluate() -> float:
                with fast_matmuls(device):  # its copies of weights last as long as the context
                    losses = [
                        objective(self.model, Batch(batches.windows[[i]].to(device), (i,))).item()
                        for i in range(len(read.windows), len(batches.windows))
                    ]
                return sum(losses) / held_out

            reset = partial(start.restore_best, parameters)
            rate = RateTrials(train, evaluate, reset, data.steps).choose(highest)
        if start.folder is not None:
            shutil.rmtree(start.folder)
        return rate


def stored_rate(
    file: Path | None, width: int, windows: Windows, choose: Callable[[float, int], float]
) -> float:
    """Return the learning rate of a file, or choose it and store it for a resumed run.

    Args:
        file: the file; None to store nothing.
        width: the model's hidden size.
        windows: tokens of the distillation.
        choose: the highest rate, and how many of the last windows are held out → the best rate.
    """
    if file is not None and file.exists():
        return float(json.loads(file.read_text(encoding="utf-8"))["learning_rate"])
    count, length = windows.shape
    highest, held_out = default_rate(width, length), held_out_windows(count)
    if not held_out:
        return highest
    rate = choose(highest, held_out)
    if file is not None:
        write_json(file, {"learning_rate": rate})
    return rate


def held_out_windows(windows: int) -> int:
    """Return how many of the last windows measure the trials; 0 for no trials."""
    return 0 if windows < FEWEST_WINDOWS else min(MOST_HELD_OUT, windows // 4)


def trial_steps(steps: int) -> int:
    """Return the number of steps of a trial."""
    return max(1, min(64, steps // 4))


@dataclass(frozen=True)
class RateTrials:
    """The trials of one training.

    Args:
        train: trains at a rate, for some steps.
        evaluate: returns the loss on the windows that are held out.
        reset: puts the weights back with which the training begins.
        steps: number of steps of the training.
    """

    train: Callable[[float, int], None]
    evaluate: Callable[[], float]
    reset: Callable[[], None]
    steps: int

    def choose(self, highest: float) -> float:
        """Return the rate of the training; the weights are reset.

        Args:
            highest: the highest choice.

        Example:
            >>> from secateur.training.distillation import RateTrials
            >>> tried = []
            >>> train = lambda rate, steps: tried.append(rate)
            >>> loss = lambda: abs(tried[-1] - 0.01)
            >>> RateTrials(train, loss, lambda: None, steps=512).choose(1.0)
            0.0625
            >>> tried
            [0.125, 0.03125, 0.0078125, 0.001953125]
        """
        longer = self.steps / trial_steps(self.steps)
        rate, loss = highest, self._loss(highest / longer)
        while rate > LOWEST * highest:
            lower = self._loss(rate / 4 / longer)
            if lower >= loss and math.isfinite(loss):
                break
            rate, loss = rate / 4, lower
        return rate

    def _loss(self, rate: float) -> float:
        """Return the loss after a trial; infinite if the training is lost at this rate."""
        try:
            self.train(rate, trial_steps(self.steps))
            return self.evaluate()
        except NumericalError:
            return math.inf
        finally:
            self.reset()


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


def once(saved: Path, learn: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Distill into a folder and return the losses, or return the losses of an earlier run."""
    file = saved / LEARNED
    if not file.exists():
        write_json(file, learn())
    losses: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    return losses


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


def write_layers(file: Path, target: Target, layers: Sequence[int]) -> None:
    """Overwrite layers of the checkpoint with trained ones from a file."""
    with safe_open(file, "pt") as learned:
        there = set(learned.keys())
        for index, _ in walk_layers(target, layers):
            names = [name for name in trainable_names(target, index) if name in there]
            for name in names:
                target.model.get_parameter(name).data.copy_(learned.get_tensor(name))
            target.commit(index, names)
