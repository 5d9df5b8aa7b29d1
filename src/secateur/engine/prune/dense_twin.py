"""Asymmetric fitting: a pruned linear stays near its outputs in the dense model.

    changing model  x̂ ──► group ──► …        halted together, group by group:
    dense model     x ──► group ──► …        gather(x̂, x), change the group, continue

The forwards of the dense layer halt at the same groups as those of the layer that is pruned, so
both inputs of a group are known at the same time. A linear that writes to the residual stream can
compensate the current error of that stream. So the terms that earlier linears added to the stream
are summed for each model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.statistics import CrossGram
from secateur.engine.prune.layer import Arrivals, Gathered, OpenLayer
from secateur.engine.stream.halted_forwards import Arrival, GroupBatch, HaltedLayer, by_group
from secateur.models.architecture import Linear
from secateur.models.experts import OpenExperts, Sent, numbers_of

_QUIET = 0.1  # the gain of a channel that takes no part, as a share of the mean gain


def _dense_copy(
    layer: nn.Module, batches: Sequence[GroupBatch]
) -> tuple[nn.Module, list[GroupBatch]]:
    """Copy a layer that is still dense, with its batches.

    The batches of experts are empty in the copy, because an expert sees different tokens in the two
    models.

    Args:
        layer: a layer without hooks, because a copy would have them too.
        batches: its linears, by what arrives together.
    """
    twin = copy.deepcopy(layer)
    modules = dict(twin.named_modules())
    names = {id(module): name for name, module in layer.named_modules()}

    def copied(group: Sequence[Linear]) -> list[Linear]:
        return [Linear(x.name, modules[names[id(x.module)]]) for x in group]

    return twin, [GroupBatch([] if x.stage else [copied(own) for own in x.groups]) for x in batches]


def _before_norm(
    norm: nn.Module, output: Tensor, bias: Tensor | float, error: Tensor
) -> tuple[Tensor, Tensor]:
    """The target of a linear behind which a norm stands, and what multiplies its inputs.

    An RMSNorm n(y) = g ⊙ y / r(y) stands between the linear and the residual stream. Where r
    stays that of the dense output y, the stream's error and its square are linear in the weight:

        ‖n(Ŵx̂ + b) − n(y) − e‖² = ‖g ⊙ (Ŵ(x̂ / r) − t)‖²,    t = (y − b) / r + e / g

    So a token counts by 1 / r², as the norm multiplies its errors by 1 / r. A channel with a gain
    below a tenth of the mean hardly reaches the stream; it takes no part in the correction.

    Args:
        norm: the norm, without a bias of its own.
        output: y − b in the dense model, [tokens, out].
        bias: b of the linear.
        error: e, what the stream lacks by then, [tokens, out].

    Returns:
        t [tokens, out], and 1 / r [tokens, 1].
    """
    normed = norm.forward  # without its hooks, which add up what reaches the stream
    gain = normed(torch.ones_like(output[:1]))  # of ones, r is 1: what is left is g
    written = output + bias
    scaled = gain * written
    # n(y) = (g ⊙ y) / r, so 1 / r is the projection of n(y) on g ⊙ y, over the length of the latter
    energy = scaled.square().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    inverse = (scaled * normed(written)).sum(-1, keepdim=True) / energy
    heard = gain.abs() >= _QUIET * gain.square().mean().sqrt()
    return inverse * output + torch.where(heard, error / gain, 0.0), inverse


class _ExpertTargets:
    """What the experts of a layer should write, so that their sum corrects the residual stream.

        e = (h − ĥ) + Σ_k p_k f_k(x) − Σ_k p̂_k f_k(x̂)
        target of expert k for a token:  f_k(x̂) + e / Σ_k p̂_k,  counted by p̂_k²

    f_k are the dense experts and p their weights from the router, which may send a token to other
    experts in the pruned model; h and ĥ are the streams before the experts. If each expert reaches
    its target, the stream behind them is the dense one. An error of expert k reaches the stream
    times p̂_k, so p̂_k² is its weight in the statistics of all linears of the expert.

    Args:
        path: of the experts within the layer.
        changing: the forwards of the layer that is pruned.
        dense: those of its dense copy, which do not halt at experts.
    """

    def __init__(self, path: str, changing: HaltedLayer, dense: HaltedLayer) -> None:
        self.changing, self.dense = changing, dense
        own, twin = (halted.layer.get_submodule(path) for halted in (changing, dense))
        assert isinstance(own, OpenExperts)
        assert isinstance(twin, OpenExperts)
        self.own, self.twin = own, twin
        self.given: dict[int, dict[str, Tensor]] = {}
        self.missing: dict[int, Tensor] = {}
        self.wanted: Tensor | None = None  # the sum that the experts should write, for `_missing`
        self.handles = [
            own.register_forward_pre_hook(self._keep_call, with_kwargs=True),
            twin.register_forward_hook(self._keep_wanted),
        ]

    def _keep_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        names = ("hidden_states", "top_k_index", "top_k_weights")
        self.given[self.changing.current] = {**dict(zip(names, args, strict=False)), **kwargs}

    def _keep_wanted(self, module: nn.Module, args: Any, out: Tensor) -> None:
        lacking = _lacking(self.dense, self.changing, self.dense.current)
        self.wanted = out.float() + _flat(lacking)

    def targets(self, index: int, batch: GroupBatch, sent: Sent) -> Tensor:
        """The targets of the last linears of experts for the tokens they receive, without biases.

        Args:
            index: number of the micro-batch. The forward of the changing layer must be in memory.
            batch: the linears.
            sent: the tokens.
        """
        given = self.given[index]
        out = None if index in self.missing else self._miss(index, sent)
        if out is None:
            with self.dense.inputs.matmuls():
                out = self.twin.outputs(given["hidden_states"], sent)
        if batch.groups[0][0].has_bias:
            biases = torch.stack([x.module.get_parameter("bias") for (x,) in batch.groups])
            out = out - biases[numbers_of(sent.counts).to(biases.device)]
        # Each chosen expert takes the share of the error that the router gives it.
        total = given["top_k_weights"].sum(-1, keepdim=True)[sent.rows].float()
        return out + self.missing[index][sent.rows] / total

    def _miss(self, index: int, sent: Sent) -> Tensor | None:
        """Find E of a micro-batch. Return outputs of experts if they were needed for it anyway."""
        self.dense.look_ahead(index)
        wanted, self.wanted = self.wanted, None
        assert wanted is not None
        given, kept = self.given[index], None
        written = torch.zeros_like(given["hidden_states"])
        with self.dense.inputs.matmuls():
            for every in self.twin.sent(**given):
                out = self.twin.outputs(given["hidden_states"], every)
                every.add(written, out)
                if sent.experts[0] in every.experts:
                    kept, _ = self.twin.stages[-1].only(out, every, sent.experts)
        self.missing[index] = wanted - written
        if self.changing.offload:
            self.changing.offload.live.note(self.missing[index])
        if not self.dense.running[index].dead:
            self.dense.halt(index)
        return kept

    def close(self) -> None:
        """Remove the hooks, and release what was kept."""
        for handle in self.handles:
            handle.remove()
        self.given, self.missing = {}, {}


def _lacking(dense: HaltedLayer, changing: HaltedLayer, index: int) -> Tensor:
    """The error of the residual stream of a micro-batch, after what writers have added so far."""
    stream = dense.before(index) - changing.before(index)
    return stream + (dense.added(index) - changing.added(index))


def _flat(states: Tensor) -> Tensor:
    return states.reshape(-1, states.shape[-1])


class DenseTwin:
    """The dense layer that runs beside the one that is pruned, and the targets that it gives.

    The target of a linear that writes to the residual stream is its dense output plus the current
    error of the stream: T = Wx + (H − Ĥ). Any other linear should return Wx, so its target is its
    dense input x (`sparsity.hessian.dense_target`).

    If the writers are known, only they have a target. They keep the stream near the dense one. In
    trials, fitting the other linears too doubled the cost and did not help. Experts have no target:
    they are fitted to their own dense weights.

    Args:
        layer: the layer, still dense and without hooks, because the twin would have them too.

    Attributes:
        writers: the full names of the linears whose output is added to the residual stream.
        norms: the norms between a writer and the stream, by the writer's name.
        changing: the forwards of the layer.
        dense: those of the twin. They do not halt at experts.
        gathered: the statistics of the groups.
    """

    def __init__(self, layer: OpenLayer) -> None:
        self.layer = layer
        linears = layer.linears
        plain, normed = layer.architecture.writers, dict(layer.architecture.normed_writers)
        found = [name for name in (*plain, *normed) if name in linears]
        self.writers = {linears[name].name for name in found}
        twin, own = _dense_copy(layer.module, layer.batches)
        added = [normed.get(name, name) for name in found]
        last = [[model.get_submodule(name) for name in added] for model in (twin, layer.module)]
        self.norms = {
            linears[name].name: twin.get_submodule(normed[name]) for name in found if name in normed
        }
        self.dense = HaltedLayer(layer.inputs(dense=True), twin, own, last[0])
        self.changing = HaltedLayer(
            layer.inputs(), layer.module, layer.batches, last[1], stores=layer.passes_on
        )
        self.experts: _ExpertTargets | None = None
        declared = layer.architecture.experts
        path = declared.module if declared else ""
        module = dict(layer.module.named_modules()).get(path)
        # Their sum is added to the stream, unless they multiply inputs by the router's weights.
        if found and not self.norms and type(module) is OpenExperts:
            self.experts = _ExpertTargets(path, self.changing, self.dense)
        self.gathered = Gathered(layer.sources, layer.batches, layer.device, self._cross_of)

    def arrivals(self) -> Arrivals:
        """Each group in one pass, as `group_by_group`, in step with the dense layer."""
        layer = self.layer
        with ExitStack() as stack:
            for part in (self.dense, self.changing, self.experts):
                if part:
                    stack.callback(part.close)
            arrived = by_group(
                self.changing, self.gather, self.dense, outputs_needed=layer.passes_on
            )
            for number in layer.agreed(arrived):
                yield [self.gathered.taken(number)]
            self.dense.finish()
        self.dense.inputs.states.advance(layer.index + 1)

    def _writes(self, batch: GroupBatch) -> bool:
        """Whether a batch has linears that write to the residual stream."""
        if batch.stage is not None:
            return self.experts is not None and batch.stage is self.experts.own.stages[-1]
        (group,) = batch.groups
        return len(group) == 1 and group[0].name in self.writers

    def _cross_of(self, batch: GroupBatch) -> Callable[..., CrossGram] | None:
        """Makes the cross gram of a batch that has a target in the dense model."""
        writes = self._writes(batch)
        if not writes and (self.writers or batch.stage is not None):
            return None
        linear = batch.groups[0][0]
        (rows, columns), device = linear.shape, linear.weight.device
        return partial(CrossGram, rows if writes else columns, columns, device, of_outputs=writes)

    def gather(self, index: int, number: int, arrival: Arrival, dense: Tensor | None) -> None:
        """Add the inputs of a batch in one micro-batch, with their targets if they have any."""
        batch, group, x = self.layer.batches[number], self.gathered[number], arrival.inputs
        has_target, sent = group.cross is not None, arrival.sent
        if sent is not None and self.experts:
            weights = sent.weights.float()
            target = self.experts.targets(index, batch, sent) * weights if has_target else None
            group.update(x.float() * weights, target, sent.counts)
        elif dense is None or not has_target:
            group.update(x, counts=arrival.counts)
        elif not self._writes(batch):
            group.update(x, dense)
        else:
            group.update(*self._written(index, number, x, dense))

    def _written(self, index: int, number: int, x: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs of a writer for one micro-batch, and what it should write."""
        with self.dense.inputs.matmuls():
            linear = self.dense.batches[number].groups[0][0]
            out = _flat(dense) @ linear.weight.t()
        error = _flat(_lacking(self.dense, self.changing, index))
        if linear.name not in self.norms:
            return x, out + error
        bias = linear.module.get_parameter("bias") if linear.has_bias else 0.0
        out, error = out.float(), error.float()
        target, scale = _before_norm(self.norms[linear.name], out, bias, error)
        return _flat(x).float() * scale, target
