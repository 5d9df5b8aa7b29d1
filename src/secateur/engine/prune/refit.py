"""Refits the remaining part of a cut model to the outputs of the uncut model.

    inputs of both models ─► halt at each group of linears ─► least squares ─► inputs of the next

A cut of layers, experts or channels removes terms from the residual stream. To compensate, the cut
model runs layer by layer beside the uncut one. Every linear is fitted in closed form to its current
inputs, before the inputs of the next linear are computed:

    min over Ŵ:  ‖T − ŴX̂‖² + λ‖A − Ŵ‖²       (`dense_target`; A the weight that the cut left)

* A linear that reads the stream: T = WX, its outputs in the uncut model.
* A linear that writes to the stream: T = WX + H − Ĥ on the kept channels, with H and Ĥ the streams
  before it. The last writer before removed layers is fitted to the stream after them, T = H' − Ĥ,
  unless experts follow it.

If a norm is between a sub-block and the stream (Gemma, OLMo 2), or the family does not declare
which linears write (OPT), these linears are fitted to T = WX like the others. Experts of a mixture
stay unchanged, because they see different tokens in the two models.

This is asymmetric fitting (Li et al. 2025, arXiv:2504.02692) for any cut. Shopkhoev et al. 2025,
"ReplaceMe", arXiv:2505.02819, replace removed layers by one linear map, merged into the weights
before them. Deviations: the map is fitted to the inputs of the down projection, not to its outputs,
and every linear is fitted, not only the one before the gap.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from secateur.allocator import reused_pages
from secateur.engine.prune.group_pruning import GroupStatistics
from secateur.engine.prune.settings import Settings
from secateur.engine.stream.activations import Activations
from secateur.engine.stream.calibration_stream import CalibrationStream, LayerInputs
from secateur.engine.stream.halted_forwards import HaltedLayer, in_step
from secateur.engine.stream.targets import Target, walk_layers
from secateur.models.architecture import Architecture, Linear, linears_of
from secateur.precision import full_float32
from secateur.progress import Progress
from secateur.runs.ledger import Ledger
from secateur.runs.records import Layer
from secateur.sparsity.hessian import dense_target

Pair = tuple[Linear, Linear]
"""A linear of the cut model, and the same linear of the uncut model."""


def can_refit(architecture: Architecture, *, channels: bool) -> bool:
    """Whether a refit can improve a cut, with or without a cut of channels.

    If no linear is known to write to the stream, a cut of layers alone leaves nothing to refit.
    """
    return bool(architecture.groups) and bool(architecture.writers or channels)


class Refit:
    """The refit of one cut model, layer by layer.

    Args:
        dense: the uncut model.
        cut: the cut model; its layers get the new weights.
        layers: kept layers of the uncut model, ascending.
        channels: kept channels of its residual stream, ascending; None for all.
        windows: calibration tokens [samples, sequence_length].
        settings: how the work is done.
        ledger: record of finished layers.
        progress: receives every forward.
    """

    def __init__(
        self,
        dense: Target,
        cut: Target,
        layers: Sequence[int],
        channels: Sequence[int] | None,
        windows: Tensor,
        settings: Settings,
        ledger: Ledger,
        progress: Progress,
    ) -> None:
        self.settings, self.ledger, self.progress = settings, ledger, progress
        self.layers = layers
        self.channels = None if channels is None else torch.tensor(channels, device=dense.device)
        tokens, in_memory, on_gpu = settings.micro_batch_tokens, settings.in_memory, settings.on_gpu
        places = [settings.work and settings.work / name for name in ("uncut", "cut")]
        for place in places:
            if place:
                place.mkdir(exist_ok=True)
        self.dense = CalibrationStream(dense, windows, tokens, in_memory, places[0], on_gpu=on_gpu)
        self.cut = CalibrationStream(cut, windows, tokens, in_memory, places[1], on_gpu=on_gpu)

    @torch.no_grad()
    @full_float32()
    def execute(self, done: int = 0) -> None:
        """Refit every layer of the cut model from number `done` on."""
        with reused_pages():
            done = self.open(done)
            gaps = [self.gap(place) for place in range(done, len(self.layers))]
            missing = range(0 if done else self.layers[0])
            forwards = len(missing) + sum(2 + (gap + 1 if gap else 0) for gap in gaps)
            self.progress.start("refitting", forwards * len(self.cut.batches()))
            for index, layer in self.dense.walk(0, len(missing)):
                self.lane(self.dense, index).pass_through(layer)
            for place in range(done, len(self.layers)):
                self.refit_layer(place)
        for calibration in (self.dense, self.cut):
            calibration.close()
        self.progress.finish()

    def open(self, done: int) -> int:
        """Make the inputs of layer `done` ready, or else those of the first one."""
        if done == len(self.layers):
            return done
        if done and (
            self.cut.open(done, dense=False) == done
            and self.dense.open(self.layers[done], dense=False) == self.layers[done]
        ):
            return done
        self.cut.open(0, dense=False)
        self.dense.open(0, dense=False)
        self.ledger.begin()
        return 0

    def gap(self, place: int) -> int:
        """The number of removed layers after a layer of the cut model."""
        last = place + 1 == len(self.layers)
        following = len(self.dense.target.layers) if last else self.layers[place + 1]
        return following - self.layers[place] - 1

    def lane(self, calibration: CalibrationStream, index: int) -> LayerInputs:
        """The hidden states of one of the models at one of its layers."""
        assert calibration.hidden is not None
        matmuls = partial(self.settings.matmuls, self.dense.target.device)
        note = f"layer {index}"
        return LayerInputs(
            calibration, calibration.hidden, index, matmuls, lambda: self.progress.step(note=note)
        )

    def refit_layer(self, place: int) -> None:
        """Read, refit and record one layer of the cut model."""
        started, index, gap = time.perf_counter(), self.layers[place], self.gap(place)
        with self.ahead(index, gap) as wanted:
            target = self.cut.target
            with self.dense.target.layer(index) as twin, target.layer(place) as layer:
                one = LayerRefit(self, place, layer, twin, wanted)
                one.carry_out()
                target.commit(place, [f"{x.name}.weight" for x in one.linears])
            if place + 1 < len(self.layers):
                if wanted is not None:
                    for batch in self.dense.batches():
                        self.dense.write(batch, wanted.read(batch))
                self.dense.advance(index + 1 + gap)
                self.cut.advance(place + 1)
        seconds = time.perf_counter() - started
        self.ledger.finish_layer(Layer(layer=place, seconds=seconds, linears=()))
        self.dense.forget(index)
        self.cut.forget(place)

    @contextmanager
    def ahead(self, index: int, gap: int) -> Iterator[Activations | None]:
        """The uncut model's stream after the removed layers that follow; None if there are none."""
        calibration = self.dense
        if not gap:
            yield None
            return
        assert calibration.hidden is not None
        folder = (
            None
            if calibration.in_memory or calibration.work is None
            else calibration.work / "ahead"
        )
        if folder:
            folder.mkdir(exist_ok=True)
        shape, dtype = calibration.hidden.shape, calibration.hidden.dtype
        stream = Activations(shape, dtype, folder, calibration.in_memory, home=calibration.home)
        for number, layer in walk_layers(calibration.target, range(index, index + 1 + gap)):
            first = self.lane(calibration, number)
            lane = first if number == index else replace(first, states=stream)
            for batch in lane.batches:
                stream.write(batch, lane.outputs(layer, batch))
            stream.advance(number + 1)
            if number > index:
                stream.forget(number)
        yield stream
        stream.forget(index + 1 + gap)


class LayerRefit:
    """The refit of one layer.

    Args:
        refit: the refit of the whole model.
        place: index of the layer in the cut model.
        layer: the layer with its weights after the cut.
        twin: the same layer of the uncut model.
        wanted: the uncut stream after the removed layers that follow; None if there are none.
    """

    def __init__(
        self,
        refit: Refit,
        place: int,
        layer: nn.Module,
        twin: nn.Module,
        wanted: Activations | None,
    ) -> None:
        self.refit, self.layer, self.twin, self.wanted = refit, layer, twin, wanted
        self.place, self.index = place, refit.layers[place]
        self.last = place + 1 == len(refit.layers)
        self.cut, self.dense = refit.cut, refit.dense
        architecture = self.cut.target.architecture
        own = linears_of(layer, architecture.layer_name(place))
        other = linears_of(twin, architecture.layer_name(self.index))
        assert architecture.groups is not None
        pairs: list[list[Pair]] = [
            [(own[n], other[n]) for n in group if n in own and n in other]
            for group in architecture.groups
            if not architecture.of_expert(group[0])
        ]
        self.groups = [group for group in pairs if group]
        self.writers = [(own[n], other[n]) for n in architecture.writers if n in own]
        self.others = [other[n] for n in architecture.writers if n in other]
        experts = architecture.experts
        self.mixture = experts is not None and experts.module in dict(layer.named_modules())

    @property
    def linears(self) -> list[Linear]:
        """The linears to refit."""
        return [linear for group in self.groups for linear, _ in group]

    def carry_out(self) -> None:
        """Pass all windows through both layers, and fit each group when all have reached it."""
        refit, writers = self.refit, [linear for linear, _ in self.writers]
        cut_lane = refit.lane(self.cut, self.place)
        dense_lane = refit.lane(self.dense, self.index)
        self.changing = HaltedLayer(
            cut_lane, self.layer, self.own_groups(0), writers, stores=not self.last
        )
        self.beside = HaltedLayer(dense_lane, self.twin, self.own_groups(1), self.others)
        self.gathered: dict[int, GroupStatistics] = {}
        # if removed layers follow, the dense stream continues from `wanted`
        outputs = not self.last and self.wanted is None
        in_step(self.changing, self.beside, self.gather, self.fit, dense_outputs=outputs)

    def own_groups(self, side: int) -> list[list[Linear]]:
        """The linears by shared input: of the cut model (0), or of the uncut one (1)."""
        return [[pair[side] for pair in group] for group in self.groups]

    def writes(self, group: int) -> bool:
        """Whether a group is a linear that writes to the stream."""
        return any(self.groups[group][0][0] is linear for linear, _ in self.writers)

    def gather(self, index: int, group: int, x: Tensor, dense: Tensor | None) -> None:
        """Add one micro-batch's inputs in both models to the statistics of a group."""
        assert dense is not None
        linear, _ = self.groups[group][0]
        wanted = self.target(index, group, dense) if self.writes(group) else dense
        if group not in self.gathered:
            device, rows = self.cut.target.device, wanted.shape[-1]
            self.gathered[group] = GroupStatistics(("gram",), linear, device, target_size=rows)
        self.gathered[group].update(x, wanted)

    def target(self, index: int, group: int, dense: Tensor) -> Tensor:
        """The target of a linear that writes to the stream, without its bias."""
        linear, twin = self.groups[group][0]
        batch = self.dense.batches()[index]
        stream = self.changing.inputs(index) + self.changing.added(index)
        last = linear is self.writers[-1][0] and not self.mixture
        if self.wanted is not None and last:
            there = self.wanted.read(batch).to(stream.device)
            bias = linear.module.get_parameter("bias") if linear.has_bias else 0.0
            return self.kept(there) - stream - bias
        there = self.beside.inputs(index) + self.beside.added(index)
        with self.beside.lane.matmuls():
            out = dense @ twin.weight.t()
        return self.kept(out + there) - stream

    def kept(self, states: Tensor) -> Tensor:
        """The kept channels of the stream."""
        return states if self.refit.channels is None else states[..., self.refit.channels]

    def fit(self, group: int) -> None:
        """Solve for the weights of a group."""
        seen, damping = self.gathered.pop(group), self.refit.settings.asymmetric_damping
        assert seen.cross is not None
        gram, moments, writes = seen.value()["gram"], seen.cross.value(), self.writes(group)
        for linear, twin in self.groups[group]:
            found = moments
            if not writes:
                found = twin.weight.float() @ moments
                if len(found) > linear.shape[0]:  # its outputs are channels, after a norm
                    found = found[self.refit.channels]
            linear.assign(dense_target(gram, found, linear.weight.float(), damping))
