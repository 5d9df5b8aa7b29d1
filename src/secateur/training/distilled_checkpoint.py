"""Distills one checkpoint into another: both whole models in memory, or one decoder layer.

The trained weights are in complete files before the first weight of the smaller checkpoint is
overwritten. So a resumed run either trains the smaller model again or writes the trained weights.
It never mixes the two.

With one decoder layer, for models that do not fit as a whole:

    dense model, one layer at a time ─► its predictions, on disk
    for every N windows: all layers forward, all layers backward ─► weights, on disk
    ─► the weights go into the checkpoint

A training of N windows is a layer-wise pass (`engine/stream/layerwise.py`), in whose backward a
layer moves after every window: masks, clip to 1/√layers, a step of Adam.

The gradients are those of the whole model. With N = 1 the steps are those of the ordinary loop, but
for the clipping: a layer does not know the norm of the others' gradients. With more windows a layer
makes N steps with what the other layers computed before these steps, and everything is read and
written once for N windows. Hidden states, gradients, weights and moments are on disk.

A killed run continues with the layer in which it stopped, and its result is the same.

Pudipeddi et al. 2020, "Training Large Neural Networks with Constant Memory using a New Execution
Algorithm" (L2L), arXiv:2002.05645, adds up the gradients of the N windows and makes one step.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.engine.prune.reconstruction import in_float32
from secateur.engine.prune.tasks import Tasks
from secateur.engine.stream.calls import LayerCall
from secateur.engine.stream.hidden_states import Activations, EmbeddingAndHead
from secateur.engine.stream.layerwise import LayerwisePass
from secateur.errors import NumericalError
from secateur.machine import fast_dtype, fast_matmuls, reused_training_pages
from secateur.models.architecture import Architecture, hidden_size
from secateur.models.attention import WrittenOut
from secateur.models.block_files import BlockFiles
from secateur.models.checkpoint import PatchedCopy
from secateur.models.experts import open_experts
from secateur.models.opening import load_whole, open_weights
from secateur.models.targets import CheckpointTarget, Target
from secateur.progress import Progress
from secateur.runs.output import write_json
from secateur.training import distillation, objectives
from secateur.training.batches import Batch, Batches
from secateur.training.distillation import DistillationData, Student
from secateur.training.divergences import hidden_loss
from secateur.training.process_group import ProcessGroup
from secateur.training.saved import Saved, open_tensors

FOLDER = "distillation"
"""The folder of the state, in the folder of the work."""

FINAL = "final.safetensors"
"""The file with the weights of a finished training in memory."""

LEARNED = "learned.json"
"""The file with the losses of a finished distillation."""


def distill_checkpoint(
    dense: CheckpointTarget,
    folder: Path,
    tasks: Tasks | None,
    data: DistillationData,
    sweep_windows: int,
    work: Path,
    progress: Progress,
) -> dict[str, float] | None:
    """Let a smaller checkpoint learn from the dense one, and overwrite its weights.

    In a pruned model the layers with pruned or rounded weights learn, or all layers if the options
    name a teacher. In a cut model all layers learn, and with both models in memory everything but
    the embeddings and the head.

    Args:
        dense: the model to learn from.
        folder: the smaller model.
        tasks: the tasks of the linears in a pruned model, whose zeros and grids stay; None for a
            cut model.
        data: the windows, and how often they are read.
        sweep_windows: number of windows in a sweep with one layer in memory; 0 for both models.
        work: folder of the work; a stopped run resumes.
        progress: receives every step.

    Returns:
        The losses, as `distill` returns them; None if nothing learns.
    """
    reader, saved = open_weights(folder), work / FOLDER
    made = CheckpointTarget(reader, None, dense.device, dtype=torch.float32)
    layers = list(range(len(made.layers)))
    if tasks is not None and data.options.teacher is None:
        layers = distillation.pruned_layers(made, tasks)
    if not data.options.epochs or not layers:
        return None

    def student_of(module: nn.Module, numbers: Sequence[int]) -> Student:
        if tasks is not None:
            return Student.of(module, made, tasks, numbers)
        names = [n for number in numbers for n in distillation.trainable_names(made, number)]
        return Student(module, frozenset(names), hidden_size(made.model))

    def learn_whole() -> dict[str, float]:
        device, fast = dense.device, fast_dtype(dense.device)
        teacher = load_whole(dense.reader.folder, device, dtype=fast)
        model = load_whole(folder, device)
        open_experts(model)  # its parameters get the names in the skeleton
        student = student_of(model, layers)
        if tasks is None:
            ends = model.get_input_embeddings(), model.get_output_embeddings()
            fixed = {id(p) for module in ends for p in module.parameters()}
            named = [(n, p) for n, p in model.named_parameters() if id(p) not in fixed]
            trained = frozenset(n for n, p in named if p.is_floating_point() and p.numel())
            student = replace(student, trained=trained)
        return distillation.distill(teacher, student, data, progress, saved)

    file, copy, size = saved / LEARNED, PatchedCopy(reader, folder), sweep_windows
    if not file.exists() and size:
        found = _distill_in_sweeps(dense, made, layers, student_of, data, size, saved, progress)
        write_json(file, found)
    elif not file.exists():
        write_json(file, learn_whole())
    trained = [(saved / FINAL, "")]
    if sweep_windows:
        states = [_layer_folder(saved / TRAINING, number) for number in layers]
        trained = [(state / "state.safetensors", "weights/") for state in states]
    for stored, prefix in trained:
        with open_tensors(stored) as tensors:
            for name in tensors:
                if name.startswith(prefix):
                    copy.write(made.stored[name.removeprefix(prefix)], tensors[name])
    copy.sync()
    BlockFiles(folder).recode(made.reader.read)
    losses: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    return losses


PREDICTIONS = "predictions.safetensors"
TRAINING = "training"
"""The folder of the training, with a file for each layer."""

LOSSES = "losses.json"
"""The file with the loss of each finished step."""

FEWEST_SWEEPS = 8
"""The fewest times that the layers are passed. With fewer, the steps of a layer know too little of
the others: two passes of 24 windows each made a tiny model worse."""


def _distill_in_sweeps(
    dense: Target,
    made: CheckpointTarget,
    layers: Sequence[int],
    student_of: Callable[[nn.Module, Sequence[int]], Student],
    data: DistillationData,
    sweep_windows: int,
    work: Path,
    progress: Progress,
) -> dict[str, float]:
    """Distill with one decoder layer in memory. The trained weights are in files.

    Args:
        dense: the model to learn from.
        made: the checkpoint of the smaller model in float32; it is only read.
        layers: numbers of the layers that learn.
        student_of: see `_StreamedStudent`.
        data: the windows, and how often they are read.
        sweep_windows: number of windows that the layers pass at a time; at most an eighth of the
            steps are taken, a 16th if trials choose the rate.
        work: folder of the state.
        progress: receives every step.

    Returns:
        The mean loss over the first and over the last eighth of the steps, the learning rate, and
        the number of windows that the layers pass at a time.
    """
    windows, options, taught = data.windows, data.options, None
    # Trials have this size too: they must measure a rate with gradients as old as it will meet.
    fewest = FEWEST_SWEEPS * (1 if options.peak_learning_rate else 2)  # a trial has two
    size = min(sweep_windows, max(1, data.steps // fewest))
    work.mkdir(parents=True, exist_ok=True)
    if options.hidden or not (work / PREDICTIONS).exists():
        taught = _predict(dense, data, work, progress)
    outer = EmbeddingAndHead(made, windows)
    with outer.outside(), outer.returning(None):
        teacher = objectives.WrittenTeacher(work / PREDICTIONS)
        loss = objectives.Distil.between(made.model, teacher, next_token=options.next_token)
    student = _StreamedStudent(layers, student_of, outer, loss, work, options.hidden, taught)

    winner = work / distillation.WINNER

    def trainer(
        batches: Batches, steps: int, rate: float, name: str, label: str
    ) -> LayerwiseTrainer:
        folder, best = work / name, winner if name == TRAINING else None
        folder.mkdir(exist_ok=True)
        return LayerwiseTrainer(student, batches, steps, rate, size, folder, best, progress, label)

    rate, losses = data.highest_rate(hidden_size(made.model)), list[float]()
    if data.held_out:
        trial: list[LayerwiseTrainer] = []

        def train(rate: float, steps: int) -> list[float]:
            read, name = data.batches_of_trials, f"trial-{rate:.3g}"
            trial[:] = [trainer(read, steps, rate, name, distillation.CHOOSING)]
            return trial[0].run()

        def keep() -> None:
            shutil.rmtree(winner, ignore_errors=True)
            trial[0].folder.rename(winner)

        rate, losses = distillation.choose_rate(
            rate,
            data,
            train,
            lambda: trial[0].evaluate(range(len(windows) - data.held_out, len(windows))),
            keep,
            # the checkpoint is only read, so a trial leaves nothing else behind
            lambda: shutil.rmtree(trial[0].folder, ignore_errors=True),
            work / distillation.TRIED,
        )
    batches, left = data.batches_after(len(losses)), data.steps - len(losses)
    rest = trainer(batches, left, rate, TRAINING, "distilling").run()
    shutil.rmtree(winner, ignore_errors=True)
    own = {"learning_rate": rate, "sweep_windows": float(size)}
    return distillation.summary([*losses, *rest]) | own


def _predict(dense: Target, data: DistillationData, work: Path, progress: Progress) -> Activations:
    """Store the dense model's predictions. Return the outputs of its last layer.

    These stay stored if the loss has a term of hidden states.
    """
    windows = data.windows
    outer = EmbeddingAndHead(dense, windows, work)

    @contextmanager
    def layer(number: int) -> Iterator[tuple[nn.Module, Callable[[int], None]]]:
        with dense.layer(number) as layer:
            yield layer, lambda place: progress.step(note=f"layer {number}")

    walk = LayerwisePass(
        outer,
        range(len(windows)),
        work / "dense",
        lambda number, window: outer.call(number, [window]),
        lambda: fast_matmuls(dense.device),
    )
    progress.start("dense hidden states", len(windows) * (walk.count - walk.passed))
    walk.forward(layer, keep=False)
    progress.finish()
    if (work / PREDICTIONS).exists():
        return walk.states
    progress.start("dense predictions", len(windows))
    with outer.outside():
        teacher = _StreamedTeacher(outer, walk.states)
        objectives.write_teacher(
            teacher,
            windows,
            work / PREDICTIONS,
            k=min(objectives.TOP_K, teacher.vocabulary - 1),
            device=dense.device,
            on_window=progress.step,
        )
    if not data.options.hidden:
        walk.states.forget(walk.count)
    progress.finish()
    return walk.states


class _StreamedTeacher(objectives.ModelTeacher):
    """A teacher whose last hidden states are stored. Use it only within `outer.outside()`.

    Args:
        outer: embedding and head of the dense model.
        states: the outputs of its last decoder layer for all windows.
    """

    def __init__(self, outer: EmbeddingAndHead, states: Activations) -> None:
        self.outer, self.states = outer, states
        with outer.returning(None):  # to find the head, the model runs without its layers
            super().__init__(outer.target.model)

    def __call__(
        self, batch: Batch, temperature: float, layers: Sequence[int]
    ) -> objectives.Taught:
        """See `Teacher`."""
        (number,) = batch.numbers
        hidden = self.states.read(slice(number, number + 1)).to(batch.ids.device)
        with self.outer.returning(hidden):
            return super().__call__(batch, temperature, layers)


@dataclass(frozen=True)
class _StreamedStudent:
    """The checkpoint of a smaller model that learns, layer by layer.

    Args:
        learning: numbers of the layers that learn.
        student_of: a module with some layers, and their numbers → the student. The layers have the
            checkpoint's weights.
        outer: embedding and head of the checkpoint in float32, with all windows.
        loss: the loss on the logits.
        folder: for the values of each token that some families give to their layers.
        hidden: weight of the distance of the last layer's outputs from `taught`.
        taught: what the last layer of the dense model returns for all windows.
    """

    learning: Sequence[int]
    student_of: Callable[[nn.Module, Sequence[int]], Student]
    outer: EmbeddingAndHead
    loss: objectives.Objective
    folder: Path
    hidden: float = 0.0
    taught: Activations | None = None
    outer_of_layers: dict[int, EmbeddingAndHead] = field(default_factory=dict)

    def call(self, number: int, window: int) -> LayerCall:
        """How a layer is called for a window.

        The values of tokens that a layer gets are kept for one layer at a time, so each such layer
        has an object of its own.
        """
        outer = self.outer
        if outer.calls()[number].varying:
            if number not in self.outer_of_layers:
                folder = self.folder / f"values-{number:04d}"
                folder.mkdir(parents=True, exist_ok=True)
                self.outer_of_layers[number] = EmbeddingAndHead(outer.target, outer.windows, folder)
            outer = self.outer_of_layers[number]
        return outer.call(number, [window])

    def loss_of(self, window: int, hidden: Tensor) -> Tensor:
        """Return the loss of a window from the outputs of the last layer; within `outside()`."""
        target, ids = self.outer.target, self.outer.windows[window : window + 1]
        with self.outer.returning(hidden):
            loss = self.loss(target.model, Batch(ids.to(target.device), (window,)))
        if not self.hidden or self.taught is None:
            return loss
        expected = self.taught.read(slice(window, window + 1)).to(target.device)
        own, other = ({0: self.outer.states(x)} for x in (hidden, expected))
        return loss + self.hidden * hidden_loss(own, other, ((0, 0),))


class LayerwiseTrainer:
    """One layer-wise training. A killed one continues with the layer in which it stopped.

    Args:
        student: the model.
        batches: the window of each step.
        steps: number of steps.
        rate: the highest learning rate.
        size: number of windows that the layers pass at a time.
        folder: of its files. Weights and moments of a layer are in one file, with the number of
            steps that the layer has done.
        begins: folder of the trial with whose weights the training begins, if it is there; None
            for a trial, which begins with the weights of the checkpoint.
        progress: receives every step.
        label: the title of the progress bar.
    """

    def __init__(
        self,
        student: _StreamedStudent,
        batches: Batches,
        steps: int,
        rate: float,
        size: int,
        folder: Path,
        begins: Path | None,
        progress: Progress,
        label: str,
    ) -> None:
        self.student, self.batches, self.steps, self.rate = student, batches, steps, rate
        self.size, self.folder, self.begins = size, folder, begins
        self.progress, self.label = progress, label
        self.plan = distillation.distillation_plan(steps, rate)
        self.target, self.learning = student.outer.target, set(student.learning)
        self.device, self.count = self.target.device, len(self.target.layers)
        # n layers with norms of clip / √n have the norm `clip` together
        self.clip = self.plan.clip / math.sqrt(len(self.learning))

    def run(self) -> list[float]:
        """Train. The weights are in the files of the layers.

        Returns:
            The loss of each step.

        Raises:
            NumericalError: a loss or a gradient is NaN or infinite.
        """
        steps, file = self.steps, self.folder / LOSSES
        done: list[float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        # in a sweep every layer is passed twice: forward and backward
        finished, of_batch = -(-len(done) // self.size), 2 * self.count
        self.progress.start(self.label, -(-steps // self.size) * of_batch)
        self.progress.step(finished * of_batch)
        with reused_training_pages():
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
        walk = self._pass(windows, folder)
        walk.forward(self._layer)
        with torch.no_grad(), self.student.outer.outside(), self._precision():
            walk.states.resume(self.count)
            losses = [
                self.student.loss_of(window, walk.states.read(rows).to(self.device)).item()
                for window, rows in zip(windows, walk.rows, strict=True)
            ]
        shutil.rmtree(folder)
        return sum(losses) / len(losses)

    def _train_batch(self, done: int, size: int, folder: Path) -> list[float]:
        """Do the next steps. Return their losses."""
        windows = [self.batches.numbers(done + place)[0] for place in range(size)]
        for other in self.folder.glob("sweep-*"):  # what is left of a finished one
            if other != folder:
                shutil.rmtree(other)
        walk, file = self._pass(windows, folder), folder / LOSSES

        def loss(place: int, hidden: Tensor) -> Tensor:
            found = self.student.loss_of(windows[place], hidden)
            self.check_finite(found.item(), "the loss", done + place)
            return found

        if file.exists():
            self.progress.step(self.count)
        else:
            self.progress.step(walk.passed)
            walk.forward(
                self._layer, lambda number: self.progress.step(note=f"layer {number} forward")
            )
            write_json(file, walk.losses(loss))
        losses: list[float] = json.loads(file.read_text(encoding="utf-8"))
        self._backward(walk, done, f"step {done + size}, loss {sum(losses) / size:.3f}")
        return losses

    def _pass(self, windows: Sequence[int], folder: Path) -> LayerwisePass:
        """Some windows on their way through the layers, begun or not."""
        student = self.student
        return LayerwisePass(student.outer, windows, folder, student.call, self._precision)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """The context of a forward: precision, and how attention is computed."""
        written = self.plan.writes_out(self.device, self.batches.windows.shape[1])
        with fast_matmuls(self.device), WrittenOut() if written else nullcontext():
            yield

    @contextmanager
    def _student(self, number: int) -> Iterator[tuple[nn.Module, Student | None]]:
        """A context with a layer and its newest weights, and its student if it learns."""
        with self.target.layer(number) as layer:
            if number not in self.learning:
                yield layer.requires_grad_(False), None
                return
            module = _module_of(self.target.architecture, number, layer)
            student = self.student.student_of(module, [number])
            with in_float32(student.model, student.trained), student.rounded.in_forwards():
                # the weights of the best trial, then those of this training's steps, if there are
                for folder in (self.begins, self.folder):
                    if folder is not None and folder.exists():
                        saved = _layer_state(folder, number, self.device)
                        saved.load_weights(student.parameters())
                yield layer, student

    @contextmanager
    def _layer(self, number: int) -> Iterator[tuple[nn.Module, Callable[[int], None]]]:
        """A context with a layer and its newest weights, for a forward."""
        with self._student(number) as (layer, _):
            yield layer, lambda place: None

    def _backward(self, walk: LayerwisePass, done: int, note: str) -> None:
        """Pass the gradients down, and let every layer learn after every window."""
        # below the first layer that learns no gradient is needed
        first, last_step = min(self.learning), done + len(walk.windows)

        @contextmanager
        def learning(number: int) -> Iterator[tuple[nn.Module, Callable[[int], None]]]:
            with self._student(number) as (layer, student):
                if student is None:
                    yield layer, lambda place: None
                    return
                parameters, masks, model = student.parameters(), student.masks, student.model
                optimizer = self.plan.make_optimizer(parameters.items())
                saved = _layer_state(self.folder, number, self.device)
                saved.load_state(parameters, optimizer, ())

                def step(place: int) -> None:
                    masks.hold_gradients(model)
                    limit, what = self.clip or math.inf, f"the norm of layer {number}'s gradient"
                    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), limit)
                    self.check_finite(float(norm), what, done + place)
                    share = (done + place) / self.steps
                    for group in optimizer.param_groups:
                        group["lr"] = self.plan.rate(share, 1 / self.steps, self.rate)
                    optimizer.step()
                    optimizer.zero_grad()

                yield layer, step
                if last_step == self.steps and self.begins is not None:  # a trial goes on
                    student.rounded.settle()
                masks.check(model, optimizer)
                saved.save_state(parameters, optimizer, (), {"step": last_step})

        # A killed backward continues below the lowest layer whose file knows the last step.
        def is_finished(number: int) -> bool:
            if number not in self.learning:
                return walk.gradients.has(number)
            saved = _layer_state(self.folder, number, self.device)
            return bool(saved.facts().get("step", 0) == last_step)

        walk.backward(
            learning,
            is_finished,
            lambda number: self.progress.step(note=f"{note}, layer {number} backward"),
            first,
        )
        self.progress.step(first, note)

    def check_finite(self, value: float, what: str, step: int) -> None:
        """Refuse a number that is not finite.

        Raises:
            NumericalError: it is NaN or infinite.
        """
        if not math.isfinite(value):
            raise NumericalError(
                f"{what} is {value}",
                where=f"step {step} of the distillation, learning rate {self.rate:.2g}",
                remedy="distill with a third of the learning rate (--distill-learning-rate)",
            )


def _layer_state(folder: Path, number: int, device: torch.device) -> Saved:
    """The weights and moments of a layer."""
    return Saved(_layer_folder(folder, number), ProcessGroup(device))


def _layer_folder(folder: Path, number: int) -> Path:
    """The folder of a layer in the folder of a training."""
    return folder / f"layer-{number:04d}"


def _module_of(architecture: Architecture, number: int, layer: nn.Module) -> nn.Module:
    """Return a module of one decoder layer, whose parameters have their names in the model."""
    whole = holder = nn.Module()
    for part in architecture.layers_path.split("."):
        inner = nn.Module()
        holder.add_module(part, inner)
        holder = inner
    holder.add_module(str(number), layer)
    return whole
