"""The loop of a pruning run, and the work on one decoder layer.

    first inputs ─► for each decoder layer: read it ─► gather, prune ─► next inputs ─► write, ledger
    one layer:      inputs ─► halt at each group ─► gather, prune ─► (tune) ─► outputs

A run has tasks (`tasks.py`: the sparsity of each linear), a calibration stream
(`stream/calibration_stream.py`), and settings (how the work is done). Magnitude needs no
calibration and skips the forwards. Taylor and OBD read gradients that an earlier pass gathered
(`stream/gradients.py`). With asymmetric fitting, the dense model runs the layer in step, so both
inputs of a group are known at the same time. With reconstruction, the dense model's hidden states
pass as well: a pruned layer is tuned to the outputs of the dense layer before its own outputs are
passed on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from secateur.allocator import reused_pages
from secateur.engine.prune.coverage import coverage, is_reached
from secateur.engine.prune.group_pruning import (
    GroupStatistics,
    all_zero,
    chosen_dampings,
    collapse_error,
    collapsed,
    exchanged,
    in_words,
    prune_group,
)
from secateur.engine.prune.reconstruction import (
    RoundedWeight,
    TunedWeight,
    draw_steps,
    output_error,
    reconstruct,
)
from secateur.engine.prune.settings import Settings
from secateur.engine.prune.tasks import Tasks, gradient_statistics, input_statistics, left_dense
from secateur.engine.stream.activations import Activations
from secateur.engine.stream.calibration_stream import CalibrationStream, LayerInputs
from secateur.engine.stream.calls import LayerCall
from secateur.engine.stream.gradients import stored_gradients
from secateur.engine.stream.halted_forwards import HaltedLayer, by_layer, dense_copy, in_step
from secateur.engine.stream.layouts import kind_of
from secateur.engine.stream.targets import Target, walk_layers
from secateur.errors import VerificationError
from secateur.models.architecture import Architecture, Groups, Linear, linears_of
from secateur.parallel.ranks import owners
from secateur.precision import exact_matmuls, full_float32
from secateur.progress import Progress
from secateur.runs.ledger import Ledger
from secateur.runs.records import Layer, LinearRecord
from secateur.sparsity.patterns import misplaced

log = logging.getLogger(__name__)


class Run:
    """One pruning run over all decoder layers of a target.

    Args:
        target: the model.
        tasks: the task of each linear (`tasks_of`).
        calibration: the calibration stream; None if the tasks need none.
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
        calibration: CalibrationStream | None,
        settings: Settings,
        ledger: Ledger,
        progress: Progress,
    ) -> None:
        self.target, self.tasks, self.calibration = target, tasks, calibration
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
        assert self.calibration is not None
        forwards = 1 if self.settings.sequential == "group" else 2
        steps = len(self.calibration.batches()) * forwards
        if self.settings.dense_needed:
            steps += len(self.calibration.batches())
        if self.settings.tunes:
            steps += (2 + self.settings.reconstruction.passes) * len(self.calibration.batches())
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
            assert self.calibration is not None
            done = self.calibration.open(done, dense=self.settings.dense_needed)
            if done == 0:  # also if the hidden states of a stopped run are lost
                self.ledger.begin()
        for entry in self.ledger.layers:
            self.tasks = left_dense(self.tasks, entry.unseen)
        self.progress.start("pruning", self.steps_per_layer * (len(layers) - done))
        with reused_pages():
            started = time.perf_counter()  # before the first layer is read
            for index, layer in walk_layers(self.target, range(done, len(layers))):
                self.prune_layer(index, layer, started)
                started = time.perf_counter()
        if self.calibration is not None:
            self.calibration.close()
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
        if self.calibration is not None and index + 1 < len(self.target.layers):
            self.calibration.advance(index + 1)
        self.settings.ranks.wait()  # all have stored their inputs of the next layer
        seconds = time.perf_counter() - started
        lost = collapsed([record for record in records if not self.takes_all(record)])
        found = {"reconstruction": tuned, "collapsed": lost, "unseen": tuple(unseen)}
        given = {name: value for name, value in found.items() if value}
        self.ledger.finish_layer(Layer(layer=index, seconds=seconds, linears=records, **given))
        self.settings.ranks.wait()  # the ledger of the first process has its line
        if self.calibration is not None:
            self.calibration.forget(index)
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
        if self.statistics and self.calibration is not None:
            groups = self.calibration.layouts[index].groups
        return LayerContext(
            index,
            index + 1 == len(self.target.layers),
            self.target.architecture,
            self.tasks,
            groups,
            self.statistics,
            self.settings,
            self.calibration,
            self.own_statistics(index),
            lambda: self.step(index),
        )

    def own_statistics(self, index: int) -> Callable[[Linear], dict[str, Tensor]]:
        """The statistics of the gradients of each linear of a layer."""
        names = gradient_statistics(self.tasks)
        return stored_gradients(self.settings.work, index, names, self.target.device)


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
        calibration: the calibration stream; None without calibration.
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
    calibration: CalibrationStream | None
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
    def calibration(self) -> CalibrationStream:
        """The calibration stream."""
        assert self.context.calibration is not None
        return self.context.calibration

    @property
    def lane(self) -> LayerInputs:
        """The hidden states of the pruned model."""
        return self.lane_of(self.calibration.hidden)

    @property
    def dense_lane(self) -> LayerInputs:
        """The hidden states of the dense model."""
        return self.lane_of(self.calibration.dense)

    def lane_of(self, states: Activations | None) -> LayerInputs:
        """Hidden states of one model at this layer."""
        assert states is not None
        matmuls = partial(self.context.settings.matmuls, self.calibration.target.device)
        return LayerInputs(self.calibration, states, self.context.index, matmuls, self.context.step)

    def prune(self) -> list[LinearRecord]:
        """Gather and prune, and propagate the layer unless tuning comes first."""
        context = self.context
        if context.settings.tunes and not context.settings.asymmetric:
            self.dense_lane.pass_through(self.layer)
            self.calibration.advance_dense(context.index + 1)
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
        if self.calibration.batches():
            in_step(pruned, dense, self.gather, self.prune_next, dense_outputs=True)
        else:
            self.follow([pruned, *([dense] if dense else [])])
        if dense is not None:
            self.calibration.advance_dense(context.index + 1)

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
        if self.calibration.some_idle:
            group = self.context.settings.ranks.gather(group)[0]
        self.prune_groups([group])

    def seen(self, group: int) -> GroupStatistics:
        """The statistics of a group, created when its first input arrives.

        Not earlier, because a layer of many experts has many grams.
        """
        if group not in self.gathered:
            size = self.targets.size(group) if self.targets else 0
            linear, device = self.groups[group][0], self.calibration.target.device
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
        with exact_matmuls(self.calibration.target.device):
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
        return [record.model_copy(update={"tokens": seen.tokens}) for record in found]

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
        calibration, index = self.calibration, self.context.index
        how, ranks = self.context.settings.reconstruction, self.context.settings.ranks
        before = self.measured_error(stores=False)
        reconstruct(
            self.layer,
            self.tuned_weights(),
            draw_steps(
                len(calibration.windows), calibration.windows_at_once, how.passes, seed=index
            ),
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
        calibration, own, index = self.calibration, self.calibration.own, self.context.index
        mine = [w for w in windows if own.start <= w < own.stop]
        rows = [slice(w, w + 1) for w in mine]
        pairs = [(calibration.read(row), calibration.read_dense(row)) for row in rows]
        if self.context.settings.ranks.count > 1:
            calls = [calibration.outer.call(index, [w]) for w in mine]
            return [(*pair, call) for pair, call in zip(pairs, calls, strict=True)]
        inputs, targets = zip(*pairs, strict=True)
        return [(torch.cat(inputs), torch.cat(targets), calibration.outer.call(index, mine))]

    def measured_error(self, *, stores: bool) -> float:
        """The mean output error of the layer over all windows. It can also pass on the outputs."""
        total, calibration = 0.0, self.calibration
        for batch in calibration.batches():
            out, call = self.lane.outputs(self.layer, batch), self.lane.call(batch)
            target = call.states(calibration.read_dense(batch))
            total += float(output_error(call.states(out), target)) * len(out)
            if stores:
                calibration.write(batch, out)
        return sum(self.context.settings.ranks.gather(total)) / len(calibration.windows)


class AsymmetricTargets:
    """The targets of each group of linears that keep the outputs near the dense model's.

    The target of a linear that writes to the residual stream is its dense output plus the current
    error of the stream: T = Wx + (H − Ĥ). Any other linear should return Wx, so its target is its
    dense input x. See `sparsity.dense_target`.

    If the writers are known, only they have a target. They keep the stream near the dense one. In
    trials, fitting the other linears too doubled the cost and did not help. Experts have no target:
    they are fitted to their own dense weights.

    Args:
        pruned: the layer to prune.
        dense: the same layer of the dense model.
        writers: linears of the pruned layer that write to the residual stream.
    """

    def __init__(self, pruned: HaltedLayer, dense: HaltedLayer, writers: Sequence[Linear]) -> None:
        self.pruned, self.dense = pruned, dense
        self.writers = {writer.name for writer in writers}

    def writes(self, group: int) -> bool:
        """Whether a group is a linear that writes to the residual stream."""
        linears = self.dense.groups[group]
        return len(linears) == 1 and linears[0].name in self.writers

    def size(self, group: int) -> int:
        """The size of a group's target for one token; 0 if it has no target."""
        linears = self.dense.groups[group]
        if not linears:
            return 0
        if self.writers:
            return linears[0].shape[0] if self.writes(group) else 0
        return linears[0].shape[1]

    def of(self, index: int, group: int, dense: Tensor) -> Tensor | None:
        """The target of a group for one micro-batch; None if it has no target.

        Args:
            index: number of the micro-batch.
            group: the group.
            dense: its input in the dense model.
        """
        if not self.writes(group):
            return None if self.writers else dense
        stream = self.dense.inputs(index) - self.pruned.inputs(index)
        earlier = self.dense.added(index) - self.pruned.added(index)
        with self.dense.lane.matmuls():
            out = dense.reshape(-1, dense.shape[-1]) @ self.dense.groups[group][0].weight.t()
        return out + (stream + earlier).reshape(out.shape)
