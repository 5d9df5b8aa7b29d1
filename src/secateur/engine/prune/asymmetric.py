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
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.calibration.statistics import Sources
from secateur.engine.prune.run import CalibratedLayerPass, GroupStatistics, Run
from secateur.engine.stream.halted_forwards import (
    HaltedLayer,
    HaltingForwards,
    LinearGroups,
    in_step,
)
from secateur.models.architecture import Linear
from secateur.models.experts import OpenExperts
from secateur.parallel.ranks import Ranks
from secateur.sparsity.hessian import dense_target

_QUIET = 0.1  # the gain of a channel that takes no part, as a share of the mean gain
_ROWS = 512  # the largest float32 product besides the sums


class CrossGram:
    """M = Σ_t y_t x̂_tᵀ, float32 [rows, in]: y_t in the dense model, x̂_t in the pruned one.

    Products are float32 and their sums float64, as in `Gram`.

    Args:
        rows: the size of y, which is inputs or outputs of the linear.
        in_features: the number of input features.
        device: where the sums are kept and computed.
    """

    def __init__(self, rows: int, in_features: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(rows, in_features, dtype=torch.float64, device=device)

    def update(self, target: Float[Tensor, "tokens rows"], x: Float[Tensor, "tokens in"]) -> None:
        """Add y and x̂ of the same tokens, some rows of y at a time."""
        targets, inputs = target.detach().float(), x.detach().float()
        for columns, sums in zip(targets.split(_ROWS, 1), self.total.split(_ROWS), strict=True):
            sums += columns.t() @ inputs

    def value(self) -> Float[Tensor, "rows in"]:
        """M, float32. It takes the place of the sums."""
        self.total = self.total.float()
        return self.total


class TargetStatistics(GroupStatistics):
    """Running statistics of the input of a group, and of the outputs that it should have.

    The gram must be among the statistics.

    Args:
        sources: sources of the statistics, by their names.
        linears: the linears of the group.
        device: device of the sums.
        target_size: size of the group's target for one token.
    """

    def __init__(
        self, sources: Sources, linears: Sequence[Linear], device: torch.device, target_size: int
    ) -> None:
        super().__init__(sources, linears, device)
        self.cross = CrossGram(target_size, linears[0].shape[1], device)

    def add(self, x: Tensor, target: Tensor) -> None:
        """Add the inputs of one micro-batch, with any leading shape, and their targets."""
        self.update(x)
        flat = _flat(x)
        self.cross.update(_flat(target), flat)

    def merge(self, ranks: Ranks) -> None:
        """Add up the statistics that the processes have gathered, each from its own windows."""
        super().merge(ranks)
        ranks.total(self.cross.total)

    def fitted(self, writer: bool, damping: float) -> Callable[[Linear], Tensor]:
        """Return a function that gives the weight [out, in] that fits a linear's targets best.

        Args:
            writer: whether the targets are outputs of the only linear, not its dense inputs.
            damping: strength of the pull towards the dense weights.
        """
        gram, moments = self.running["gram"].value(), self.cross.value()
        if writer:
            return lambda x: dense_target(gram, moments, x.weight.float(), damping)
        identity = torch.eye(len(gram), device=gram.device)
        shared = dense_target(gram, moments, identity, damping)
        return lambda linear: linear.weight.float() @ shared


def by_group_with_dense(
    halting: HaltingForwards,
    dense: HaltingForwards,
    gather: Callable[[int, int, Tensor, Tensor | None], None],
    *,
    outputs_needed: bool = True,
) -> Iterator[int]:
    """Yield each group as `by_group` does, in step with the forwards of the dense layer.

    Args:
        halting: the forwards of the layer that is pruned.
        dense: the forwards of the dense layer. They halt at the same groups, except empty groups,
            and are still halted at the end.
        gather: called with a forward's index, a group's index, its input, and the input of the
            same group in the dense model (None where that does not halt).
        outputs_needed: False ends the forwards after the last group.

    Raises:
        ArchitectureError: the micro-batches do not reach the groups in the same order.
    """

    def advance(index: int) -> set[int]:
        arrival = halting.advance(index)
        if arrival is None:
            return set()
        group, x = arrival
        twin = dense.advance(index) if dense.groups[group] else None
        gather(index, group, x, twin[1] if twin else None)
        reached = {group} if twin is None else {group, twin[0]}
        del arrival, x, twin
        halting.halt(index)
        if dense.groups[group]:
            dense.halt(index)
        return reached

    return in_step(halting, advance, outputs_needed=outputs_needed)


def dense_copy(
    layer: nn.Module, groups: LinearGroups, of_expert: Callable[[str], bool]
) -> tuple[nn.Module, LinearGroups]:
    """Copy a layer that is still dense, with its groups.

    The groups of experts are empty in the copy, because an expert sees different tokens in the two
    models.

    Args:
        layer: a layer without hooks, because a copy would have them too.
        groups: its linears, by shared input.
        of_expert: returns whether the linear of this name belongs to an expert.
    """
    twin = copy.deepcopy(layer)
    modules = dict(twin.named_modules())
    names = {id(module): name for name, module in layer.named_modules()}

    def copied(linear: Linear) -> Linear:
        return Linear(linear.name, modules[names[id(linear.module)]])

    own = [[copied(x) for x in group if not of_expert(x.name)] for group in groups]
    return twin, own


def before_norm(
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
    gain = normed(torch.ones_like(output[:1]))
    written = output + bias
    scaled = gain * written
    energy = scaled.square().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    inverse = (scaled * normed(written)).sum(-1, keepdim=True) / energy
    heard = gain.abs() >= _QUIET * gain.square().mean().sqrt()
    return inverse * output + torch.where(heard, error / gain, 0.0), inverse


class ExpertTargets:
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
        self.own = changing.layer.get_submodule(path)
        self.twin = dense.layer.get_submodule(path)
        assert isinstance(self.own, OpenExperts)
        self.numbers = {id(x): n for n, one in enumerate(self.own) for x in one.modules()}
        self.given: dict[int, dict[str, Tensor]] = {}
        self.missing: dict[int, Tensor] = {}
        self.wanted: Tensor | None = None  # the sum that the experts should write, for `_missing`
        self.handles = [
            self.own.register_forward_pre_hook(self._keep_call, with_kwargs=True),
            self.twin.register_forward_hook(self._keep_wanted),
        ]

    def _keep_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        names = ("hidden_states", "top_k_index", "top_k_weights")
        self.given[self.changing.current] = {**dict(zip(names, args, strict=False)), **kwargs}

    def _keep_wanted(self, module: nn.Module, args: Any, out: Tensor) -> None:
        lacking = _lacking(self.dense, self.changing, self.dense.current)
        self.wanted = out.float() + _flat(lacking)

    def writes(self, linear: Linear) -> bool:
        """Whether a linear is the last one of an expert."""
        return linear.name.endswith(".down_proj")

    def weights(self, index: int, linear: Linear) -> tuple[Tensor, Tensor]:
        """The tokens of a micro-batch that an expert gets, and the router's weights [tokens, 1]."""
        given = self.given[index]
        token, place = OpenExperts.routed(given["top_k_index"], self.numbers[id(linear.module)])
        return token, given["top_k_weights"][token, place, None].float()

    def targets(self, index: int, linear: Linear) -> Tensor:
        """The targets of the last linear of an expert, without its bias."""
        missing, given = self._missing(index), self.given[index]
        token, _ = self.weights(index, linear)
        expert = self.twin.get_submodule(str(self.numbers[id(linear.module)]))
        with self.dense.inputs.matmuls():
            out = expert(given["hidden_states"][token])
        if linear.has_bias:
            out = out - linear.module.get_parameter("bias")
        total = given["top_k_weights"].sum(-1, keepdim=True)[token].float()
        return out + missing[token] / total

    def _missing(self, index: int) -> Tensor:
        """E of a micro-batch. The forward of the changing layer must be in memory."""
        if index not in self.missing:
            self.dense.look_ahead(index)
            wanted, self.wanted = self.wanted, None
            assert wanted is not None
            with self.dense.inputs.matmuls():
                written = self.twin.forward(**self.given[index])
            self.missing[index] = wanted - written
            if self.changing.offload:
                self.changing.offload.live.note(self.missing[index])
            if not self.dense.running[index].dead:
                self.dense.halt(index)
        return self.missing[index]

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


class AsymmetricLayerPass(CalibratedLayerPass):
    """The work on one decoder layer whose outputs stay near those of the dense model.

    The dense model runs the layer in step. The target of a linear that writes to the residual
    stream is its dense output plus the current error of the stream: T = Wx + (H − Ĥ). Any other
    linear should return Wx, so its target is its dense input x (`sparsity.hessian.dense_target`).

    If the writers are known, only they have a target. They keep the stream near the dense one. In
    trials, fitting the other linears too doubled the cost and did not help. Experts have no target:
    they are fitted to their own dense weights.
    """

    def __init__(self, run: Run, index: int, layer: nn.Module) -> None:
        super().__init__(run, index, layer)
        plain, normed = self.architecture.writers, dict(self.architecture.normed_writers)
        found = [name for name in (*plain, *normed) if name in self.linears]
        self.writers = {self.linears[name].name for name in found}
        added = [normed.get(name, name) for name in found]
        # copy before adding hooks, because the copy would have them too
        twin, own = dense_copy(layer, self.groups, self.architecture.of_expert)
        last = [[model.get_submodule(name) for name in added] for model in (twin, layer)]
        self.norms = {
            self.linears[name].name: twin.get_submodule(normed[name])
            for name in found
            if name in normed
        }
        self.dense = HaltedLayer(self.inputs(dense=True), twin, own, last[0])
        self.changing = HaltedLayer(
            self.inputs(), layer, self.groups, last[1], stores=self.outputs_needed
        )
        self.experts = self._expert_targets() if found and not self.norms else None

    def _expert_targets(self) -> ExpertTargets | None:
        """The targets of the layer's experts, if their sum is added to the residual stream."""
        declared = self.architecture.experts
        path = declared.module if declared else ""
        module = dict(self.layer.named_modules()).get(path)
        if type(module) is not OpenExperts:  # others multiply inputs by the router's weights
            return None
        return ExpertTargets(path, self.changing, self.dense)

    def gather(self) -> Generator[Sequence[int], None, None]:
        """Yield each group in one pass, in step with the dense model."""
        with ExitStack() as stack:
            for part in (self.dense, self.changing, self.experts):
                if part:
                    stack.callback(part.close)
            arrived = by_group_with_dense(
                self.changing, self.dense, self._gather, outputs_needed=self.outputs_needed
            )
            yield from self._in_order(arrived)
            self.dense.finish()
        self.dense.inputs.states.advance(self.index + 1)

    def _writes(self, group: int) -> bool:
        """Whether a group is a linear that writes to the residual stream."""
        linears = self.groups[group]
        if self._of_expert(group):
            return self.experts is not None and self.experts.writes(linears[0])
        return len(linears) == 1 and linears[0].name in self.writers

    def _of_expert(self, group: int) -> bool:
        return not self.dense.groups[group]

    def _new_statistics(self, group: int) -> GroupStatistics:
        linears = self.groups[group]
        if not self._writes(group) and (self.writers or self._of_expert(group)):
            return super()._new_statistics(group)
        rows, columns = linears[0].shape
        size = rows if self.writers else columns
        return TargetStatistics(self.sources, linears, self.device, size)

    def _gather(self, index: int, group: int, x: Tensor, dense: Tensor | None) -> None:
        """Add the input of a group in one micro-batch, with its target if it has one."""
        statistics, linear = self._statistics(group), self.groups[group][0]
        if self.experts and self._of_expert(group):
            _, weights = self.experts.weights(index, linear)
            if isinstance(statistics, TargetStatistics):
                statistics.add(x.float() * weights, self.experts.targets(index, linear) * weights)
            else:
                statistics.update(x.float() * weights)
        elif dense is None or not isinstance(statistics, TargetStatistics):
            statistics.update(x)
        else:
            statistics.add(*self._pairs(index, group, x, dense))

    def _pairs(self, index: int, group: int, x: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs of a group for one micro-batch, and their targets."""
        if not self._writes(group):
            return x, dense
        with self.dense.inputs.matmuls():
            linear = self.dense.groups[group][0]
            out = _flat(dense) @ linear.weight.t()
        error = _flat(_lacking(self.dense, self.changing, index))
        if linear.name not in self.norms:
            return x, out + error
        bias = linear.module.get_parameter("bias") if linear.has_bias else 0.0
        out, error = out.float(), error.float()
        target, scale = before_norm(self.norms[linear.name], out, bias, error)
        return _flat(x).float() * scale, target

    def _fitted(
        self, group: int, statistics: GroupStatistics
    ) -> tuple[dict[str, Tensor], Callable[[Linear], Tensor]]:
        if not isinstance(statistics, TargetStatistics):
            return super()._fitted(group, statistics)
        shared, damping = statistics.value(), self.settings.asymmetric_damping
        return shared, statistics.fitted(self._writes(group), damping)
