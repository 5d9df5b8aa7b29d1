"""The story of a run.

    first inputs ─► for each decoder layer: read it ─► gather, prune ─► next inputs ─► write, ledger

Magnitude needs no calibration and skips the forwards; Taylor and OBD get their gradients from a
pass of their own before (`gradients`); an allocation settles beforehand how much each linear
loses (`survey`). With reconstruction the dense model's hidden states travel along, and before its
outputs are passed on, a pruned layer is tuned to give those of the dense one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.engine.calls import call_layer
from secateur.engine.forwards import by_group, by_layer, find_groups
from secateur.engine.ledger import Ledger
from secateur.engine.pages import reused_pages
from secateur.engine.passage import Passage
from secateur.engine.progress import Progress
from secateur.engine.reconstruction import Reconstruction, output_error, reconstruct
from secateur.engine.residency import Parking
from secateur.engine.selection import Selection
from secateur.engine.surgery import (
    INPUT_STATISTICS,
    GroupStatistics,
    LinearRecord,
    check_finite,
    prune_group,
)
from secateur.engine.targets import Target
from secateur.errors import PatternError
from secateur.models.architecture import Linear, linears_of
from secateur.sparsity.methods import Method

__all__ = ["Run", "Settings"]


@dataclass(frozen=True)
class Settings:
    """How the work is done; none of it changes what is asked of the result.

    Attributes:
        sequential: `group` prunes each group of linears before the next one's statistics are
            gathered, in one pass; `layer` gathers for a whole layer first, as the papers do.
        micro_batch_tokens: tokens that pass through a layer at once.
        activations: `memory` or `disk`: where hidden states wait.
        work: folder for hidden states, ledger and gradients; None only for a run in memory.
    """

    sequential: str = "group"
    micro_batch_tokens: int = 2048
    activations: str = "memory"
    work: Path | None = None


class Run:
    """One pruning run over all decoder layers of a target.

    Args:
        target: the model.
        method: score, pattern and solver.
        sparsity: asked of every linear that has no sparsity of its own.
        selection: which linears, with what exceptions.
        windows: calibration tokens [samples, sequence_length], or None if the method needs none.
        settings: how the work is done.
        ledger: where finished layers are entered.
        progress: told of every step.
        reconstruction: how pruned layers are tuned; not at all without passes.
    """

    def __init__(
        self,
        target: Target,
        method: Method,
        sparsity: float,
        selection: Selection,
        windows: Tensor | None,
        settings: Settings,
        ledger: Ledger,
        progress: Progress,
        reconstruction: Reconstruction,
    ) -> None:
        self.target, self.method, self.settings = target, method, settings
        self.windows, self.ledger, self.progress = windows, ledger, progress
        self.selection, self.sparsity = selection, sparsity
        self.reconstruction = reconstruction
        self.passage: Passage | None = None
        if windows is not None:
            self.passage = Passage(
                target,
                windows,
                settings.micro_batch_tokens,
                settings.activations == "memory",
                settings.work,
            )
        self.groups: Sequence[Sequence[str]] | None = target.architecture.groups
        self.parking: Parking | None = None
        self.told = 0
        self.sparsity_of = self.plan_sparsity()

    # -- what is asked of each linear ----------------------------------------------------------

    def plan_sparsity(self) -> dict[str, float]:
        """The sparsity of every linear, 0 for those left dense.

        Raises:
            RecipeError, PatternError, ShapeError: a glob matches nothing, a matrix does not fit.
        """
        self.shapes = {
            linear.name: linear.shape
            for index, layer in enumerate(self.target.layers)
            for linear in linears_of(layer, self.target.architecture.layer_name(index)).values()
        }
        self.selection.check(self.shapes)
        asked = {}
        for name, shape in self.shapes.items():
            own = self.selection.override(name)
            asked[name] = 0.0
            if self.selection.selects(name):
                asked[name] = self.sparsity if own is None else own
            if asked[name] > 0:
                try:
                    self.method.pattern.check(shape, asked[name])
                except PatternError as error:
                    raise type(error)(error.what, where=name, remedy=error.remedy) from None
        return asked

    @property
    def input_statistics(self) -> frozenset[str]:
        """The statistics of inputs that have to be gathered on the way."""
        return self.method.requires & INPUT_STATISTICS

    @property
    def forwards_needed(self) -> bool:
        """Whether calibration tokens pass through the layers at all."""
        return bool(self.input_statistics) or self.reconstruction.passes > 0

    # -- the loop -------------------------------------------------------------------------------

    @property
    def steps_per_layer(self) -> int:
        """Steps of progress that one layer is worth: one for every forward of a micro-batch."""
        if not self.forwards_needed:
            return 1
        forwards = 1 if self.settings.sequential == "group" else 2
        steps = len(self.batches()) * forwards
        if self.reconstruction.passes:
            assert self.windows is not None
            steps += 2 * len(self.batches()) + self.reconstruction.passes * len(self.windows)
        return steps

    def step(self, index: int) -> None:
        """Tell of one step within a layer."""
        self.told += 1
        self.progress.step(note=f"layer {index}")

    @torch.no_grad()
    def execute(self, done: int = 0) -> None:
        """Prune every layer from number `done` on."""
        layers = self.target.layers
        if self.forwards_needed and done < len(layers):
            done = self.open_streams(done)
        self.progress.start("pruning", self.steps_per_layer * (len(layers) - done))
        with reused_pages():
            for index in range(done, len(layers)):
                self.prune_layer(index)
        self.progress.finish()

    def prune_layer(self, index: int) -> None:
        """One decoder layer, from reading it to the ledger."""
        started = time.perf_counter()
        self.told = 0
        name = self.target.architecture.layer_name(index)
        with self.target.layer(index) as layer:
            linears = linears_of(layer, name)
            check_finite(list(linears.values()))
            if self.dense is not None:
                self.pass_dense(index, layer)
            records = self.pass_layer(index, layer, linears)
            changed = [f"{record.name}.weight" for record in records]
            if records and self.reconstruction.passes:
                self.tune_layer(index, layer, [linears_by_name(linears)[r.name] for r in records])
                changed = [f"{name}.{parameter}" for parameter, _ in layer.named_parameters()]
            self.target.commit(index, changed)
        if self.activations is not None and index + 1 < len(self.target.layers):
            self.activations.advance(index + 1)
        self.ledger.finish_layer(
            index, [record.to_json() for record in records], time.perf_counter() - started
        )
        if self.activations is not None:
            self.activations.forget(index)
        # The last layer's forwards end early, as nobody needs their outputs.
        self.progress.step(self.steps_per_layer - self.told, note=f"layer {index}")

    def pass_layer(
        self, index: int, layer: nn.Module, linears: Mapping[str, Linear]
    ) -> list[LinearRecord]:
        """Gather, prune and propagate one layer."""
        own = self.own_statistics(index)
        records: list[LinearRecord] = []
        if not self.input_statistics:
            for linear in linears.values():
                records += prune_group([linear], {}, own, self.method, self.sparsity_of)
            return records
        groups = self.grouped(index, layer, linears)
        gathered = [
            GroupStatistics(self.input_statistics, group[0], self.target.device) for group in groups
        ]

        def gather(group: int, x: Tensor) -> None:
            gathered[group].update(x)

        def prune(group: int) -> None:
            shared = gathered[group].value()
            gathered[group].running.clear()
            records.extend(prune_group(groups[group], shared, own, self.method, self.sparsity_of))

        last = index == len(self.target.layers) - 1
        forwards = [self.forward(index, layer, batch, write=not last) for batch in self.batches()]
        if self.settings.sequential == "group":
            self.parking = self.open_parking(index, layer)
            by_group(groups, forwards, gather, prune, self.parking, outputs_needed=not last)
        else:
            dense = [self.forward(index, layer, b, write=False) for b in self.batches()]
            by_layer(groups, dense, gather)
            for group in range(len(groups)):
                prune(group)
            if not last:
                for forward in forwards:
                    forward()
        return records

    def grouped(
        self, index: int, layer: nn.Module, linears: Mapping[str, Linear]
    ) -> list[list[Linear]]:
        """The linears to prune, by shared input; groups that stay dense are left out."""
        if self.groups is None:
            assert self.activations is not None
            hidden = self.activations.read(slice(0, 1)).to(self.target.device)
            call = self.calls[min(self.calls)][index]
            found = find_groups(list(linears.values()), lambda: call_layer(layer, hidden, call))
            by_module = {id(linear.module): name for name, linear in linears.items()}
            self.groups = [[by_module[id(x.module)] for x in group] for group in found]
        groups = [[linears[name] for name in group if name in linears] for group in self.groups]
        return [g for g in groups if any(self.sparsity_of[x.name] > 0 for x in g)]

    def forward(
        self, index: int, layer: nn.Module, batch: slice, *, write: bool
    ) -> Callable[[], None]:
        """The forward of one micro-batch through a layer."""

        def run() -> None:
            assert self.activations is not None
            hidden = self.activations.read(batch).to(self.target.device)
            if self.parking is not None:
                self.parking.live.note(hidden)
            out = call_layer(layer, hidden, self.call(index, batch))
            if write:
                self.activations.write(batch, out)
            self.step(index)

        return run

    def open_parking(self, index: int, layer: nn.Module) -> Parking | None:
        """Where halted forwards are put: nowhere, when memory holds them."""
        on_disk = self.settings.activations == "disk"
        if not on_disk and self.target.device.type == "cpu":
            return None
        permanent = [*layer.parameters(), *layer.buffers()]
        for calls in self.calls.values():
            permanent += calls[index].tensors()
        return Parking(permanent, self.settings.work if on_disk else None)

    def own_statistics(self, index: int) -> Callable[[Linear], dict[str, Tensor]]:
        """Statistics of each linear itself, from the gradient pass."""
        wanted = self.method.requires - INPUT_STATISTICS
        if not wanted:
            return lambda linear: {}
        assert self.settings.work is not None
        stored = load_file(self.settings.work / f"gradients-{index:04d}.safetensors")
        return lambda linear: {
            name: stored[f"{linear.name}/{name}"].to(self.target.device) for name in wanted
        }
