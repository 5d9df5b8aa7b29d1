"""Distillation with one decoder layer in memory, for models that do not fit as a whole.

    dense model, one layer at a time ─► its predictions, on disk
    sweep after sweep (`sweeps.py`): all layers forward, all layers backward ─► weights, on disk
    ─► the weights go into the checkpoint

The trained weights and moments are in files, layer by layer, until all sweeps are finished. Until
then the checkpoint of the smaller model is only read. So a killed run goes on with the layer in
which it stopped, and its result is the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from secateur.engine.stream.activations import Activations
from secateur.engine.stream.calls import call_layer
from secateur.engine.stream.embedding_and_head import ModelEnds
from secateur.engine.stream.targets import CheckpointTarget, Target, walk_layers
from secateur.models.architecture import hidden_size
from secateur.models.opening import open_weights
from secateur.precision import fast_matmuls
from secateur.progress import Progress
from secateur.runs.atomic import write_json
from secateur.training.batches import Batches
from secateur.training.objectives import Distil
from secateur.training.streamed import StreamedTeacher
from secateur.training.teachers import TOP_K, WrittenTeacher, write_teacher
from secateur.training.training_plan import default_rate
from secateur.workflows.prune.chosen_rate import RateTrials, held_out
from secateur.workflows.prune.learning import (
    RATE,
    Lessons,
    Pupil,
    once,
    plan_of,
    summary,
    trainable_names,
)
from secateur.workflows.prune.sweeps import Scholar, Sweeps, layer_state

PREDICTIONS = "predictions.safetensors"
TRAINING = "training"
"""The folder of the training, with a file for each layer."""

TRIED = "tried.json"
"""The file with the losses of finished trials, by rate."""

FEWEST_SWEEPS = 8
"""The fewest sweeps of a training. With fewer, the steps of a layer know too little of the others:
two sweeps over 24 windows each made a tiny model worse."""


class StreamedDistillation:
    """One distillation in sweeps.

    Args:
        dense: the model to learn from.
        smaller: the folder of the smaller model; its weights are only read.
        learning: numbers of the layers that learn.
        pupil: see `Scholar`.
        lessons: the windows, and how to learn.
        size: number of windows in a sweep; at most an eighth of the steps are taken.
        work: folder of the state.
        progress: receives every step.
        trust_remote_code: whether code from the smaller model's folder may run.
    """

    def __init__(
        self,
        dense: Target,
        smaller: Path,
        learning: Sequence[int],
        pupil: Callable[[nn.Module, int], Pupil],
        lessons: Lessons,
        size: int,
        work: Path,
        progress: Progress,
        *,
        trust_remote_code: bool,
    ) -> None:
        self.dense, self.learning, self.pupil = dense, learning, pupil
        self.student = CheckpointTarget(
            open_weights(smaller),
            None,
            dense.device,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
        )
        self.windows, self.how = lessons.windows, lessons.how
        self.work, self.progress = work, progress
        self.device, self.count = dense.device, len(dense.layers)
        self.steps, self.batches = lessons.steps, lessons.batches
        # Trials have this size too: they must judge a rate with gradients as old as it will meet.
        self.size = min(size, max(1, self.steps // FEWEST_SWEEPS))
        work.mkdir(parents=True, exist_ok=True)

    def learn_into(self, target: Target) -> dict[str, float]:
        """Distill, and write the trained layers into a checkpoint. Return what `learn` returns."""
        losses = once(self.work, self.learn)
        self.write(target)
        return losses

    def learn(self) -> dict[str, float]:
        """Distill. The trained weights are in files; `write` puts them into a checkpoint.

        Returns:
            The mean loss over the first and over the last eighth of the steps, the learning rate,
            and the number of windows in a sweep.
        """
        if not (self.work / PREDICTIONS).exists():
            self.predict()
        scholar = self.scholar()
        rate = self.how.peak_learning_rate or self.chosen_rate(scholar)
        sweeps = self.sweeps(scholar, self.batches, self.steps, rate, TRAINING, "distilling")
        told = {"learning_rate": rate, "sweep_windows": float(self.size)}
        return {**summary(sweeps.run()), **told}

    # -- the dense model -------------------------------------------------------------------------

    @torch.no_grad()
    def pass_dense(self, ends: ModelEnds) -> Activations:
        """Store and return the outputs of the dense model's last layer."""
        (example,) = ends.embed([slice(0, 1)])
        folder = self.work / "dense"
        folder.mkdir(exist_ok=True)
        shape = (*self.windows.shape, example.shape[-1])
        states = Activations(shape, example.dtype, folder, False)
        start = max((i for i in range(self.count + 1) if states.has(i)), default=None)
        if start is None:
            rows = list(self.rows())
            for row, hidden in zip(rows, ends.embed(rows), strict=True):
                states.write(row, hidden)
            states.advance(start := 0)
        self.progress.start("dense hidden states", len(self.windows) * (self.count - start))
        states.resume(start)
        for index, layer in walk_layers(self.dense, range(start, self.count)):
            for row in self.rows():
                hidden = states.read(row).to(self.device)
                call = ends.call(index, [row.start])
                with fast_matmuls(self.device):
                    states.write(row, call_layer(layer, hidden, call))
                self.progress.step(note=f"layer {index}")
            states.advance(index + 1)
            states.forget(index)
        self.progress.finish()
        return states

    def predict(self) -> None:
        """Store the dense model's predictions."""
        ends = ModelEnds(self.dense, self.windows, self.work)
        states = self.pass_dense(ends)
        self.progress.start("dense predictions", len(self.windows))
        with ends.outside():
            teacher = StreamedTeacher(ends, states)
            write_teacher(
                teacher,
                self.windows,
                self.work / PREDICTIONS,
                k=min(TOP_K, teacher.vocabulary - 1),
                device=self.device,
                on_window=self.progress.step,
            )
        states.forget(self.count)
        self.progress.finish()

    def rows(self) -> Iterator[slice]:
        """Yield the windows one by one."""
        return (slice(row, row + 1) for row in range(len(self.windows)))

    # -- the pruned model ------------------------------------------------------------------------

    def scholar(self) -> Scholar:
        """Return the pruned model that learns."""
        ends = ModelEnds(self.student, self.windows)
        with ends.outside(), ends.returning(None):
            loss = Distil.between(
                self.student.model,
                WrittenTeacher(self.work / PREDICTIONS),
                next_token=self.how.next_token,
            )
        return Scholar(self.student, self.windows, self.learning, self.pupil, ends, loss, self.work)

    def sweeps(
        self, scholar: Scholar, batches: Batches, steps: int, rate: float, folder: str, label: str
    ) -> Sweeps:
        """Return a training of some steps."""
        plan, where = plan_of(steps, rate), self.work / folder
        where.mkdir(exist_ok=True)
        return Sweeps(scholar, batches, plan, self.size, where, self.progress, label)

    def chosen_rate(self, scholar: Scholar) -> float:
        """Choose the learning rate by trials. Finished ones are stored for a resumed run."""
        count, length = self.windows.shape
        highest = default_rate(hidden_size(self.student.model), length)
        held = held_out(count)
        told, tried = self.work / RATE, self.tried()
        if told.exists():
            return float(json.loads(told.read_text(encoding="utf-8"))["learning_rate"])
        if not held:
            return highest
        read = Batches(self.windows[:-held], 1, self.batches.seed)
        trial: list[Sweeps] = []
        label = "choosing the learning rate"

        def train(rate: float, short: int) -> None:
            trial[:] = [self.sweeps(scholar, read, short, rate, f"trial-{rate:.3g}", label)]
            if str(rate) not in tried:
                trial[0].run()

        def judge() -> float:
            rate = str(trial[0].plan.learning_rate)
            if rate not in tried:
                tried[rate] = trial[0].judge(range(len(read.windows), len(self.windows)))
                write_json(self.work / TRIED, tried)
            return tried[rate]

        trials = RateTrials(train, judge, lambda: shutil.rmtree(trial[0].folder), self.steps)
        rate = trials.choose(highest)
        write_json(told, {"learning_rate": rate})
        return rate

    def tried(self) -> dict[str, float]:
        """Return the losses of finished trials, by rate."""
        told = self.work / TRIED
        return json.loads(told.read_text(encoding="utf-8")) if told.exists() else {}

    def write(self, target: Target) -> None:
        """Write the trained layers into a checkpoint. A stopped run does this again."""
        for index, _ in walk_layers(target, self.learning):
            trained = {n: target.model.get_parameter(n) for n in trainable_names(target, index)}
            layer_state(self.work / TRAINING, index, target.device).load_weights(trained)
            target.commit(index, list(trained))
