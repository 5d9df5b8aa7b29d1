"""How a pruned model, or some of its layers, learns: shared by both ways to distill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from secateur.engine.prune.reconstruction import RoundedWeight, RoundedWeights, in_float32
from secateur.engine.prune.tasks import Tasks
from secateur.engine.stream.targets import Target, walk_layers
from secateur.models.architecture import Linear, hidden_size
from secateur.models.skeleton import quiet_transformers
from secateur.precision import fast_matmuls
from secateur.progress import Progress
from secateur.recipes.recovery import Distill
from secateur.runs.atomic import write_json
from secateur.sparsity.column_sweep import kept_weights
from secateur.training.batches import Batch, Batches
from secateur.training.loop import Loop
from secateur.training.masks import Masks
from secateur.training.objectives import Objective
from secateur.training.process_group import ProcessGroup
from secateur.training.saved import Saved
from secateur.training.training_plan import TrainingPlan, default_rate
from secateur.types import Windows
from secateur.workflows.prune.chosen_rate import RateTrials, held_out

FINAL = "final.safetensors"
"""The file with the weights of a finished training."""

LEARNED = "learned.json"
"""The file with the losses of a finished distillation."""

RATE = "rate.json"
"""The file with the chosen learning rate."""

WARM_UP = 1 / 16
SAVE_MINUTES = 5.0


@dataclass(frozen=True)
class Lessons:
    """What a smaller model learns from, one window a step, and how.

    Args:
        windows: calibration tokens [samples, sequence_length].
        how: epochs over the windows, the learning rate, and the share of the next-token loss.
        seed: seed of the order of the windows.
    """

    windows: Windows
    how: Distill
    seed: int

    @property
    def steps(self) -> int:
        """The number of steps."""
        return self.how.epochs * len(self.windows)

    @property
    def batches(self) -> Batches:
        """The window of each step."""
        return Batches(self.windows, 1, self.seed)


@dataclass(frozen=True)
class Pupil:
    """A module that learns, with what it must hold.

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
    def of(cls, model: Any, target: Target, tasks: Tasks, layers: Collection[int]) -> Pupil:
        """Make the pupil for some pruned layers of a model.

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
        objective: Objective,
        lessons: Lessons,
        progress: Progress,
        saved: Path | None = None,
    ) -> dict[str, float]:
        """Train in place, one window a step.

        Without a learning rate in the lessons, short trials choose it; see `chosen_rate`.

        Args:
            objective: the loss.
            lessons: the windows, and how to learn.
            progress: receives every step.
            saved: folder for the state of a resumed training, and for `FINAL`; None saves nothing.

        Returns:
            The mean loss over the first and over the last eighth of the steps, and the rate.

        Raises:
            NumericalError: the loss is NaN or infinite.
        """
        steps, batches = lessons.steps, lessons.batches
        with quiet_transformers(), self.rounded.in_forwards():
            rate = lessons.how.peak_learning_rate
            rate = rate or self.chosen_rate(objective, batches, steps, progress, saved)
            log = self.train(objective, batches, steps, rate, progress, "distilling", saved)
        return {**summary(log), "learning_rate": rate}

    def train(
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
            plan_of(steps, rate),
            saved=saved,
            hooks=[self.rounded] if self.rounded.weights else [],
            progress=progress,
            trained=self.trained,
            label=label,
        )
        return [line["loss"] for line in loop.run().log]

    def chosen_rate(
        self,
        objective: Objective,
        batches: Batches,
        steps: int,
        progress: Progress,
        saved: Path | None,
    ) -> float:
        """Choose the learning rate by trials, and store it for a resumed run."""
        count, length = batches.windows.shape
        highest, held = default_rate(self.width, length), held_out(count)
        told = None if saved is None else saved / RATE
        if told is not None and told.exists():
            return float(json.loads(told.read_text(encoding="utf-8"))["learning_rate"])
        if not held:
            return highest
        read = replace(batches, windows=batches.windows[:-held])
        device = next(self.model.parameters()).device
        start = Saved(None if saved is None else saved / "start", ProcessGroup(device), {})
        with in_float32(self.model, self.trained):
            parameters = self.parameters()
            start.keep_best(parameters)

            def train(rate: float, short: int) -> None:
                self.train(objective, read, short, rate, progress, "choosing the learning rate")

            @torch.no_grad()
            def judge() -> float:
                with fast_matmuls(device):  # its copies of weights last as long as the context
                    losses = [
                        objective(self.model, Batch(batches.windows[[i]].to(device), (i,))).item()
                        for i in range(len(read.windows), len(batches.windows))
                    ]
                return sum(losses) / held

            reset = partial(start.restore_best, parameters)
            rate = RateTrials(train, judge, reset, steps).choose(highest)
        if told is not None and start.folder is not None:
            write_json(told, {"learning_rate": rate})
            shutil.rmtree(start.folder)
        return rate


def plan_of(steps: int, rate: float) -> TrainingPlan:
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
    told = saved / LEARNED
    if not told.exists():
        write_json(told, learn())
    losses: dict[str, float] = json.loads(told.read_text(encoding="utf-8"))
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
