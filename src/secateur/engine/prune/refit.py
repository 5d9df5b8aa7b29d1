"""Refits the remaining part of a cut model to the outputs of the uncut model.

    inputs of both models ─► halt at each group of linears ─► least squares ─► inputs of the next

A cut of layers, experts or channels removes terms from the residual stream. To compensate, the cut
model runs layer by layer in step with the uncut one. Every linear is fitted in closed form to its
current inputs, before the inputs of the next linear are computed:

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
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.statistics import CrossGram, Gathering, GroupStatistics
from secateur.engine.prune.tasks import Settings
from secateur.engine.stream.calibration_stream import LayerInputs, OpenStream
from secateur.engine.stream.halted_forwards import Arrival, GroupBatch, HaltedLayer, by_group
from secateur.engine.stream.hidden_states import Activations
from secateur.machine import full_float32, reused_pages
from secateur.models.architecture import Architecture, Linear, linears_of
from secateur.models.targets import Target, walk_layers
from secateur.progress import Progress
from secateur.runs.ledger import Ledger
from secateur.runs.records import Layer
from secateur.sparsity.hessian import dense_target

_Pair = tuple[Linear, Linear]
"""A linear of the cut model, and the same linear of the uncut model."""


def can_refit(architecture: Architecture, *, channels: bool) -> bool:
    """Whether a refit can improve a cut, with or without a cut of channels.

    If no linear is known to write to the stream, a cut of layers alone leaves nothing to refit.
    Experts are not refitted.
    """
    of_expert = [architecture.of_expert(group[0]) for group in architecture.groups or ()]
    return not all(of_expert) and bool(architecture.writers or channels)


class SideBySide:
    """The uncut and the cut model, which pass calibration layer by layer in step.

    Args:
        dense: the uncut model.
        cut: the cut model; its layers get the new weights.
        layers: kept layers of the uncut model, ascending.
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
        windows: Tensor,
        settings: Settings,
        ledger: Ledger,
        progress: Progress,
    ) -> None:
        self.settings, self.ledger, self.progress = settings, ledger, progress
        self.layers = layers
        places = [settings.work and settings.work / name for name in ("uncut", "cut")]
        for place in places:
            if place:
                place.mkdir(exist_ok=True)
        self.dense = replace(settings, work=places[0]).stream(dense, windows)
        self.cut = replace(settings, work=places[1]).stream(cut, windows)

    def open(self, done: int) -> tuple[OpenStream, OpenStream]:
        """Make the inputs of layer `done` ready in both models, or else those of the first one."""
        if done:
            cut = self.cut.open(done)
            if cut.start == done:
                dense = self.dense.open(self.layers[done])
                if dense.start == self.layers[done]:
                    return dense, cut
        cut, dense = self.cut.open(), self.dense.open()
        self.ledger.begin()
        return dense, cut

    def inputs(self, opened: OpenStream, index: int) -> LayerInputs:
        """The hidden states of one of the models at one of its layers."""
        matmuls = partial(self.settings.matmuls, self.dense.target.device)
        return opened.layer_inputs(
            index, matmuls, lambda: self.progress.step(note=f"layer {index}")
        )


class Refit(SideBySide):
    """The refit of one cut model, layer by layer.

    Args, besides those of `SideBySide`:
        channels: kept channels of the uncut model's residual stream, ascending; None for all.
    """

    def __init__(self, *args: Any, channels: Sequence[int] | None = None) -> None:
        super().__init__(*args)
        device = self.dense.target.device
        self.channels = None if channels is None else torch.tensor(channels, device=device)

    @torch.no_grad()
    @full_float32()
    def execute(self, done: int = 0) -> None:
        """Refit every layer of the cut model from number `done` on."""
        if done == len(self.layers):
            self.progress.start("refitting", 0)
            self.progress.finish()
            return
        with reused_pages():
            dense, cut = self.open(done)
            done = cut.start
            gaps = [self._gap(place) for place in range(done, len(self.layers))]
            missing = range(0 if done else self.layers[0])
            forwards = len(missing) + sum(2 + (gap + 1 if gap else 0) for gap in gaps)
            self.progress.start("refitting", forwards * len(cut.batches()))
            for index, layer in dense.walk(len(missing)):
                self.inputs(dense, index).pass_through(layer)
            for place in range(done, len(self.layers)):
                self._refit_layer(place, dense, cut)
        self.progress.finish()

    def _gap(self, place: int) -> int:
        """The number of removed layers after a layer of the cut model."""
        last = place + 1 == len(self.layers)
        # the next layer that stays, or what would come behind the last one
        following = len(self.dense.target.layers) if last else self.layers[place + 1]
        return following - self.layers[place] - 1

    def _refit_layer(self, place: int, dense: OpenStream, cut: OpenStream) -> None:
        """Read, refit and record one layer of the cut model."""
        started, index, gap = time.perf_counter(), self.layers[place], self._gap(place)
        with self._stream_after(dense, index, gap) as later:
            target = self.cut.target
            with self.dense.target.layer(index) as twin, target.layer(place) as layer:
                one = _LayerRefit(self, dense, cut, place, layer, twin, later)
                one.execute()
                target.commit(place, [f"{x.name}.weight" for x in one.linears])
            if place + 1 < len(self.layers):
                if later is not None:
                    for batch in dense.batches():
                        dense.write(batch, later.read(batch))
                dense.advance(index + 1 + gap)
                cut.advance(place + 1)
        seconds = time.perf_counter() - started
        self.ledger.finish_layer(Layer(layer=place, seconds=seconds, linears=()))
        dense.forget_before(index + 1 + gap)
        cut.forget_before(place + 1)

    @contextmanager
    def _stream_after(
        self, opened: OpenStream, index: int, gap: int
    ) -> Iterator[Activations | None]:
        """The uncut model's stream after the removed layers that follow; None if there are none."""
        dense = self.dense
        if not gap:
            yield None
            return
        folder = None if dense.in_memory or dense.work is None else dense.work / "ahead"
        if folder:
            folder.mkdir(exist_ok=True)
        shape, dtype = opened.hidden.shape, opened.hidden.dtype
        stream = Activations(shape, dtype, folder, dense.in_memory, home=dense.home)
        for number, layer in walk_layers(dense.target, range(index, index + 1 + gap)):
            inputs = self.inputs(opened, number)
            if number > index:
                inputs = replace(inputs, states=stream)
            for batch in inputs.batches:
                stream.write(batch, inputs.outputs(layer, batch))
            stream.advance(number + 1)
            if number > index:
                stream.forget(number)
        yield stream
        stream.forget(index + 1 + gap)


class _LayerRefit:
    """The refit of one layer.

    Args:
        refit: the refit of the whole model.
        dense: the hidden states of the uncut model.
        cut: the hidden states of the cut model.
        place: index of the layer in the cut model.
        layer: the layer with its weights after the cut.
        twin: the same layer of the uncut model.
        later: the uncut stream after the removed layers that follow; None if there are none.
    """

    def __init__(
        self,
        refit: Refit,
        dense: OpenStream,
        cut: OpenStream,
        place: int,
        layer: nn.Module,
        twin: nn.Module,
        later: Activations | None,
    ) -> None:
        self.refit, self.later = refit, later
        self.last = place + 1 == len(refit.layers)
        index, architecture = refit.layers[place], refit.cut.target.architecture
        own = linears_of(layer, architecture.layer_name(place))
        other = linears_of(twin, architecture.layer_name(index))
        pairs: list[list[_Pair]] = [
            [(own[n], other[n]) for n in group if n in own and n in other]
            for group in architecture.groups or ()
            if not architecture.of_expert(group[0])
        ]
        self.groups = [group for group in pairs if group]
        self.writers = [own[n] for n in architecture.writers if n in own]
        others = [other[n].module for n in architecture.writers if n in other]
        experts = architecture.experts
        self.mixture = experts is not None and experts.module in dict(layer.named_modules())
        sides = [
            [GroupBatch([[x[side] for x in group]]) for group in self.groups] for side in (0, 1)
        ]
        self.changing = HaltedLayer(
            refit.inputs(cut, place),
            layer,
            sides[0],
            [x.module for x in self.writers],
            stores=not self.last,
        )
        self.dense = HaltedLayer(refit.inputs(dense, index), twin, sides[1], others)
        self.gathered: dict[int, GroupStatistics] = {}
        self.moments = Gathering.of(["gram"]).forward

    @property
    def linears(self) -> list[Linear]:
        """The linears to refit."""
        return [linear for group in self.groups for linear, _ in group]

    def execute(self) -> None:
        """Pass all windows through both layers, and fit each group when all have reached it."""
        with closing(self.dense), closing(self.changing):
            arrived = by_group(
                self.changing, self._gather, self.dense, outputs_needed=not self.last
            )
            for group in arrived:
                self._fit(group)
            # if removed layers follow, the dense stream continues from `later`
            if not self.last and self.later is None:
                self.dense.finish()

    def _writes(self, group: int) -> bool:
        """Whether a group is a linear that writes to the stream."""
        return any(self.groups[group][0][0] is linear for linear in self.writers)

    def _gather(self, index: int, group: int, arrival: Arrival, dense: Tensor | None) -> None:
        """Add one micro-batch's inputs in both models to the statistics of a group."""
        assert dense is not None
        linear, _ = self.groups[group][0]
        target = self._target(index, group, dense) if self._writes(group) else dense
        if group not in self.gathered:
            device = self.refit.cut.target.device
            cross = partial(CrossGram, target.shape[-1], linear.shape[1], device)
            self.gathered[group] = GroupStatistics(self.moments, [[linear]], device, cross)
        self.gathered[group].update(arrival.x, target)

    def _target(self, index: int, group: int, dense: Tensor) -> Tensor:
        """The target of a linear that writes to the stream, without its bias."""
        linear, twin = self.groups[group][0]
        stream = self.changing.before(index) + self.changing.added(index)  # Ĥ
        if self.later is not None and linear is self.writers[-1] and not self.mixture:
            after = self.later.read(self.dense.inputs.batches[index]).to(stream.device)
            bias = linear.module.get_parameter("bias") if linear.has_bias else 0.0
            return self._kept(after) - stream - bias
        before = self.dense.before(index) + self.dense.added(index)  # H
        with self.dense.inputs.matmuls():
            out = dense @ twin.weight.t()
        return self._kept(out + before) - stream

    def _kept(self, states: Tensor) -> Tensor:
        """The kept channels of the stream."""
        return states if self.refit.channels is None else states[..., self.refit.channels]

    def _fit(self, group: int) -> None:
        """Solve for the weights of a group."""
        statistics, damping = self.gathered.pop(group), self.refit.settings.asymmetric_damping
        assert statistics.cross is not None
        gram, moments = statistics.value()["gram"], statistics.cross.value()
        for linear, twin in self.groups[group]:
            own = moments
            if not self._writes(group):
                own = twin.weight.float() @ moments
                if len(own) > linear.shape[0]:  # its outputs are channels, after a norm
                    own = own[self.refit.channels]
            linear.assign(dense_target(gram, own, linear.weight.float(), damping))
