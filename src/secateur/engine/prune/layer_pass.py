"""Prunes one decoder layer.

    inputs ─► halt at each group ─► gather, prune ─► (tune) ─► outputs

With asymmetric fitting, the dense model runs the layer in step, so both inputs of a group are
known at the same time. With reconstruction, the layer is tuned before its outputs are passed on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from secateur.engine.prune.asymmetric import AsymmetricTargets
from secateur.engine.prune.group_statistics import GroupStatistics
from secateur.engine.prune.held_out import chosen_dampings
from secateur.engine.prune.linear_record import LinearRecord
from secateur.engine.prune.reconstruction import TunedWeight, output_error, reconstruct
from secateur.engine.prune.routing import is_reached
from secateur.engine.prune.settings import Settings
from secateur.engine.prune.straight_through import RoundedWeight
from secateur.engine.prune.surgery import exchanged, prune_group
from secateur.engine.prune.tasks import Tasks
from secateur.engine.prune.tuning import draw_steps
from secateur.engine.stream.activations import Activations
from secateur.engine.stream.calls import LayerCall
from secateur.engine.stream.dense_twin import HaltedLayer, dense_copy, in_step
from secateur.engine.stream.forwards import by_layer
from secateur.engine.stream.lane import Lane
from secateur.engine.stream.passage import Passage
from secateur.models.architecture import Architecture, Groups, Linear, linears_of
from secateur.parallel.ranks import owners
from secateur.precision import exact_matmuls


@dataclass(frozen=True)
class LayerContext:
    """The inputs for the work on one decoder layer.

    Attributes:
        index: the number of the layer.
        last: whether this is the last layer.
        architecture: architecture of the model.
        tasks: tasks by full names of the linears.
        groups: the layer's linears by shared input, by their names within it.
        statistics: statistics of inputs to gather; empty if no forward is needed.
        settings: how the work is done.
        passage: the calibration stream; None without calibration.
        own: returns the statistics of a linear's own gradients.
        step: called after every forward.
    """

    index: int
    last: bool
    architecture: Architecture
    tasks: Tasks
    groups: Groups
    statistics: frozenset[str]
    settings: Settings
    passage: Passage | None
    own: Callable[[Linear], Mapping[str, Tensor]]
    step: Callable[[], None]


class LayerPass:
    """The work on one decoder layer.

    Args:
        context: the inputs for the work.
        layer: the layer with its weights.

    Attributes:
        linears: all prunable linears of the layer, by their names within it.
        unseen: the full names of linears that calibration did not reach; they stay unchanged.
    """

    def __init__(self, context: LayerContext, layer: nn.Module) -> None:
        self.context, self.layer = context, layer
        self.linears = linears_of(layer, context.architecture.layer_name(context.index))
        self.pruned = [x for x in self.linears.values() if context.tasks[x.name].changes]
        self.shadows: dict[str, tuple[Tensor, Tensor]] = {}
        self.unseen: list[str] = []
        self.gathered: dict[int, GroupStatistics] = {}
        self.targets: AsymmetricTargets | None = None
        self.records: list[LinearRecord] = []

    @property
    def tunes(self) -> bool:
        """Whether the layer is tuned: only if some of it is pruned."""
        return bool(self.pruned) and self.context.settings.tunes

    @property
    def outputs_needed(self) -> bool:
        """Whether the outputs of the layer right after pruning are passed on."""
        return not self.context.last and not self.tunes

    @property
    def passage(self) -> Passage:
        """The calibration stream."""
        assert self.context.passage is not None
        return self.context.passage

    @property
    def lane(self) -> Lane:
        """The hidden states of the pruned model."""
        return self.lane_of(self.passage.hidden)

    @property
    def dense_lane(self) -> Lane:
        """The hidden states of the dense model."""
        return self.lane_of(self.passage.dense)

    def lane_of(self, states: Activations | None) -> Lane:
        """Hidden states of one model at this layer."""
        assert states is not None
        matmuls = partial(self.context.settings.matmuls, self.passage.target.device)
        return Lane(self.passage, states, self.context.index, matmuls, self.context.step)

    def prune(self) -> list[LinearRecord]:
        """Gather and prune, and propagate the layer unless tuning comes first."""
        context = self.context
        if context.settings.tunes and not context.settings.asymmetric:
            self.dense_lane.pass_through(self.layer)
            self.passage.advance_dense(context.index + 1)
        if context.statistics:
            self.prune_on_the_way()
            return self.records
        fitted = self.shadowed(lambda linear: linear.weight, {})
        for linear in self.reached(self.pruned, None):
            self.records += prune_group([linear], {}, context.own, context.tasks, fitted)
        if self.outputs_needed and context.settings.tunes:
            self.lane.pass_through(self.layer)
        return self.records

    def reached(self, linears: Sequence[Linear], tokens: int | None) -> list[Linear]:
        """The linears that calibration reached. The others stay unchanged and are recorded."""
        architecture, own = self.context.architecture, self.context.own
        left = [x for x in linears if not is_reached(architecture, x, tokens, own(x))]
        self.unseen += [x.name for x in left]
        self.pruned = [x for x in self.pruned if x.name not in self.unseen]
        return [x for x in linears if x.name not in self.unseen]

    # -- calibration ----------------------------------------------------------------------------

    def prune_on_the_way(self) -> None:
        """Prune each group when the inputs of all micro-batches are known."""
        self.groups = self.grouped()
        if self.context.settings.sequential == "group":
            self.halt_at_groups()
            return
        lane = self.lane
        forwards = [partial(lane.pass_one, self.layer, b, stores=False) for b in lane.batches]
        by_layer(self.groups, forwards, self.gather_alone)
        self.prune_groups(range(len(self.groups)))
        if self.outputs_needed:
            lane.pass_through(self.layer)

    def grouped(self) -> list[list[Linear]]:
        """The linears to prune, by shared input, without groups that stay dense."""
        groups = [[self.linears[name] for name in group] for group in self.context.groups]
        return [g for g in groups if any(self.context.tasks[x.name].changes for x in g)]

    def halt_at_groups(self) -> None:
        """Make one pass, group by group, with the dense model beside the pruned one if needed."""
        context, dense, writers = self.context, None, list[Linear]()
        if context.settings.asymmetric:
            names = context.architecture.writers
            writers = [self.linears[name] for name in names if name in self.linears]
            # copy before adding hooks, because the copy would have them too
            copied = dense_copy(self.layer, self.groups, writers, context.architecture.of_expert)
            dense = HaltedLayer(self.dense_lane, *copied)
        pruned = HaltedLayer(
            self.lane, self.layer, self.groups, writers, stores=self.outputs_needed
        )
        if dense is not None:
            self.targets = AsymmetricTargets(pruned, dense, writers)
        if self.passage.batches():
            in_step(pruned, dense, self.gather, self.prune_next, dense_outputs=True)
        else:
            self.follow([pruned, *([dense] if dense else [])])
        if dense is not None:
            self.passage.advance_dense(context.index + 1)

    def follow(self, halted: Sequence[HaltedLayer]) -> None:
        """Prune all groups of a process that has no micro-batches, in the order of the first one.

        Args:
            halted: the layers, which are closed at the end.
        """
        try:
            for _ in self.groups:
                self.prune_next(-1)
        finally:
            for layer in halted:
                layer.close()

    def prune_next(self, group: int) -> None:
        """Prune a group that all micro-batches of this process have reached.

        Only a forward shows which group comes next, so a process without any asks the first one.
        """
        if self.passage.some_idle:
            group = self.context.settings.ranks.gather(group)[0]
        self.prune_groups([group])

    def seen(self, group: int) -> GroupStatistics:
        """The statistics of a group, created when its first input arrives.

        Not earlier, because a layer of many experts has many grams.
        """
        if group not in self.gathered:
            size = self.targets.size(group) if self.targets else 0
            linear, device = self.groups[group][0], self.passage.target.device
            names = self.context.statistics
            self.gathered[group] = GroupStatistics(
                names,
                linear,
                device,
                target_size=size,
                held_out=self.context.settings.choose_damping,
            )
        return self.gathered[group]

    def gather(self, index: int, group: int, x: Tensor, dense: Tensor | None) -> None:
        """Add the input of a group in one micro-batch."""
        target = None
        if self.targets is not None and dense is not None:
            target = self.targets.of(index, group, dense)
        self.seen(group).update(x, target)

    def gather_alone(self, group: int, x: Tensor) -> None:
        """Add the input of a group while a forward runs."""
        with exact_matmuls(self.passage.target.device):
            self.seen(group).update(x)

    def prune_groups(self, groups: Sequence[int]) -> None:
        """Prune groups whose inputs are known from all micro-batches of all processes.

        Several processes solve different linears, and then exchange them.
        """
        ranks, found = self.context.settings.ranks, list[LinearRecord]()
        work = [(group, x) for group in groups for x in self.merged(group)]
        owned = owners([x.shape[0] * x.shape[1] ** 2 for _, x in work], ranks.count)
        for group in groups:
            own = {
                x.name: owner == ranks.rank
                for (of, x), owner in zip(work, owned, strict=True)
                if of == group
            }
            found += self.solved(group, own)
        if ranks.count > 1:
            found = exchanged([x for _, x in work], owned, found, ranks)
        self.records += found

    def merged(self, group: int) -> list[Linear]:
        """Complete the statistics of a group. Return its linears to prune."""
        self.seen(group).merge(self.context.settings.ranks)
        linears = [x for x in self.groups[group] if self.context.tasks[x.name].changes]
        return self.reached(linears, self.seen(group).tokens)

    def solved(self, group: int, own: Mapping[str, bool]) -> list[LinearRecord]:
        """Prune the linears of a group that this process owns, and release its statistics."""
        context, seen = self.context, self.gathered.pop(group)
        linears = [x for x in self.groups[group] if own.get(x.name)]
        if not (linears or (own and self.remasks)):
            return []
        of = self.dampings(seen, group, linears)
        shared = seen.value()
        writer = self.targets is not None and self.targets.writes(group)
        weights = {damping: seen.fitted(writer, damping) for damping in set(of.values())}
        fitted = self.shadowed(lambda x: weights[of[x.name]](x), shared)
        seen.running.clear()
        if self.remasks:
            for linear in self.groups[group]:
                if own.get(linear.name) is False:
                    fitted(linear)  # keeps what tuning needs, though another process solves it
        found = prune_group(linears, shared, context.own, context.tasks, fitted)
        return [replace(record, tokens=seen.tokens) for record in found]

    def dampings(
        self, seen: GroupStatistics, group: int, linears: Sequence[Linear]
    ) -> dict[str, float]:
        """The damping of each linear of a group; held-out tokens choose it, if there are any.

        Args:
            seen: the statistics of the group, complete afterwards.
            group: the group.
            linears: its linears that this process solves.
        """
        context = self.context
        every = self.groups[group]
        found = dict.fromkeys((x.name for x in every), context.settings.asymmetric_damping)
        if seen.held is not None:
            solved = (
                [x for x in every if context.tasks[x.name].changes] if self.remasks else linears
            )
            if solved:
                writer = self.targets is not None and self.targets.writes(group)
                found |= chosen_dampings(seen, solved, context.tasks, context.own, writer)
            seen.take_in()
        return found

    # -- reconstruction -------------------------------------------------------------------------

    def shadowed(
        self, fitted: Callable[[Linear], Tensor], shared: Mapping[str, Tensor]
    ) -> Callable[[Linear], Tensor]:
        """Keep the dense weights and their inputs' norms, if masks may change later."""
        if not self.remasks:
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

    @property
    def remasks(self) -> bool:
        """Whether tuning may change the masks: not those of matrices on a grid."""
        context = self.context
        on_grid = any(task.method.solver.grid for task in context.tasks.values())
        return self.tunes and context.settings.reconstruction.remask and not on_grid

    def tuned_weights(self) -> list[TunedWeight]:
        """The pruned matrices of the layer, ready to be tuned."""
        found = []
        for linear in self.pruned:
            shadow, norm = self.shadows.pop(linear.name, (None, linear.weight.new_ones(1)))
            task = self.context.tasks[linear.name]
            pattern, on_grid = task.method.pattern, bool(task.method.solver.grid)
            found.append(TunedWeight(linear, shadow, norm, pattern, task.sparsity, on_grid))
        return found

    def rounded_weights(self) -> list[RoundedWeight]:
        """The matrices of the layer that are on a grid."""
        grids = [(x, self.context.tasks[x.name].method.solver.grid) for x in self.pruned]
        return [RoundedWeight(linear, grid) for linear, grid in grids if grid]

    def tune(self) -> dict[str, float]:
        """Tune a pruned layer and propagate it. Return its output error before and after."""
        passage, index = self.passage, self.context.index
        how, ranks = self.context.settings.reconstruction, self.context.settings.ranks
        before = self.measured_error(stores=False)
        reconstruct(
            self.layer,
            self.tuned_weights(),
            draw_steps(len(passage.windows), passage.windows_at_once, how.passes, seed=index),
            self.examples,
            how,
            tell=self.context.step,
            rounded=self.rounded_weights(),
            ranks=ranks,
        )
        for parameter in self.layer.parameters():
            ranks.share(parameter, 0)  # so no rounding of theirs can separate the processes
        after = self.measured_error(stores=not self.context.last)
        return {"error_before": before, "error_after": after}

    def examples(self, windows: Sequence[int]) -> list[tuple[Tensor, Tensor, LayerCall]]:
        """Inputs, targets and call of some windows: together, or one by one this process's."""
        passage, own, index = self.passage, self.passage.own, self.context.index
        mine = [w for w in windows if own.start <= w < own.stop]
        rows = [slice(w, w + 1) for w in mine]
        pairs = [(passage.read(row), passage.read_dense(row)) for row in rows]
        if self.context.settings.ranks.count > 1:
            calls = [passage.ends.call(index, [w]) for w in mine]
            return [(*pair, call) for pair, call in zip(pairs, calls, strict=True)]
        inputs, targets = zip(*pairs, strict=True)
        return [(torch.cat(inputs), torch.cat(targets), passage.ends.call(index, mine))]

    def measured_error(self, *, stores: bool) -> float:
        """The mean output error of the layer over all windows. It can also pass on the outputs."""
        total, passage = 0.0, self.passage
        for batch in passage.batches():
            out, call = self.lane.outputs(self.layer, batch), self.lane.call(batch)
            target = call.states(passage.read_dense(batch))
            total += float(output_error(call.states(out), target)) * len(out)
            if stores:
                passage.write(batch, out)
        return sum(self.context.settings.ranks.gather(total)) / len(passage.windows)
