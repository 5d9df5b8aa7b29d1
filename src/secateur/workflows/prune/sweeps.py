"""Training of a whole model with one decoder layer in memory, in sweeps over N windows.

    forward     layer by layer, all N windows:       hₗ₊₁ = fₗ(hₗ)
    loss        after the last layer, each window:   L, and g = ∂L/∂h
    backward    layer by layer, from the last; in each, window after window:
                    fₗ(hₗ) again;  g ← (∂fₗ/∂hₗ)ᵀ g  for the layer below;
                    the gradient of the layer's weights: masks, clip to 1/√layers, a step of Adam

The gradients are those of the whole model. With N = 1 the steps are those of the ordinary loop, but
for the clipping: a layer does not know the norm of the others' gradients. With more windows a layer
makes N steps with what the other layers computed before these steps, and everything is read and
written once for N windows. Hidden states, gradients, weights and moments are on disk.

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
from secateur.engine.stream.embedding_and_head import ModelEnds
from secateur.engine.stream.targets import CheckpointTarget
from secateur.errors import NumericalError
from secateur.models.attention import WrittenOut
from secateur.precision import fast_matmuls, full_float32
from secateur.progress import Progress, Silent
from secateur.runs.atomic import write_json
from secateur.training.batches import Batch, Batches
from secateur.training.objectives import Objective
from secateur.training.process_group import ProcessGroup
from secateur.training.saved import Saved
from secateur.training.streamed import module_of
from secateur.training.training_plan import TrainingPlan
from secateur.workflows.prune.learning import Pupil

LOSSES = "losses.json"
"""The file with the losses of all finished sweeps, one for each step."""


@dataclass(frozen=True)
class Scholar:
    """The checkpoint of a smaller model that learns, layer by layer.

    Args:
        target: the checkpoint in float32; it is only read.
        windows: token ids [windows, length].
        learning: numbers of the layers that learn.
        pupil: a module with one layer, and the number of that layer → the pupil. The layer has the
            checkpoint's weights.
        ends: the ends of the checkpoint.
        loss: the loss on the logits.
        folder: for the values of each token that some families give to their layers.
    """

    target: CheckpointTarget
    windows: Tensor
    learning: Sequence[int]
    pupil: Callable[[nn.Module, int], Pupil]
    ends: ModelEnds
    loss: Objective
    folder: Path
    of_layers: dict[int, ModelEnds] = field(default_factory=dict)

    def calls(self, number: int, windows: Sequence[int]) -> list[LayerCall]:
        """How a layer is called for each of some windows.

        The values of tokens that a layer gets are kept for one layer at a time, so each such layer
        has ends of its own.
        """
        ends = self.ends
        if ends.calls()[number].varying:
            if number not in self.of_layers:
                folder = self.folder / f"values-{number:04d}"
                folder.mkdir(parents=True, exist_ok=True)
                self.of_layers[number] = ModelEnds(self.target, self.windows, folder)
            ends = self.of_layers[number]
        return [ends.call(number, [window]) for window in windows]

    def loss_of(self, number: int, hidden: Tensor) -> Tensor:
        """Return the loss of a window from the outputs of the last layer; within `outside()`."""
        device = self.target.device
        batch = Batch(self.windows[number : number + 1].to(device), (number,))
        with self.ends.returning(hidden):
            return self.loss(self.target.model, batch)


class OpenSweep:
    """One sweep: its windows, and what is on disk of it.

    Args:
        windows: numbers of the windows.
        first_step: the step of the first one.
        folder: of its files.
        like: the input of a layer for one window.
    """

    def __init__(self, windows: Sequence[int], first_step: int, folder: Path, like: Tensor) -> None:
        self.windows, self.first_step, self.folder = windows, first_step, folder
        shape = (len(windows), *like.shape[1:])
        self.states, self.gradients = (
            Activations(shape, torch.float32, self.made(name), False)
            for name in ("states", "gradients")
        )

    def made(self, name: str) -> Path:
        """Return a folder for some files."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def rows(self) -> Iterator[tuple[int, slice]]:
        """Yield the place of each window, and its rows in the files."""
        return ((place, slice(place, place + 1)) for place in range(len(self.windows)))


class Sweeps:
    """One training in sweeps. A killed one goes on with the layer in which it stopped.

    Args:
        scholar: the model.
        batches: the window of each step.
        plan: number of steps, and the course of the learning rate.
        size: number of windows in a sweep.
        folder: of its files. Weights and moments of a layer are in one file, with the number of
            steps that the layer has done.
        progress: receives every step.
        label: the title of the progress bar.
    """

    def __init__(
        self,
        scholar: Scholar,
        batches: Batches,
        plan: TrainingPlan,
        size: int,
        folder: Path,
        progress: Progress,
        label: str,
    ) -> None:
        self.scholar, self.batches, self.plan = scholar, batches, plan
        self.size, self.folder, self.progress, self.label = size, folder, progress, label
        self.target, self.learning = scholar.target, set(scholar.learning)
        self.device, self.count = scholar.target.device, len(scholar.target.layers)
        self.clip = plan.clip / math.sqrt(len(self.learning))

    def run(self) -> list[float]:
        """Train. The weights are in the files of the layers.

        Returns:
            The loss of each step.

        Raises:
            NumericalError: a loss or a gradient is NaN or infinite.
        """
        steps, done = self.plan.steps, self.losses()
        finished, of_sweep = -(-len(done) // self.size), 2 * self.count
        self.progress.start(self.label, -(-steps // self.size) * of_sweep)
        self.progress.step(finished * of_sweep)
        with reused_pages(TRAINING_BLOCK_BYTES, TRAINING_BYTES):
            while len(done) < steps:
                done = self.sweep(done, min(self.size, steps - len(done)))
        self.progress.finish()
        return done

    def losses(self) -> list[float]:
        """Return the losses of all finished sweeps."""
        told = self.folder / LOSSES
        return json.loads(told.read_text(encoding="utf-8")) if told.exists() else []

    def sweep(self, done: list[float], size: int) -> list[float]:
        """Do a sweep. Return the losses with its own."""
        windows = [self.batches.numbers(len(done) + place)[0] for place in range(size)]
        sweep = self.open(windows, len(done), self.folder / f"sweep-{len(done):06d}")
        told = sweep.folder / LOSSES
        if told.exists():
            self.progress.step(self.count)
        else:
            self.forward(sweep, self.progress)
            write_json(told, self.head(sweep))
        own = json.loads(told.read_text(encoding="utf-8"))
        self.backward(sweep, f"step {len(done) + size}, loss {sum(own) / size:.3f}")
        write_json(self.folder / LOSSES, [*done, *own])
        shutil.rmtree(sweep.folder)
        return [*done, *own]

    def judge(self, windows: Sequence[int]) -> float:
        """Return the mean loss of some windows."""
        folder = self.folder / "judged"
        shutil.rmtree(folder, ignore_errors=True)
        sweep = self.open(windows, 0, folder)
        self.forward(sweep, Silent())
        with torch.no_grad(), self.scholar.ends.outside(), self.quick():
            sweep.states.resume(self.count)
            losses = [
                self.scholar.loss_of(windows[place], self.read(sweep.states, rows)).item()
                for place, rows in sweep.rows()
            ]
        shutil.rmtree(folder)
        return sum(losses) / len(losses)

    def open(self, windows: Sequence[int], first_step: int, folder: Path) -> OpenSweep:
        """Return a sweep, begun or not; what is left of a finished one is deleted."""
        for other in self.folder.glob("sweep-*"):
            if other != folder and folder.name.startswith("sweep-"):
                shutil.rmtree(other)
        (like,) = self.scholar.ends.embed([slice(windows[0], windows[0] + 1)])
        return OpenSweep(windows, first_step, folder, like)

    @contextmanager
    def quick(self) -> Iterator[None]:
        """The context of a forward: precision, and the way of attention."""
        written = self.plan.writes_out(self.device, self.batches.windows.shape[1])
        with fast_matmuls(self.device), WrittenOut() if written else nullcontext():
            yield

    def read(self, stored: Activations, rows: slice) -> Tensor:
        """Return the stored states of a window on the device."""
        return stored.read(rows).to(self.device)

    def saved(self, number: int) -> Saved:
        """Return the file of a layer."""
        return layer_state(self.folder, number, self.device)

    @contextmanager
    def layer(self, number: int) -> Iterator[tuple[nn.Module, Pupil | None]]:
        """A context with a layer and its newest weights, and its pupil if it learns."""
        with self.target.layer(number) as layer:
            if number not in self.learning:
                yield layer.requires_grad_(False), None
                return
            pupil = self.scholar.pupil(module_of(self.target.architecture, {number: layer}), number)
            with in_float32(pupil.model, pupil.trained), pupil.rounded.in_forwards():
                self.saved(number).load_weights(pupil.parameters())
                yield layer, pupil

    # -- forward ---------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, sweep: OpenSweep, progress: Progress) -> None:
        """Store the inputs of every layer and the outputs of the last one."""
        states = sweep.states
        start = max((i for i in range(self.count + 1) if states.has(i)), default=None)
        if start is None:
            embedded = self.scholar.ends.embed([slice(n, n + 1) for n in sweep.windows])
            for (_, rows), hidden in zip(sweep.rows(), embedded, strict=True):
                states.write(rows, hidden)
            states.advance(start := 0)
        progress.step(start)
        for number in range(start, self.count):
            states.resume(number)
            calls = self.scholar.calls(number, sweep.windows)
            with self.layer(number) as (layer, _):
                for place, rows in sweep.rows():
                    with self.quick():
                        hidden = call_layer(layer, self.read(states, rows), calls[place])
                    states.write(rows, hidden)
            states.advance(number + 1)
            progress.step(note=f"layer {number} forward")

    def head(self, sweep: OpenSweep) -> list[float]:
        """Store the gradients of the last layer's outputs. Return the losses."""
        losses = []
        sweep.states.resume(self.count)
        with self.scholar.ends.outside(), full_float32():
            self.target.model.requires_grad_(False)
            for place, rows in sweep.rows():
                hidden = self.read(sweep.states, rows).requires_grad_()
                with self.quick(), torch.enable_grad():
                    loss = self.scholar.loss_of(sweep.windows[place], hidden)
                losses.append(self.refuse(loss.item(), "the loss", sweep.first_step + place))
                loss.backward()
                assert hidden.grad is not None
                sweep.gradients.write(rows, hidden.grad)
        sweep.gradients.advance(self.count)
        return losses

    # -- backward --------------------------------------------------------------------------------

    def backward(self, sweep: OpenSweep, note: str) -> None:
        """Pass the gradients down, and let every layer learn."""
        first = min(self.learning)
        finished = sweep.first_step + len(sweep.windows)
        for number in reversed(range(first, self.count)):
            if number in self.learning:
                over = self.saved(number).facts().get("step", 0) == finished
            else:
                over = sweep.gradients.has(number)
            if not over:
                self.down(sweep, number, to_inputs=number > first)
            sweep.gradients.forget(number + 1)
            sweep.states.forget(number + 1)
            self.progress.step(note=f"{note}, layer {number} backward")
        self.progress.step(first, note)

    def down(self, sweep: OpenSweep, number: int, *, to_inputs: bool) -> None:
        """Take the gradients through one layer, with a step of the layer for every window.

        The gradients for the layer below are complete on disk before the weights are replaced. So a
        stop between the two only means that this layer is taken again.
        """
        sweep.states.resume(number)
        sweep.gradients.resume(number + 1)
        calls = self.scholar.calls(number, sweep.windows)
        with self.layer(number) as (layer, pupil), full_float32():
            steps = None if pupil is None else LayerSteps(self, pupil, number)
            for place, rows in sweep.rows():
                hidden = self.read(sweep.states, rows).requires_grad_(to_inputs)
                with self.quick(), torch.enable_grad():
                    out = call_layer(layer, hidden, calls[place])
                out.backward(self.read(sweep.gradients, rows))
                if to_inputs:
                    assert hidden.grad is not None
                    sweep.gradients.write(rows, hidden.grad)
                if steps is not None:
                    steps.step(sweep.first_step + place)
            if to_inputs:
                sweep.gradients.advance(number)
            if steps is not None:
                steps.save(sweep.first_step + len(sweep.windows))

    def refuse(self, value: float, what: str, step: int) -> float:
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


def layer_state(folder: Path, number: int, device: torch.device) -> Saved:
    """Return the file of a layer in the folder of a training."""
    return Saved(folder / f"layer-{number:04d}", ProcessGroup(device), {})


class LayerSteps:
    """The steps of one layer within a sweep.

    Args:
        sweeps: the training.
        pupil: the layer with its masks.
        number: number of the layer.
    """

    def __init__(self, sweeps: Sweeps, pupil: Pupil, number: int) -> None:
        self.sweeps, self.pupil, self.number = sweeps, pupil, number
        self.parameters = pupil.parameters()
        self.optimizer = sweeps.plan.make_optimizer(self.parameters.items())
        self.saved = sweeps.saved(number)
        self.saved.load_state(self.parameters, self.optimizer, ())

    def step(self, step: int) -> None:
        """Move the weights along the gradient of one window."""
        sweeps, pupil = self.sweeps, self.pupil
        if pupil.masks is not None:
            pupil.masks.hold_gradients(pupil.model)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), sweeps.clip or math.inf)
        sweeps.refuse(float(norm), f"the norm of layer {self.number}'s gradient", step)
        done, share = step / sweeps.plan.steps, 1 / sweeps.plan.steps
        assert sweeps.plan.learning_rate is not None
        for group in self.optimizer.param_groups:
            group["lr"] = sweeps.plan.rate(done, share, sweeps.plan.learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, step: int) -> None:
        """Store weights and moments, and the number of finished steps.

        After the last step the matrices that learn on a grid are rounded.
        """
        if step == self.sweeps.plan.steps:
            self.pupil.rounded.settle()
        if self.pupil.masks is not None:
            self.pupil.masks.check(self.pupil.model, self.optimizer)
        self.saved.save_state(self.parameters, self.optimizer, (), {"step": step})
