"""The loop of a pruning run.

    first inputs ─► for each decoder layer: read it ─► gather, prune ─► next inputs ─► write, ledger

A run has tasks (`tasks.py`: the sparsity of each linear), a calibration stream
(`stream/passage.py`), and settings (how the work is done). This module has only the loop. Magnitude
needs no calibration and skips the forwards. Taylor and OBD read gradients that an earlier pass
gathered (`gradients`). With reconstruction, the dense model's hidden states pass as well: a pruned
layer is tuned to the outputs of the dense layer before its own outputs are passed on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from secateur.allocator import reused_pages
from secateur.engine.prune.collapse import collapse_error, collapsed, in_words
from secateur.engine.prune.layer_pass import LayerContext, LayerPass
from secateur.engine.prune.linear_record import LinearRecord
from secateur.engine.prune.routing import coverage
from secateur.engine.prune.settings import Settings
from secateur.engine.prune.surgery import all_zero
from secateur.engine.prune.tasks import Tasks, gradient_statistics, input_statistics, left_dense
from secateur.engine.stream.gradients import stored_gradients
from secateur.engine.stream.kinds import kind_of
from secateur.engine.stream.passage import Passage
from secateur.engine.stream.targets import Target
from secateur.engine.stream.walk import walk_layers
from secateur.errors import VerificationError
from secateur.models.architecture import Groups, Linear
from secateur.precision import full_float32
from secateur.progress import Progress
from secateur.runs.ledger import Ledger
from secateur.sparsity.patterns import misplaced

log = logging.getLogger(__name__)


class Run:
    """One pruning run over all decoder layers of a target.

    Args:
        target: the model.
        tasks: the task of each linear (`tasks_of`).
        passage: the calibration stream; None if the tasks need none.
        settings: how the work is done.
        ledger: record of finished layers.
        progress: receives every step.

    Attributes:
        tasks: the same, but linears that calibration does not reach become dense during the run.
    """

    def __init__(
        self,
        target: Target,
        tasks: Tasks,
        passage: Passage | None,
        settings: Settings,
        ledger: Ledger,
        progress: Progress,
    ) -> None:
        self.target, self.tasks, self.passage = target, tasks, passage
        self.settings, self.ledger, self.progress = settings, ledger, progress
        self.statistics = input_statistics(tasks, asymmetric=settings.asymmetric)
        self.steps_taken = 0
        self.verified: set[Hashable] = set()

    @property
    def forwards_needed(self) -> bool:
        """Whether calibration tokens pass through the layers at all."""
        return bool(self.statistics) or self.settings.tunes

    # -- the loop -------------------------------------------------------------------------------

    @property
    def steps_per_layer(self) -> int:
        """The number of progress steps in one layer: one for every forward of a micro-batch."""
        if not self.forwards_needed:
            return 1
        assert self.passage is not None
        forwards = 1 if self.settings.sequential == "group" else 2
        steps = len(self.passage.batches()) * forwards
        if self.settings.dense_needed:
            steps += len(self.passage.batches())
        if self.settings.tunes:
            steps += (2 + self.settings.reconstruction.passes) * len(self.passage.batches())
        return steps

    def step(self, index: int) -> None:
        """Report one step within a layer."""
        self.steps_taken += 1
        self.progress.step(note=f"layer {index}")

    @torch.no_grad()
    @full_float32()
    def execute(self, done: int = 0) -> None:
        """Prune every layer from number `done` on."""
        layers = self.target.layers
        if self.forwards_needed and done < len(layers):
            assert self.passage is not None
            done = self.passage.open(done, dense=self.settings.dense_needed)
            if done == 0:  # also if the hidden states of a stopped run are lost
                self.ledger.begin()
        for entry in self.ledger.layers:
            self.tasks = left_dense(self.tasks, entry.get("unseen", ()))
        self.progress.start("pruning", self.steps_per_layer * (len(layers) - done))
        with reused_pages():
            started = time.perf_counter()  # before the first layer is read
            for index, layer in walk_layers(self.target, range(done, len(layers))):
                self.prune_layer(index, layer, started)
                started = time.perf_counter()
        if self.passage is not None:
            self.passage.close()
        self.progress.finish()
        found = coverage(self.ledger.layers, self.target.architecture)
        if found is not None and self.settings.ranks.first:
            found.tell()

    def prune_layer(self, index: int, layer: nn.Module, started: float) -> None:
        """Prune one decoder layer, write its weights, and record it in the ledger.

        Args:
            index: number of the layer.
            layer: the layer with its dense weights.
            started: start time of the work on it, by `time.perf_counter`.
        """
        self.steps_taken = 0
        tuned: dict[str, float] = {}
        passing = LayerPass(self.context(index), layer)
        for empty in all_zero(passing.linears.values()):
            log.warning("%s is all zero before it is pruned", empty)
        records = passing.prune()
        changed = [f"{record.name}.weight" for record in records]
        biased = {x.name for x in passing.linears.values() if x.has_bias}
        shifted = [x.name for x in records if self.tasks[x.name].method.solver.shifts]
        changed += [f"{name}.bias" for name in shifted if name in biased]
        if passing.tunes:
            tuned = passing.tune()
            prefix = self.target.architecture.layer_name(index)
            changed = [f"{prefix}.{parameter}" for parameter, _ in layer.named_parameters()]
        self.tasks = left_dense(self.tasks, passing.unseen)
        self.verify_kind(layer, list(passing.linears.values()))
        self.target.commit(index, changed)
        self.finish_layer(index, records, tuned, passing.unseen, started)

    def verify_kind(self, layer: nn.Module, linears: Sequence[Linear]) -> None:
        """Check the zeros of every matrix in the first layer of each kind.

        So a fault that affects every layer of a kind ends the run early.

        Raises:
            VerificationError: zeros are missing; the message names layer, matrix and number.
        """
        kind = kind_of(layer)
        if kind in self.verified:
            return
        for linear in linears:
            task = self.tasks[linear.name]
            pattern, asked = task.method.pattern, task.sparsity
            missing = misplaced(pattern, linear.weight, asked)
            if missing:
                raise VerificationError(
                    f"{missing} of {linear.weight.numel()} weights are not zero and should be, "
                    f"at sparsity {asked:g} in the pattern {pattern.name}; this is the first "
                    f"{type(layer).__name__} of its kind, and no layer behind it was worked on",
                    where=f"{linear.name}.weight",
                    remedy="this is a fault in secateur or in a plug-in; please report it, and "
                    f"leave the matrix out: --exclude '{linear.name}'",
                )
        self.verified.add(kind)

    def finish_layer(
        self,
        index: int,
        records: list[LinearRecord],
        tuned: dict[str, float],
        unseen: Sequence[str],
        started: float,
    ) -> None:
        """Record a layer in the ledger when all its files are safe on disk."""
        if self.passage is not None and index + 1 < len(self.target.layers):
            self.passage.advance(index + 1)
        self.settings.ranks.wait()  # all have stored their inputs of the next layer
        seconds = time.perf_counter() - started
        lost = collapsed([record for record in records if not self.takes_all(record)])
        entries = [record.to_json() for record in records]
        self.ledger.finish_layer(index, entries, seconds, tuned, lost, unseen)
        self.settings.ranks.wait()  # the ledger of the first process has its line
        if self.passage is not None:
            self.passage.forget(index)
        # The last layer's forwards end early, because nothing reads their outputs.
        self.progress.step(self.steps_per_layer - self.steps_taken, note=f"layer {index}")
        if lost:
            self.react(self.target.architecture.layer_name(index), lost)

    def takes_all(self, record: LinearRecord) -> bool:
        """Whether a task removes all columns of a linear: a removed block has not collapsed."""
        whole = self.tasks[record.name].method.pattern.whole_units
        return whole and record.pruned == record.shape[0] * record.shape[1]

    def react(self, layer: str, lost: dict[str, float]) -> None:
        """Stop or warn if a finished layer has collapsed.

        Raises:
            VerificationError: it has collapsed, and the settings say to stop.
        """
        if self.settings.on_collapse == "stop":
            raise collapse_error(layer, lost)
        if self.settings.ranks.first:
            log.warning("%s has collapsed: %s", layer, in_words(lost))

    def context(self, index: int) -> LayerContext:
        """Return the inputs for the work on one layer."""
        groups: Groups = ()
        if self.statistics and self.passage is not None:
            groups = self.passage.layouts[index].groups
        return LayerContext(
            index,
            index + 1 == len(self.target.layers),
            self.target.architecture,
            self.tasks,
            groups,
            self.statistics,
            self.settings,
            self.passage,
            self.own_statistics(index),
            lambda: self.step(index),
        )

    def own_statistics(self, index: int) -> Callable[[Linear], dict[str, Tensor]]:
        """The statistics of the gradients of each linear of a layer."""
        names = gradient_statistics(self.tasks)
        return stored_gradients(self.settings.work, index, names, self.target.device)
