"""One decoder layer on its way from dense to pruned.

    inputs ─► halt at each group ─► gather, prune ─► (tune) ─► outputs

With asymmetric fitting a copy of the dense layer keeps pace, so that both inputs of a group are
known at once. With reconstruction the layer is tuned before its outputs are passed on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from secateur.engine.prune.reconstruction import (
    TunedWeight,
    output_error,
    reconstruct,
)
from secateur.engine.prune.routing import is_reached
from secateur.engine.prune.surgery import GroupStatistics, LinearRecord, prune_group
from secateur.engine.prune.tuning import draw_steps
from secateur.engine.stream.calls import call_layer
from secateur.engine.stream.dense_twin import DenseTwin
from secateur.engine.stream.forwards import HaltingForwards, by_group, by_layer
from secateur.engine.stream.residency import Parking
from secateur.models.architecture import Linear, linears_of
from secateur.precision import exact_matmuls

if TYPE_CHECKING:
    from secateur.engine.prune.run import Run

__all__ = ["LayerPass"]


class LayerPass:
    """The work on one decoder layer.

    Args:
        run: whose work it is.
        index: which layer.
        layer: with its weights.
    """

    def __init__(self, run: Run, index: int, layer: nn.Module) -> None:
        self.run, self.index, self.layer = run, index, layer
        self.passage = run.passage
        self.linears = linears_of(layer, run.target.architecture.layer_name(index))
        self.pruned = [x for x in self.linears.values() if run.works_on(x.name)]
        self.last = index + 1 == len(run.target.layers)
        self.parking: Parking | None = None
        self.shadows: dict[str, tuple[Tensor, Tensor]] = {}
        self.unseen: list[str] = []

    @property
    def tunes(self) -> bool:
        """Whether the layer is tuned: if something of it is pruned."""
        return bool(self.pruned) and self.run.reconstruction.passes > 0

    def prune(self) -> list[LinearRecord]:
        """Gather, prune, and propagate the layer unless it is to be tuned first."""
        run = self.run
        if run.reconstruction.passes and not run.settings.asymmetric:
            self.pass_dense()
        own = run.own_statistics(self.index)
        if run.input_statistics:
            return self.prune_on_the_way(own)
        records: list[LinearRecord] = []
        fitted = self.shadowed(lambda linear: linear.weight, {})
        for linear in self.reached(self.pruned, None, own):
            records += prune_group([linear], {}, own, run.method_for, run.sparsity_of, fitted)
        if self.outputs_needed and run.reconstruction.passes:
            self.propagate()
        return records

    def reached(
        self,
        linears: Sequence[Linear],
        tokens: int | None,
        own: Callable[[Linear], Mapping[str, Tensor]],
    ) -> list[Linear]:
        """Those that calibration says something of; the others are left, and noted."""
        architecture = self.run.target.architecture
        left = [x for x in linears if not is_reached(architecture, x, tokens, own(x))]
        self.unseen += [x.name for x in left]
        self.pruned = [x for x in self.pruned if x.name not in self.unseen]
        return [x for x in linears if x.name not in self.unseen]

    def shadowed(
        self, fitted: Callable[[Linear], Tensor], shared: Mapping[str, Tensor]
    ) -> Callable[[Linear], Tensor]:
        """Keep what is about to be pruned, and its inputs' norms, where masks may change later."""
        if not (self.tunes and self.run.reconstruction.remask):
            return fitted

        def keep(linear: Linear) -> Tensor:
            weight = fitted(linear)
            norm = torch.ones(weight.shape[1], device=weight.device)
            if "column_norm" in shared:
                norm = shared["column_norm"]
            elif "gram" in shared:
                norm = shared["gram"].diagonal().sqrt()
            self.shadows[linear.name] = weight.clone(), norm
            return weight

        return keep

    def tuned_weights(self) -> list[TunedWeight]:
        """The pruned matrices of the layer, ready to be tuned."""
        run = self.run
        found = []
        for linear in self.pruned:
            shadow, norm = self.shadows.pop(linear.name, (None, linear.weight.new_ones(1)))
            sparsity = run.sparsity_of[linear.name]
            pattern = run.method_for(linear.name).pattern
            found.append(TunedWeight(linear, shadow, norm, pattern, sparsity))
        return found

    @property
    def outputs_needed(self) -> bool:
        """Whether the outputs of the layer as it was pruned are passed on."""
        return not self.last and not self.tunes

    def prune_on_the_way(self, own: Callable[[Linear], Mapping[str, Tensor]]) -> list[LinearRecord]:
        """Prune each group when the inputs of all micro-batches are known."""
        assert self.passage is not None
        run, records, groups = self.run, list[LinearRecord](), self.grouped()
        names, device = run.input_statistics, run.target.device
        # before there are hooks, for a copy of the layer would take them along
        beside = self.open_beside(groups) if run.settings.asymmetric else None
        gathered: dict[int, GroupStatistics] = {}

        def of(group: int) -> GroupStatistics:
            if group not in gathered:  # not before: a layer of many experts has many grams
                rows = beside.rows(group) if beside else 0
                gathered[group] = GroupStatistics(names, groups[group][0], device, wanted=rows)
            return gathered[group]

        def gather(index: int, group: int, x: Tensor, dense: Tensor | None) -> None:
            wanted = None
            if beside and dense is not None:
                wanted = beside.wanted(index, group, dense)
            of(group).update(x, wanted)

        def gather_alone(group: int, x: Tensor) -> None:
            with exact_matmuls(device):
                of(group).update(x)

        def prune(group: int) -> None:
            seen = of(group)
            del gathered[group]
            linears = [x for x in groups[group] if run.works_on(x.name)]
            linears = self.reached(linears, seen.tokens, own)
            if not linears:
                return
            shared = seen.value()
            writer = beside is not None and beside.writes(group)
            fitted = self.shadowed(seen.fitted(writer, run.settings.asymmetric_damping), shared)
            seen.running.clear()
            found = prune_group(linears, shared, own, run.method_for, run.sparsity_of, fitted)
            if run.target.architecture.of_expert(groups[group][0].name):
                found = [replace(record, tokens=seen.tokens) for record in found]
            records.extend(found)

        if run.settings.sequential == "group":
            self.halt_at_groups(groups, beside, gather, prune)
            return records
        dense = [self.forward(b, write=False) for b in self.passage.batches()]
        with self.run.matmuls():
            by_layer(groups, dense, gather_alone)
        for group in range(len(groups)):
            prune(group)
        if self.outputs_needed:
            self.propagate()
        return records

    def halt_at_groups(
        self,
        groups: Sequence[Sequence[Linear]],
        beside: DenseTwin | None,
        gather: Callable[[int, int, Tensor, Tensor | None], None],
        prune: Callable[[int], None],
    ) -> None:
        """One pass, group by group, with the dense layer beside the pruned one if there is one."""
        assert self.passage is not None
        write, finished = self.outputs_needed, False
        assert self.passage.hidden is not None
        self.parking = self.passage.parking(self.index, self.layer, self.passage.hidden)
        forwards = [self.forward(b, write=write) for b in self.passage.batches()]
        halting = HaltingForwards(groups, forwards, self.parking, self.run.matmuls)
        if beside:
            beside.watch(halting)
        other = beside.halting if beside else None
        try:
            by_group(groups, halting, other, gather, prune, outputs_needed=write)
            finished = True
        finally:
            halting.close()
            if beside:
                beside.close(finish=finished)
            self.parking = None

    def open_beside(self, groups: Sequence[Sequence[Linear]]) -> DenseTwin:
        """The dense layer beside the one that is pruned."""
        passage, writers = self.passage, self.run.target.architecture.writers
        assert passage is not None
        return DenseTwin(
            self.layer,
            self.index,
            groups,
            [self.linears[name] for name in writers if name in self.linears],
            self.run.target.architecture.of_expert,
            passage,
            lambda: self.run.step(self.index),
            self.run.matmuls,
        )

    def propagate(self) -> None:
        """Pass all windows through a finished layer."""
        assert self.passage is not None
        for batch in self.passage.batches():
            with self.run.matmuls():
                self.forward(batch, write=True)()

    # -- reconstruction -------------------------------------------------------------------------

    def pass_dense(self) -> None:
        """Let the dense model's hidden states go through a layer before it is pruned."""
        passage = self.passage
        assert passage is not None
        for batch in passage.batches():
            passage.write_dense(batch, self.outputs(passage.read_dense(batch), batch))
            self.run.step(self.index)
        passage.advance_dense(self.index + 1)

    def tune(self) -> dict[str, float]:
        """Tune a pruned layer and propagate it; returns its output error before and after."""
        passage = self.passage
        assert passage is not None

        def example(windows: Sequence[int]) -> tuple[Tensor, Tensor]:
            rows = [slice(w, w + 1) for w in windows]
            return tuple(torch.cat([read(r) for r in rows]) for read in streams)  # type: ignore[return-value]

        streams = (passage.read, passage.read_dense)
        size = passage.batches()[0].stop
        passes = self.run.reconstruction.passes
        errors = {"error_before": self.judge(write=False)}
        reconstruct(
            self.layer,
            self.tuned_weights(),
            draw_steps(len(passage.windows), size, passes, seed=self.index),
            example,
            lambda size: passage.ends.calls(size)[self.index],
            self.run.reconstruction,
            tell=lambda: self.run.step(self.index),
        )
        errors["error_after"] = self.judge(write=not self.last)
        return errors

    def judge(self, *, write: bool) -> float:
        """The mean output error of a layer over all windows; its outputs can be passed on."""
        passage = self.passage
        assert passage is not None
        total = 0.0
        for batch in passage.batches():
            out = self.outputs(passage.read(batch), batch)
            total += float(output_error(out, passage.read_dense(batch))) * len(out)
            if write:
                passage.write(batch, out)
            self.run.step(self.index)
        return total / len(passage.windows)

    # -- parts of a pass ------------------------------------------------------------------------

    def grouped(self) -> list[list[Linear]]:
        """The linears to prune, by shared input; groups that stay dense are left out."""
        run, linears = self.run, self.linears
        groups = [[linears[n] for n in group] for group in run.layouts[self.index].groups]
        return [g for g in groups if any(run.works_on(x.name) for x in g)]

    def outputs(self, hidden: Tensor, batch: slice) -> Tensor:
        """What the layer makes of the hidden states of one micro-batch, at once."""
        assert self.passage is not None
        with self.run.matmuls():
            return call_layer(self.layer, hidden, self.passage.call(self.index, batch))

    def forward(self, batch: slice, *, write: bool) -> Callable[[], None]:
        """The forward of one micro-batch through a layer."""

        def run() -> None:
            assert self.passage is not None
            hidden = self.passage.read(batch)
            if self.parking is not None:
                self.parking.live.note(hidden)
            out = call_layer(self.layer, hidden, self.passage.call(self.index, batch))
            if write:
                self.passage.write(batch, out)
            self.run.step(self.index)

        return run
