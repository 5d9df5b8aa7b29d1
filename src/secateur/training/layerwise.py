"""Distillation with one decoder layer in memory, for models that do not fit as a whole.

    dense model, one layer at a time ─► its predictions, on disk
    for every N windows: all layers forward, all layers backward ─► weights, on disk
    ─► the weights go into the checkpoint

The training of N windows:

    forward     layer by layer, all N windows:       hₗ₊₁ = fₗ(hₗ)
    loss        after the last layer, each window:   L, and g = ∂L/∂h
    backward    layer by layer, from the last; in each, window after window:
                    fₗ(hₗ) again;  g ← (∂fₗ/∂hₗ)ᵀ g  for the layer below;
                    the gradient of the layer's weights: masks, clip to 1/√layers, a step of Adam

The gradients are those of the whole model. With N = 1 the steps are those of the ordinary loop, but
for the clipping: a layer does not know the norm of the others' gradients. With more windows a layer
makes N steps with what the other layers computed before these steps, and everything is read and
written once for N windows. Hidden states, gradients, weights and moments are on disk.

Until all steps are done, the checkpoint of the smaller model is only read. So a killed run goes on
with the layer in which it stopped, and its result is the same.

Pudipeddi et al. 2020, "Training Large Neural Networks with Constant Memory using a New Execution
Algorithm" (L2L), arXiv:2002.05645, adds up the gradients of the N windows and makes one step.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.allocator import TRAINING_BLOCK_BYTES, TRAINING_BYTES, reused_pages
from secateur.engine.prune.reconstruction import in_float32
from secateur.engine.stream.activations import Activations
from secateur.engine.stream.calls import LayerCall, call_layer
from secateur.engine.stream.embedding_and_head import EmbeddingAndHead
from secateur.engine.stream.targets import CheckpointTarget, Target, walk_layers
from secateur.errors import NumericalError
from secateur.models.architecture import Architecture, hidden_size
from secateur.models.attention import WrittenOut
from secateur.models.opening import open_weights
from secateur.precision import fast_matmuls, full_float32
from secateur.progress import Progress, Silent
from secateur.runs.atomic import write_json
from secateur.training.batches import Batch, Batches
from secateur.training.distillation import (
    RATE,
    DistillationData,
    RateTrials,
    Student,
    distillation_plan,
    once,
    stored_rate,
    summary,
    trainable_names,
)
from secateur.training.objectives import Distil, Objective
from secateur.training.process_group import ProcessGroup
from secateur.training.saved import Saved
from secateur.training.teachers import (
    TOP_K,
    ModelTeacher,
    TeacherOutput,
    WrittenTeacher,
    write_teacher,
)
from secateur.training.training_plan import TrainingPlan

PREDICTIONS = "predictions.safetensors"
TRAINING = "training"
"""The folder of the training, with a file for each layer."""

TRIED = "tried.json"
"""The file with the losses of finished trials, by rate."""

LOSSES = "losses.json"
"""The file with the loss of each finished step."""

FEWEST_SWEEPS = 8
"""The fewest times that the layers are passed. With fewer, the steps of a layer know too little of
the others: two passes of 24 windows each made a tiny model worse."""


class LayerwiseDistillation:
    """One distillation with one decoder layer in memory.

    Args:
        dense: the model to learn from.
        smaller: the folder of the smaller model; its weights are only read.
        learning: numbers of the layers that learn.
        student_of: see `StreamedStudent`.
        data: the windows, and how often they are read.
        size: number of windows that the layers pass at a time; at most an eighth of the steps are
            taken.
        work: folder of the state.
        progress: receives every step.
        trust_remote_code: whether code from the smaller model's folder may run.
    """

    def __init__(
        self,
        dense: Target,
        smaller: Path,
        learning: Sequence[int],
        student_of: Callable[[nn.Module, int], Student],
        data: DistillationData,
        size: int,
        work: Path,
        progress: Progress,
        *,
        trust_remote_code: bool,
    ) -> None:
        self.dense, self.learning, self.student_of, self.data = dense, learning, student_of, data
        self.target = CheckpointTarget(
            open_weights(smaller),
            None,
            dense.device,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
        )
        self.work, self.progress = work, progress
        self.device, self.count = dense.device, len(dense.layers)
        # Trials have this size too: they must measure a rate with gradients as old as it will meet.
        self.size = min(size, max(1, data.steps // FEWEST_SWEEPS))
        work.mkdir(parents=True, exist_ok=True)

    def learn_into(self, target: Target) -> dict[str, float]:
        """Distill, and write the trained layers into a checkpoint. A stopped run resumes.

        Returns:
            The mean loss over the first and over the last eighth of the steps, the learning rate,
            and the number of windows that the layers pass at a time.
        """
        losses = once(self.work, self._learn)
        for index, _ in walk_layers(target, self.learning):
            trained = {n: target.model.get_parameter(n) for n in trainable_names(target, index)}
            _layer_state(self.work / TRAINING, index, target.device).load_weights(trained)
            target.commit(index, list(trained))
        return losses

    def _learn(self) -> dict[str, float]:
        """Distill. The trained weights are in files."""
        if not (self.work / PREDICTIONS).exists():
            self._predict()
        outer = EmbeddingAndHead(self.target, self.data.windows)
        with outer.outside(), outer.returning(None):
            loss = Distil.between(
                self.target.model,
                WrittenTeacher(self.work / PREDICTIONS),
                next_token=self.data.next_token,
            )
        student = StreamedStudent(
            self.target, self.data.windows, self.learning, self.student_of, outer, loss, self.work
        )
        rate = self.data.learning_rate
        if not rate:
            rate = stored_rate(
                self.work / RATE,
                hidden_size(self.target.model),
                self.data.windows,
                lambda highest, held_out: self._try_rates(student, highest, held_out),
            )
        trainer = self._trainer(
            student, self.data.batches, self.data.steps, rate, TRAINING, "distilling"
        )
        losses = summary(trainer.run())
        return {**losses, "learning_rate": rate, "sweep_windows": float(self.size)}

    @torch.no_grad()
    def _dense_outputs(self, outer: EmbeddingAndHead) -> Activations:
        """Store and return the outputs of the dense model's last layer."""
        windows = self.data.windows
        (example,) = outer.embed([slice(0, 1)])
        folder = self.work / "dense"
        folder.mkdir(exist_ok=True)
        shape = (*windows.shape, example.shape[-1])
        states = Activations(shape, example.dtype, folder, False)
        start = max((i for i in range(self.count + 1) if states.has(i)), default=None)
        rows = [slice(row, row + 1) for row in range(len(windows))]
        if start is None:
            for row, hidden in zip(rows, outer.embed(rows), strict=True):
                states.write(row, hidden)
            states.advance(start := 0)
        self.progress.start("dense hidden states", len(windows) * (self.count - start))
        states.resume(start)
        for index, layer in walk_layers(self.dense, range(start, self.count)):
            for row in rows:
                hidden = states.read(row).to(self.device)
                call = outer.call(index, [row.start])
                with fast_matmuls(self.device):
                    states.write(row, call_layer(layer, hidden, call))
                self.progress.step(note=f"layer {index}")
            states.advance(index + 1)
            states.forget(index)
        self.progress.finish()
        return states

    def _predict(self) -> None:
        """Store the dense model's predictions."""
        windows = self.data.windows
        outer = EmbeddingAndHead(self.dense, windows, self.work)
        states = self._dense_outputs(outer)
        self.progress.start("dense predictions", len(windows))
        with outer.outside():
            teacher = _StreamedTeacher(outer, states)
            write_teacher(
                teacher,
                windows,
                self.work / PREDICTIONS,
                k=min(TOP_K, teacher.vocabulary - 1),
                device=self.device,
                on_window=self.progress.step,
            )
        states.forget(self.count)
        self.progress.finish()

    def _trainer(
        self,
        student: StreamedStudent,
        batches: Batches,
        steps: int,
        rate: float,
        name: str,
        label: str,
    ) -> LayerwiseTrainer:
        """Return a training of some steps, in a folder of this name."""
        plan, folder = distillation_plan(steps, rate), self.work / name
        folder.mkdir(exist_ok=True)
        return LayerwiseTrainer(student, batches, plan, self.size, folder, self.progress, label)

    def _try_rates(self, student: StreamedStudent, highest: float, held_out: int) -> float:
        """Return the best learning rate. Losses of finished trials are stored for a resumed run."""
        windows, file = self.data.windows, self.work / TRIED
        tried: dict[str, float] = {}
        if file.exists():
            tried = json.loads(file.read_text(encoding="utf-8"))
        read = Batches(windows[:-held_out], 1, self.data.seed)
        trial: list[LayerwiseTrainer] = []
        label = "choosing the learning rate"

        def train(rate: float, steps: int) -> None:
            trial[:] = [self._trainer(student, read, steps, rate, f"trial-{rate:.3g}", label)]
            if str(rate) not in tried:
                trial[0].run()

        def evaluate() -> float:
            rate = str(trial[0].plan.learning_rate)
            if rate not in tried:
                tried[rate] = trial[0].evaluate(range(len(read.windows), len(windows)))
                write_json(file, tried)
            return tried[rate]

        def reset() -> None:
            shutil.rmtree(trial[0].folder)

        return RateTrials(train, evaluate, reset, self.data.steps).choose(highest)


class _StreamedTeacher(ModelTeacher):
    """A teacher whose last hidden states are stored. Use it only within `outer.outside()`.

    Args:
        outer: embedding and head of the dense model.
        states: the outputs of its last decoder layer for all windows.
    """

    def __init__(self, outer: EmbeddingAndHead, states: Activations) -> None:
        self.outer, self.states = outer, states
        with outer.returning(None):  # to find the head, the model runs without its layers
            super().__init__(outer.target.model)

    def __call__(self, batch: Batch, temperature: float, layers: Sequence[int]) -> TeacherOutput:
        """See `Teacher`."""
        (number,) = batch.numbers
        hidden = self.states.read(slice(number, number + 1)).to(batch.ids.device)
        with self.outer.returning(hidden):
            return super().__call__(batch, temperature, layers)


@dataclass(frozen=True)
class StreamedStudent:
    """The checkpoint of a smaller model that learns, layer by layer.

    Args:
        target: the checkpoint in float32; it is only read.
        windows: token ids [windows, length].
        learning: numbers of the layers that learn.
        student_of: a module with one layer, and the number of that layer → the student. The layer
            has the checkpoint's weights.
        outer: embedding and head of the checkpoint.
        loss: the loss on the logits.
        folder: for the values of each token that some families give to their layers.
    """

    target: CheckpointTarget
    windows: Tensor
    learning: Sequence[int]
    student_of: Callable[[nn.Module, int], Student]
    outer: EmbeddingAndHead
    loss: Objective
    folder: Path
    outer_of_layers: dict[int, EmbeddingAndHead] = field(default_factory=dict)

    def calls(self, number: int, windows: Sequence[int]) -> list[LayerCall]:
        """How a layer is called for each of some windows.

        The values of tokens that a layer gets are kept for one layer at a time, so each such layer
        has an object of its own.
        """
        outer = self.outer
        if outer.calls()[number].varying:
            if number not in self.outer_of_layers:
                folder = self.folder / f"values-{number:04d}"
                folder.mkdir(parents=True, exist_ok=True)
                self.outer_of_layers[number] = EmbeddingAndHead(self.target, self.windows, folder)
            outer = self.outer_of_layers[number]
        return [outer.call(number, [window]) for window in windows]

    def loss_of(self, number: int, hidden: Tensor) -> Tensor:
        """Return the loss of a window from the outputs of the last layer; within `outside()`."""
        device = self.target.device
        batch = Batch(self.windows[number : number + 1].to(device), (number,))
        with self.outer.returning(hidden):
            return self.loss(self.target.model, batch)


class StepBatch:
    """The windows that the layers pass together, one for each step, and their files.

    Args:
        windows: numbers of the windows.
        first_step: the step of the first one.
        folder: of the files.
        like: the input of a layer for one window.
    """

    def __init__(self, windows: Sequence[int], first_step: int, folder: Path, like: Tensor) -> None:
        self.windows, self.first_step, self.folder = windows, first_step, folder
        self.last_step = first_step + len(windows)
        self.rows = [slice(place, place + 1) for place in range(len(windows))]
        shape = (len(windows), *like.shape[1:])
        for name in ("states", "gradients"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.states = Activations(shape, torch.float32, folder / "states", False)
        self.gradients = Activations(shape, torch.float32, folder / "gradients", False)


class LayerwiseTrainer:
    """One layer-wise training. A killed one goes on with the layer in which it stopped.

    Args:
        student: the model.
        batches: the window of each step.
        plan: number of steps, and the schedule of the learning rate.
        size: number of windows that the layers pass at a time.
        folder: of its files. Weights and moments of a layer are in one file, with the number of
            steps that the layer has done.
        progress: receives every step.
        label: the title of the progress bar.
    """

    def __init__(
        self,
        student: StreamedStudent,
        batches: Batches,
        plan: TrainingPlan,
        size: int,
        folder: Path,
        progress: Progress,
        label: str,
    ) -> None:
        self.student, self.batches, self.plan = student, batches, plan
        self.size, self.folder, self.progress, self.label = size, folder, progress, label
        self.target, self.learning = student.target, set(student.learning)
        self.device, self.count = student.target.device, len(student.target.layers)
        self.clip = plan.clip / math.sqrt(len(self.learning))

    def run(self) -> list[float]:
        """Train. The weights are in the files of the layers.

        Returns:
            The loss of each step.

        Raises:
            NumericalError: a loss or a gradient is NaN or infinite.
        """
        steps, file = self.plan.steps, self.folder / LOSSES
        done: list[float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        finished, of_batch = -(-len(done) // self.size), 2 * self.count
        self.progress.start(self.label, -(-steps // self.size) * of_batch)
        self.progress.step(finished * of_batch)
        with reused_pages(TRAINING_BLOCK_BYTES, TRAINING_BYTES):
            while len(done) < steps:
                folder = self.folder / f"sweep-{len(done):06d}"
                done += self._train_batch(len(done), min(self.size, steps - len(done)), folder)
                write_json(file, done)
                shutil.rmtree(folder)
        self.progress.finish()
        return done

    def evaluate(self, windows: Sequence[int]) -> float:
        """Return the mean loss of some windows."""
        folder = self.folder / "judged"
        shutil.rmtree(folder, ignore_errors=True)
        batch = self._open(windows, 0, folder)
        self._forward(batch, Silent())
        with torch.no_grad(), self.student.outer.outside(), self._precision():
            batch.states.resume(self.count)
            losses = [
                self.student.loss_of(window, self._read(batch.states, rows)).item()
                for window, rows in zip(windows, batch.rows, strict=True)
            ]
        shutil.rmtree(folder)
        return sum(losses) / len(losses)

    def _train_batch(self, done: int, size: int, folder: Path) -> list[float]:
        """Do the next steps. Return their losses."""
        windows = [self.batches.numbers(done + place)[0] for place in range(size)]
        for other in self.folder.glob("sweep-*"):  # what is left of a finished one
            if other != folder:
                shutil.rmtree(other)
        batch = self._open(windows, done, folder)
        file = folder / LOSSES
        if file.exists():
            self.progress.step(self.count)
        else:
            self._forward(batch, self.progress)
            write_json(file, self._losses_and_gradients(batch))
        losses: list[float] = json.loads(file.read_text(encoding="utf-8"))
        self._backward(batch, f"step {done + size}, loss {sum(losses) / size:.3f}")
        return losses

    def _open(self, windows: Sequence[int], first_step: int, folder: Path) -> StepBatch:
        """Return the files of some windows, begun or not."""
        (like,) = self.student.outer.embed([slice(windows[0], windows[0] + 1)])
        return StepBatch(windows, first_step, folder, like)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """The context of a forward: precision, and how attention is computed."""
        written = self.plan.writes_out(self.device, self.batches.windows.shape[1])
        with fast_matmuls(self.device), WrittenOut() if written else nullcontext():
            yield

    def _read(self, stored: Activations, rows: slice) -> Tensor:
        """Return the stored states of a window on the device."""
        return stored.read(rows).to(self.device)

    @contextmanager
    def _layer(self, number: int) -> Iterator[tuple[nn.Module, Student | None]]:
        """A context with a layer and its newest weights, and its student if it learns."""
        with self.target.layer(number) as layer:
            if number not in self.learning:
                yield layer.requires_grad_(False), None
                return
            module = _module_of(self.target.architecture, number, layer)
            student = self.student.student_of(module, number)
            with in_float32(student.model, student.trained), student.rounded.in_forwards():
                saved = _layer_state(self.folder, number, self.device)
                saved.load_weights(student.parameters())
                yield layer, student

    @torch.no_grad()
    def _forward(self, batch: StepBatch, progress: Progress) -> None:
        """Store the inputs of every layer and the outputs of the last one."""
        states = batch.states
        start = max((i for i in range(self.count + 1) if states.has(i)), default=None)
        if start is None:
            embedded = self.student.outer.embed([slice(n, n + 1) for n in batch.windows])
            for rows, hidden in zip(batch.rows, embedded, strict=True):
                states.write(rows, hidden)
            states.advance(start := 0)
        progress.step(start)
        for number in range(start, self.count):
            states.resume(number)
            calls = self.student.calls(number, batch.windows)
            with self._layer(number) as (layer, _):
                for call, rows in zip(calls, batch.rows, strict=True):
                    with self._precision():
                        hidden = call_layer(layer, self._read(states, rows), call)
                    states.write(rows, hidden)
            states.advance(number + 1)
            progress.step(note=f"layer {number} forward")

    def _losses_and_gradients(self, batch: StepBatch) -> list[float]:
        """Store the gradients of the last layer's outputs. Return the losses."""
        losses = []
        batch.states.resume(self.count)
        with self.student.outer.outside(), full_float32():
            self.target.model.requires_grad_(False)
            for place, rows in enumerate(batch.rows):
                hidden = self._read(batch.states, rows).requires_grad_()
                with self._precision(), torch.enable_grad():
                    loss = self.student.loss_of(batch.windows[place], hidden)
                losses.append(self.check_finite(loss.item(), "the loss", batch.first_step + place))
                loss.backward()
                assert hidden.grad is not None
                batch.gradients.write(rows, hidden.grad)
        batch.gradients.advance(self.count)
        return losses

    def _backward(self, batch: StepBatch, note: str) -> None:
        """Pass the gradients down, and let every layer learn."""
        first = min(self.learning)
        for number in reversed(range(first, self.count)):
            if number in self.learning:
                saved = _layer_state(self.folder, number, self.device)
                finished = saved.facts().get("step", 0) == batch.last_step
            else:
                finished = batch.gradients.has(number)
            if not finished:
                self._backward_layer(batch, number, to_inputs=number > first)
            batch.gradients.forget(number + 1)
            batch.states.forget(number + 1)
            self.progress.step(note=f"{note}, layer {number} backward")
        self.progress.step(first, note)

    def _backward_layer(self, batch: StepBatch, number: int, *, to_inputs: bool) -> None:
        """Take the gradients through one layer, with a step of the layer for every window.

        The gradients for the layer below are complete on disk before the weights are replaced. So a
        stop between the two only means that this layer is taken again.
        """
        batch.states.resume(number)
        batch.gradients.resume(number + 1)
        calls = self.student.calls(number, batch.windows)
        with self._layer(number) as (layer, student), full_float32():
            optimizer = None if student is None else _LayerOptimizer(self, student, number)
            for place, rows in enumerate(batch.rows):
                hidden = self._read(batch.states, rows).requires_grad_(to_inputs)
                with self._precision(), torch.enable_grad():
                    out = call_layer(layer, hidden, calls[place])
                out.backward(self._read(batch.gradients, rows))
                if to_inputs:
                    assert hidden.grad is not None
                    batch.gradients.write(rows, hidden.grad)
                if optimizer is not None:
                    optimizer.step(batch.first_step + place)
            if to_inputs:
                batch.gradients.advance(number)
            if optimizer is not None:
                optimizer.save(batch.last_step)

    def check_finite(self, value: float, what: str, step: int) -> float:
        """Return a number if it is finite.

        Raises:
            NumericalError: it is NaN or infinite.
        """
        if not math.isfinite(value):
            raise NumericalError(
                f"{what} is {value}",
                where=f"step {step} of the distillation, learning rate "
                f"{self.plan.learning_rate:.2g}",
                remedy="distill with a third of the learning rate (--distill-learning-rate)",
            )
        return value


def _layer_state(folder: Path, number: int, device: torch.device) -> Saved:
    """Return the file of a layer in the folder of a training."""
    return Saved(folder / f"layer-{number:04d}", ProcessGroup(device), {})


def _module_of(architecture: Architecture, number: int, layer: nn.Module) -> nn.Module:
    """Return a module of one decoder layer, whose parameters have their names in the model."""
    whole = holder = nn.Module()
    for part in architecture.layers_path.split("."):
        inner = nn.Module()
        holder.add_module(part, inner)
        holder = inner
    holder.add_module(str(number), layer)
    return whole


class _LayerOptimizer:
    """The steps of one layer.

    Args:
        trainer: the training.
        student: the layer with its masks.
        number: number of the layer.
    """

    def __init__(self, trainer: LayerwiseTrainer, student: Student, number: int) -> None:
        self.trainer, self.student, self.number = trainer, student, number
        self.parameters = student.parameters()
        self.optimizer = trainer.plan.make_optimizer(self.parameters.items())
        self.saved = _layer_state(trainer.folder, number, trainer.device)
        self.saved.load_state(self.parameters, self.optimizer, ())

    def step(self, step: int) -> None:
        """Move the weights along the gradient of one window."""
        trainer, student = self.trainer, self.student
        if student.masks is not None:
            student.masks.hold_gradients(student.model)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), trainer.clip or math.inf)
        trainer.check_finite(float(norm), f"the norm of layer {self.number}'s gradient", step)
        done, share = step / trainer.plan.steps, 1 / trainer.plan.steps
        assert trainer.plan.learning_rate is not None
        for group in self.optimizer.param_groups:
            group["lr"] = trainer.plan.rate(done, share, trainer.plan.learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, step: int) -> None:
        """Store weights and moments, and the number of finished steps.

        After the last step the matrices that learn on a grid are rounded.
        """
        if step == self.trainer.plan.steps:
            self.student.rounded.settle()
        if self.student.masks is not None:
            self.student.masks.check(self.student.model, self.optimizer)
        self.saved.save_state(self.parameters, self.optimizer, (), {"step": step})
