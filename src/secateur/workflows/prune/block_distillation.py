"""Distillation in overlapping blocks of decoder layers, for models that do not fit as a whole.

    dense model, one layer at a time ─► hidden states at the border of every block, predictions
    block after block: train ─► write the layers that no later block has ─► pass the windows on

A block learns the dense model's hidden states after it, the last one its predictions. Each block
begins in the middle of the one before, so a layer learns twice: near the end of a block, and at the
beginning of the next one, where what follows it counts too. What a block needs is on disk in
complete files, and files of a finished block are deleted after the next block is finished. So a
killed run goes on with the block in which it stopped, and its result is the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from secateur.engine.prune.tasks import Tasks
from secateur.engine.stream.activations import Activations
from secateur.engine.stream.calls import call_layer
from secateur.engine.stream.ends import ModelEnds
from secateur.engine.stream.targets import CheckpointTarget
from secateur.engine.stream.walk import walk_layers
from secateur.models.opening import open_weights
from secateur.precision import fast_matmuls
from secateur.progress import Progress
from secateur.runs.atomic import write_json
from secateur.training.blocks import (
    HiddenError,
    LayerBlock,
    LossAfterBlock,
    StreamedTeacher,
    module_of,
)
from secateur.training.objectives import Distil, Objective
from secateur.training.teachers import TOP_K, WrittenTeacher, write_teacher
from secateur.workflows.prune.learning import FINAL, Pupil, pruned_layers, write_layers
from secateur.workflows.prune.prepare import Prepared

__all__ = ["BlockDistillation", "Span", "spans"]

PREDICTIONS = "predictions.safetensors"


@dataclass(frozen=True)
class Span:
    """The layers of a block.

    Attributes:
        start: its first layer.
        stop: the layer after its last one.
        settled: the first layer of the next block; the layers before it are finished.
    """

    start: int
    stop: int
    settled: int


def spans(first: int, count: int, layers: int) -> list[Span]:
    """Divide the layers `first` to `count` − 1 into blocks that overlap by half.

    Args:
        first: the first layer.
        count: number of layers of the model.
        layers: number of layers of a block; the whole range if that is shorter.

    Example:
        >>> from secateur.workflows.prune.block_distillation import spans
        >>> [(x.start, x.stop, x.settled) for x in spans(0, 7, 4)]
        [(0, 4, 2), (2, 6, 3), (3, 7, 7)]
    """
    layers = min(layers, count - first)
    starts = [*range(first, count - layers, layers - layers // 2), count - layers]
    following = [*starts[1:], count]
    return [Span(s, s + layers, n) for s, n in zip(starts, following, strict=True)]


class BlockDistillation:
    """One distillation in blocks.

    Args:
        prepared: the run.
        tasks: the task of each linear.
        pruned: the folder of the pruned model; finished layers are written there.
        work: folder of the state.
        layers: number of decoder layers of a block.
        progress: receives every step.
    """

    def __init__(
        self,
        prepared: Prepared,
        tasks: Tasks,
        pruned: Path,
        work: Path,
        layers: int,
        progress: Progress,
    ) -> None:
        self.tasks, self.work, self.progress = tasks, work, progress
        self.recipe, self.dense, self.windows = prepared.recipe, prepared.target, prepared.lessons
        self.device = self.dense.device
        trust = self.recipe.trust_remote_code
        self.student = CheckpointTarget(
            open_weights(pruned), None, self.device, dtype=torch.float32, trust_remote_code=trust
        )
        work.mkdir(parents=True, exist_ok=True)
        self.ends = ModelEnds(self.dense, self.windows, work)
        self.count = len(self.dense.layers)
        self.learning = pruned_layers(self.dense, tasks)
        self.spans = spans(self.learning[0], self.count, layers)
        (self.example,) = self.ends.embed([slice(0, 1)])

    def states(self, of: str, layer: int = 0) -> Activations:
        """Return the hidden states on disk of the `dense` or the `pruned` model at a layer."""
        folder = self.work / of
        folder.mkdir(parents=True, exist_ok=True)
        shape = (*self.windows.shape, self.example.shape[-1])
        states = Activations(shape, self.example.dtype, folder, False)
        states.layer = layer
        return states

    def learn(self) -> dict[str, float]:
        """Distill block after block. Finished layers are in the folder of the pruned model.

        Returns:
            The mean loss of the last block over the first and over the last eighth of its steps,
            and its learning rate; the mean error of the hidden states of the other blocks likewise;
            the blocks.
        """
        if not (self.work / PREDICTIONS).exists():
            self.pass_dense()
            self.predict()
        for number in range(len(self.spans)):
            if not self.record(number).exists():
                self.distill(number)
        found = [
            json.loads(self.record(number).read_text(encoding="utf-8"))
            for number in range(len(self.spans))
        ]
        inner = [x for x in found[:-1] if x]
        hidden = {
            f"hidden_{when}": sum(x[f"loss_{when}"] for x in inner) / len(inner)
            for when in ("before", "after")
            if inner
        }
        layers = float(self.spans[0].stop - self.spans[0].start)
        return {**found[-1], **hidden, "blocks": float(len(found)), "block_layers": layers}

    def record(self, number: int) -> Path:
        """The file with the losses of a finished block."""
        return self.work / f"block-{number:03d}.json"

    def saved(self, number: int) -> Path:
        """The folder with the state and the weights of a block."""
        return self.work / f"block-{number:03d}"

    # -- the dense model -------------------------------------------------------------------------

    @torch.no_grad()
    def pass_dense(self) -> None:
        """Store the dense model's hidden states at every border, and after the last layer."""
        borders = {self.spans[0].start, *(span.stop for span in self.spans)}
        states = self.states("dense")
        start = max((i for i in range(self.count + 1) if states.has(i)), default=None)
        if start is None:
            rows = list(self.rows())
            for row, hidden in zip(rows, self.ends.embed(rows), strict=True):
                states.write(row, hidden)
            states.advance(start := 0)
        self.progress.start("dense hidden states", len(self.windows) * (self.count - start))
        for index, layer in walk_layers(self.dense, range(start, self.count)):
            states.layer = index
            for row in self.rows():
                hidden = states.read(row).to(self.device)
                call = self.ends.call(index, [row.start])
                with fast_matmuls(self.device):
                    states.write(row, call_layer(layer, hidden, call))
                self.progress.step(note=f"layer {index}")
            states.advance(index + 1)
            if index not in borders:
                states.forget(index)
        self.progress.finish()

    def predict(self) -> None:
        """Store the dense model's predictions."""
        states = self.states("dense", self.count)
        self.progress.start("dense predictions", len(self.windows))
        with self.ends.outside():
            teacher = StreamedTeacher(self.ends, states)
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

    # -- the blocks ------------------------------------------------------------------------------

    def distill(self, number: int) -> None:
        """Train a block, write its finished layers, and pass the windows through them."""
        span = self.spans[number]
        inputs = self.states("pruned" if number else "dense", span.start)
        losses: dict[str, float] = {}
        finished = range(span.start, span.settled)
        if set(range(span.start, span.stop)) & set(self.learning):
            losses = self.train(number, inputs)
        settled = sorted(set(finished) & set(self.learning))
        if settled:
            write_layers(self.saved(number) / FINAL, self.dense, settled)
        if span.settled < self.count:
            self.pass_on(inputs, finished)
        write_json(self.record(number), losses)
        inputs.forget(span.start)
        self.states("dense").forget(span.stop)
        if number:
            shutil.rmtree(self.saved(number - 1), ignore_errors=True)

    def train(self, number: int, inputs: Activations) -> dict[str, float]:
        """Train a block, or go on with it. Its weights are in `FINAL` of its folder."""
        span = self.spans[number]
        numbers = range(span.start, span.stop)
        with ExitStack() as stack:
            layers = {i: stack.enter_context(self.student.layer(i)) for i in numbers}
            whole = module_of(self.student.architecture, layers)
            pupil = Pupil.of(whole, self.student, self.tasks, set(numbers) & set(self.learning))
            if number:
                self.take_over(whole, number - 1)
            block = LayerBlock(layers, {i: self.ends_of(i, number) for i in numbers}, inputs)
            objective = self.objective(block, span, stack)
            return pupil.learn(
                objective,
                self.windows,
                self.recipe.distillation,
                self.recipe.calibration.seed,
                self.progress,
                saved=self.saved(number),
                label=f"distilling layers {span.start} to {span.stop - 1}",
            )

    def ends_of(self, layer: int, number: int) -> ModelEnds:
        """Return the ends that know how a layer of a block is called.

        They keep values of the tokens for one layer at a time. So a layer that needs such values
        has ends of its own.
        """
        if not self.ends.calls()[layer].varying:
            return self.ends
        folder = self.saved(number) / f"layer-{layer}"
        folder.mkdir(parents=True, exist_ok=True)
        return ModelEnds(self.dense, self.windows, folder)

    def objective(self, block: LayerBlock, span: Span, stack: ExitStack) -> Objective:
        """Return the loss of a block. The end of the model has its weights until `stack` ends."""
        if span.stop < self.count:
            return HiddenError(block, self.states("dense", span.stop))
        ends = ModelEnds(self.student, self.windows)
        stack.enter_context(ends.outside())
        with ends.returning(None):
            loss = Distil.between(
                self.student.model,
                WrittenTeacher(self.work / PREDICTIONS),
                next_token=self.recipe.distillation.next_token,
            )
        return LossAfterBlock(block, ends, loss)

    @torch.no_grad()
    def take_over(self, whole: nn.Module, number: int) -> None:
        """Give the layers that an earlier block has trained its weights."""
        file = self.saved(number) / FINAL
        if not file.exists():  # nothing of that block was pruned
            return
        own = dict(whole.named_parameters())
        with safe_open(file, "pt") as learned:
            for name in own.keys() & set(learned.keys()):
                own[name].copy_(learned.get_tensor(name))

    @torch.no_grad()
    def pass_on(self, inputs: Activations, finished: Sequence[int]) -> None:
        """Pass the windows through finished layers, as the pruned model has them on disk."""
        outputs = self.states("pruned")
        for index, layer in walk_layers(self.student, finished):
            for row in self.rows():
                hidden = inputs.read(row).to(self.device, torch.float32)
                call = self.ends.call(index, [row.start]).to(self.device, torch.float32)
                with fast_matmuls(self.device):
                    outputs.write(row, call_layer(layer, hidden, call))
            outputs.advance(index + 1)
            if index != finished[0]:
                outputs.forget(index)
            inputs = outputs

    def rows(self) -> Iterator[slice]:
        """Yield the windows one by one."""
        return (slice(row, row + 1) for row in range(len(self.windows)))
