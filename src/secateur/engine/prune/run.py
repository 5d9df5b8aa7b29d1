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
from contextlib import closing
from functools import partial

import torch
from torch import Tensor, nn

from secateur.allocator import reused_pages
from secateur.engine.prune.coverage import coverage, is_reached
from secateur.engine.prune.group_pruning import (
    GroupStatistics,
    TargetStatistics,
    all_zero,
    choose_dampings,
    collapse_error,
    collapsed,
    exchange,
    format_collapsed,
    prune_group,
)
from secateur.engine.prune.reconstruction import (
    RoundedWeight,
    TunedWeight,
    draw_steps,
    output_error,
    reconstruct,
)
from secateur.engine.prune.tasks import (
    Settings,
    Tasks,
    gathering,
    left_dense,
)
from secateur.engine.stream.calibration_stream import CalibrationStream, LayerInputs
from secateur.engine.stream.calls import LayerCall
from secateur.engine.stream.gradients import stored_gradients
from secateur.engine.stream.halted_forwards import (
    HaltedLayer,
    by_group,
    by_group_with_dense,
    by_layer,
    dense_copy,
)
from secateur.engine.stream.layouts import kind_of
from secateur.engine.stream.targets import Target, walk_layers
from secateur.errors import VerificationError
from secateur.models.architecture import Groups, Linear, linears_of
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
        statistics: statistics of inputs to gather; empty if pruning needs no forward.
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
        self.statistics = gathering(tasks, asymmetric=settings.asymmetric).forward
        self.steps_taken = 0
        self.verified: set[Hashable] = set()

    @property
    def forwards_needed(self) -> bool:
        """Whether calibration tokens pass through the layers at all."""
        return bool(self.statistics) or self.settings.tunes

    @property
    def steps_per_layer(self) -> int:
        """The number of progress steps in one layer: one for every forward of a micro-batch."""
        if not self.forwards_needed:
            return 1
        assert self.calibration is not None
        passes = 1 if self.settings.sequential == "group" else 2
        passes += self.settings.dense_needed
        if self.settings.tunes:
            passes += 2 + self.settings.reconstruction.passes
        return passes * len(self.calibration.batches())

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
            found.log_warnings()

    def prune_layer(self, index: int, layer: nn.Module, started: float) -> None:
        """Prune one decoder layer, write its weights, and record it in the ledger.

        Args:
            index: number of the layer.
            layer: the layer with its dense weights.
            started: start time of the work on it, by `time.perf_counter`.
        """
        self.steps_taken = 0
        tuned: dict[str, float] = {}
        in_step = self.settings.asymmetric and self.settings.sequential == "group"
        work = (AsymmetricLayerPass if in_step else LayerPass)(self, index, layer)
        for empty in all_zero(work.linears.values()):
            log.warning("%s is all zero before it is pruned", empty)
        records = work.prune()
        changed = [f"{record.name}.weight" for record in records]
        biased = {x.name for x in work.linears.values() if x.has_bias}
        shifted = [x.name for x in records if self.tasks[x.name].method.solver.shifts]
        changed += [f"{name}.bias" for name in shifted if name in biased]
        if work.tunes:
            tuned = work.tune()
            prefix = self.target.architecture.layer_name(index)
            changed = [f"{prefix}.{parameter}" for parameter, _ in layer.named_parameters()]
        self.tasks = left_dense(self.tasks, work.unseen)
        self._verify_kind(layer, list(work.linears.values()))
        self.target.commit(index, changed)
        self.finish_layer(index, records, tuned, work.unseen, started)

    def _verify_kind(self, layer: nn.Module, linears: Sequence[Linear]) -> None:
        """Check the zeros of every matrix in the first layer of each kind.

        So a fault that affects every layer of a kind ends the run early.
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
        """Record a layer in the ledger when all its files are safe on disk.

        Raises:
            VerificationError: the layer has collapsed, and the settings say to stop.
        """
        if self.calibration is not None and index + 1 < len(self.target.layers):
            self.calibration.advance(index + 1)
        self.settings.ranks.wait()  # all have stored their inputs of the next layer
        seconds = time.perf_counter() - started
        lost = collapsed([record for record in records if not self._removes_all(record)])
        more = {"reconstruction": tuned, "collapsed": lost, "unseen": tuple(unseen)}
        given = {name: value for name, value in more.items() if value}
        self.ledger.finish_layer(Layer(layer=index, seconds=seconds, linears=records, **given))
        self.settings.ranks.wait()  # the ledger of the first process has its line
        if self.calibration is not None:
            self.calibration.forget(index)
        # The last layer's forwards end early, because nothing reads their outputs.
        self.progress.step(self.steps_per_layer - self.steps_taken, note=f"layer {index}")
        name = self.target.architecture.layer_name(index)
        if lost and self.settings.on_collapse == "stop":
            raise collapse_error(name, lost)
        if lost and self.settings.ranks.first:
            log.warning("%s has collapsed: %s", name, format_collapsed(lost))

    def _removes_all(self, record: LinearRecord) -> bool:
        """Whether a task removes all columns of a linear: a removed block has not collapsed."""
        whole = self.tasks[record.name].method.pattern.whole_units
        return whole and record.pruned == record.shape[0] * record.shape[1]


class LayerPass:
    """The work on one decoder layer.

    Args:
        run: the run.
        index: the number of the layer.
        layer: the layer with its weights.

    Attributes:
        linears: all prunable linears of the layer, by their names within it.
        groups: the linears to prune, by shared input.
        unseen: the full names of linears that calibration did not reach; they stay unchanged.
    """

    def __init__(self, run: Run, index: int, layer: nn.Module) -> None:
        self.run, self.index, self.layer = run, index, layer
        self.tasks, self.settings = run.tasks, run.settings
        self.device, self.architecture = run.target.device, run.target.architecture
        self.linears = linears_of(layer, self.architecture.layer_name(index))
        self.pruned = [x for x in self.linears.values() if self.tasks[x.name].changes]
        names = gathering(self.tasks).backward
        self.own = stored_gradients(self.settings.work, index, names, self.device)
        self.groups = self.pruned_groups()
        self.gathered: dict[int, GroupStatistics] = {}
        self.shadows: dict[str, tuple[Tensor, Tensor]] = {}
        self.unseen: list[str] = []
        self.records: list[LinearRecord] = []

    def pruned_groups(self) -> list[list[Linear]]:
        """The linears to prune, by shared input, without groups that stay dense."""
        named: Groups = self.calibration.layouts[self.index].groups if self.run.statistics else ()
        groups = [[self.linears[name] for name in group] for group in named]
        return [g for g in groups if any(self.tasks[x.name].changes for x in g)]

    @property
    def tunes(self) -> bool:
        """Whether the layer is tuned: only if some of it is pruned."""
        return bool(self.pruned) and self.settings.tunes

    @property
    def last(self) -> bool:
        """Whether no layer follows."""
        return self.index + 1 == len(self.run.target.layers)

    @property
    def outputs_needed(self) -> bool:
        """Whether the outputs of the layer right after pruning are passed on."""
        return not self.last and not self.tunes

    @property
    def calibration(self) -> CalibrationStream:
        """The calibration stream."""
        assert self.run.calibration is not None
        return self.run.calibration

    def inputs(self, *, dense: bool = False) -> LayerInputs:
        """The hidden states of the pruned or the dense model at this layer."""
        matmuls, step = partial(self.settings.matmuls, self.device), self.step
        return self.calibration.layer_inputs(self.index, matmuls, step, dense=dense)

    def step(self) -> None:
        """Report one forward."""
        self.run.step(self.index)

    def prune(self) -> list[LinearRecord]:
        """Gather and prune, and propagate the layer unless tuning comes first."""
        if self.settings.tunes and not self.settings.asymmetric:
            dense = self.inputs(dense=True)
            dense.pass_through(self.layer)
            dense.states.advance(self.index + 1)
        if not self.run.statistics:
            weight_of = self._shadowed(lambda linear: linear.weight, {})
            for linear in self._reached(self.pruned, None):
                self.records += prune_group([linear], {}, self.own, self.tasks, weight_of)
            if self.outputs_needed and self.settings.tunes:
                self.inputs().pass_through(self.layer)
        elif self.settings.sequential == "group":
            self._prune_by_group()
        else:
            inputs = self.inputs()
            forwards = [
                partial(inputs.pass_one, self.layer, b, stores=False) for b in inputs.batches
            ]
            by_layer(self.groups, forwards, self._gather_exactly)
            self._prune_groups(range(len(self.groups)))
            if self.outputs_needed:
                inputs.pass_through(self.layer)
        return self.records

    def _reached(self, linears: Sequence[Linear], tokens: int | None) -> list[Linear]:
        """The linears that calibration reached. The others stay unchanged and are recorded."""
        left = [x for x in linears if not is_reached(self.architecture, x, tokens, self.own(x))]
        self.unseen += [x.name for x in left]
        self.pruned = [x for x in self.pruned if x.name not in self.unseen]
        return [x for x in linears if x.name not in self.unseen]

    def _prune_by_group(self) -> None:
        """Prune each group in one pass, when the inputs of all micro-batches are known."""
        halted = HaltedLayer(self.inputs(), self.layer, self.groups, stores=self.outputs_needed)
        with closing(halted):
            if self.calibration.batches():
                by_group(
                    halted.halting,
                    self._update,
                    self._prune_next,
                    outputs_needed=self.outputs_needed,
                )
            else:
                self._prune_without_forwards()

    def _update(self, index: int, group: int, x: Tensor) -> None:
        """Add the input of a group in one micro-batch."""
        self._statistics(group).update(x)

    def _prune_without_forwards(self) -> None:
        """Prune all groups of a process without micro-batches, in the order of the first one."""
        for _ in self.groups:
            self._prune_next(-1)

    def _prune_next(self, group: int) -> None:
        """Prune a group that all micro-batches of this process have reached.

        Only a forward shows which group comes next, so a process without any asks the first one.
        """
        if self.calibration.some_idle:
            group = self.settings.ranks.gather(group)[0]
        self._prune_groups([group])

    def _statistics(self, group: int) -> GroupStatistics:
        """The statistics of a group, created when its first input arrives.

        Not earlier, because a layer of many experts has many grams.
        """
        if group not in self.gathered:
            self.gathered[group] = self._new_statistics(group)
        return self.gathered[group]

    def _new_statistics(self, group: int) -> GroupStatistics:
        return GroupStatistics(self.run.statistics, self.groups[group], self.device)

    def _gather_exactly(self, group: int, x: Tensor) -> None:
        """Add the input of a group while a forward runs."""
        with exact_matmuls(self.device):
            self._statistics(group).update(x)

    def _prune_groups(self, groups: Sequence[int]) -> None:
        """Prune groups whose inputs are known from all micro-batches of all processes.

        Several processes solve different linears, and then exchange them.
        """
        ranks, found = self.settings.ranks, list[LinearRecord]()
        work = [(group, x) for group in groups for x in self._complete(group)]
        owned = owners([x.shape[0] * x.shape[1] ** 2 for _, x in work], ranks.count)
        for group in groups:
            own = {
                x.name: owner == ranks.rank
                for (of, x), owner in zip(work, owned, strict=True)
                if of == group
            }
            found += self._solve(group, own)
        if ranks.count > 1:
            found = exchange([x for _, x in work], owned, found, ranks)
        self.records += found

    def _complete(self, group: int) -> list[Linear]:
        """Complete the statistics of a group. Return its linears to prune."""
        statistics = self._statistics(group)
        statistics.merge(self.settings.ranks)
        linears = [x for x in self.groups[group] if self.tasks[x.name].changes]
        return self._reached(linears, statistics.tokens)

    def _solve(self, group: int, own: Mapping[str, bool]) -> list[LinearRecord]:
        """Prune the linears of a group that this process owns, and release its statistics."""
        statistics = self.gathered.pop(group)
        linears = [x for x in self.groups[group] if own.get(x.name)]
        if not (linears or (own and self.remasks)):
            return []
        shared, weight_of = self._fitted(group, statistics, linears)
        weight_of = self._shadowed(weight_of, shared)
        statistics.release()
        if self.remasks:
            for linear in self.groups[group]:
                if own.get(linear.name) is False:
                    weight_of(linear)  # keeps what tuning needs, though another process solves it

        def own_of(linear: Linear) -> dict[str, Tensor]:
            return {**statistics.own(linear), **self.own(linear)}

        found = prune_group(linears, shared, own_of, self.tasks, weight_of)
        return [record.model_copy(update={"tokens": statistics.tokens}) for record in found]

    def _fitted(
        self, group: int, statistics: GroupStatistics, linears: Sequence[Linear]
    ) -> tuple[dict[str, Tensor], Callable[[Linear], Tensor]]:
        """The complete statistics of a group, and what returns the weights to prune."""
        return statistics.value(), lambda linear: linear.weight

    # -- reconstruction -------------------------------------------------------------------------

    def _shadowed(
        self, weight_of: Callable[[Linear], Tensor], shared: Mapping[str, Tensor]
    ) -> Callable[[Linear], Tensor]:
        """Keep the dense weights and their inputs' norms, if masks may change later."""
        if not self.remasks:
            return weight_of

        def keep(linear: Linear) -> Tensor:
            weight = weight_of(linear)
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
        on_grid = any(task.method.solver.grid for task in self.tasks.values())
        return self.tunes and self.settings.reconstruction.remask and not on_grid

    def tune(self) -> dict[str, float]:
        """Tune a pruned layer and propagate it. Return its output error before and after."""
        calibration, how, ranks = (
            self.calibration,
            self.settings.reconstruction,
            self.settings.ranks,
        )
        before = self._output_error(stores=False)
        tuned, rounded = [], []
        for linear in self.pruned:
            shadow, norm = self.shadows.pop(linear.name, (None, linear.weight.new_ones(1)))
            task = self.tasks[linear.name]
            pattern, grid = task.method.pattern, task.method.solver.grid
            tuned.append(TunedWeight(linear, shadow, norm, pattern, task.sparsity, bool(grid)))
            if grid:
                rounded.append(RoundedWeight(linear, grid))
        count, at_once = len(calibration.windows), calibration.windows_at_once
        reconstruct(
            self.layer,
            tuned,
            draw_steps(count, at_once, how.passes, seed=self.index),
            self._examples,
            how,
            on_step=self.step,
            rounded=rounded,
            ranks=ranks,
        )
        for parameter in self.layer.parameters():
            ranks.share(parameter, 0)  # so no rounding of theirs can separate the processes
        after = self._output_error(stores=not self.last)
        return {"error_before": before, "error_after": after}

    def _examples(self, windows: Sequence[int]) -> list[tuple[Tensor, Tensor, LayerCall]]:
        """Inputs, targets and call of some windows: together, or one by one this process's."""
        own, outer = self.calibration.own, self.calibration.outer
        inputs, dense = self.inputs(), self.inputs(dense=True)
        mine = [w for w in windows if own.start <= w < own.stop]
        rows = [slice(w, w + 1) for w in mine]
        pairs = [(inputs.read(row), dense.read(row)) for row in rows]
        if self.settings.ranks.count > 1:
            calls = [outer.call(self.index, [w]) for w in mine]
            return [(*pair, call) for pair, call in zip(pairs, calls, strict=True)]
        read, targets = zip(*pairs, strict=True)
        return [(torch.cat(read), torch.cat(targets), outer.call(self.index, mine))]

    def _output_error(self, *, stores: bool) -> float:
        """The mean output error of the layer over all windows. It can also pass on the outputs."""
        total, inputs, dense = 0.0, self.inputs(), self.inputs(dense=True)
        for batch in inputs.batches:
            out, call = inputs.outputs(self.layer, batch), inputs.call(batch)
            target = call.states(dense.read(batch))
            total += float(output_error(call.states(out), target)) * len(out)
            if stores:
                inputs.write(batch, out)
        return sum(self.settings.ranks.gather(total)) / len(self.calibration.windows)


class AsymmetricLayerPass(LayerPass):
    """The work on one decoder layer whose outputs stay near those of the dense model.

    The dense model runs the layer in step. The target of a linear that writes to the residual
    stream is its dense output plus the current error of the stream: T = Wx + (H − Ĥ). Any other
    linear should return Wx, so its target is its dense input x (`sparsity.hessian.dense_target`).

    If the writers are known, only they have a target. They keep the stream near the dense one. In
    trials, fitting the other linears too doubled the cost and did not help. Experts have no target:
    they are fitted to their own dense weights.
    """

    def _prune_by_group(self) -> None:
        names = self.architecture.writers
        writers = [self.linears[name] for name in names if name in self.linears]
        self.writers = {writer.name for writer in writers}
        # copy before adding hooks, because the copy would have them too
        copied = dense_copy(self.layer, self.groups, writers, self.architecture.of_expert)
        self.dense = HaltedLayer(self.inputs(dense=True), *copied)
        self.changing = HaltedLayer(
            self.inputs(), self.layer, self.groups, writers, stores=self.outputs_needed
        )
        with closing(self.dense), closing(self.changing):
            if self.calibration.batches():
                by_group_with_dense(
                    self.changing.halting,
                    self.dense.halting,
                    self._gather,
                    self._prune_next,
                    outputs_needed=self.outputs_needed,
                )
                self.dense.halting.finish()
            else:
                self._prune_without_forwards()
        self.dense.inputs.states.advance(self.index + 1)

    def _writes(self, group: int) -> bool:
        """Whether a group is a linear that writes to the residual stream."""
        linears = self.dense.groups[group]
        return len(linears) == 1 and linears[0].name in self.writers

    def _new_statistics(self, group: int) -> GroupStatistics:
        linears = self.dense.groups[group]
        if not linears or (self.writers and not self._writes(group)):
            return super()._new_statistics(group)
        rows, columns = linears[0].shape
        return TargetStatistics(
            self.run.statistics,
            self.groups[group],
            self.device,
            rows if self.writers else columns,
            held_out=self.settings.choose_damping,
        )

    def _gather(self, index: int, group: int, x: Tensor, dense: Tensor | None) -> None:
        """Add the input of a group in one micro-batch, with its target if it has one."""
        statistics = self._statistics(group)
        if dense is None or not isinstance(statistics, TargetStatistics):
            statistics.update(x)
        else:
            statistics.add(x, self._target(index, group, dense))

    def _target(self, index: int, group: int, dense: Tensor) -> Tensor:
        """The target of a group for one micro-batch, from its input in the dense model."""
        if not self._writes(group):
            return dense
        stream = self.dense.before(index) - self.changing.before(index)
        earlier = self.dense.added(index) - self.changing.added(index)
        with self.dense.inputs.matmuls():
            out = dense.reshape(-1, dense.shape[-1]) @ self.dense.groups[group][0].weight.t()
        return out + (stream + earlier).reshape(out.shape)

    def _fitted(
        self, group: int, statistics: GroupStatistics, linears: Sequence[Linear]
    ) -> tuple[dict[str, Tensor], Callable[[Linear], Tensor]]:
        if not isinstance(statistics, TargetStatistics):
            return super()._fitted(group, statistics, linears)
        every, writer = self.groups[group], self._writes(group)
        damping_of = dict.fromkeys((x.name for x in every), self.settings.asymmetric_damping)
        if statistics.held is not None:
            changed = [x for x in every if self.tasks[x.name].changes]
            if solved := changed if self.remasks else linears:
                damping_of |= choose_dampings(statistics, solved, self.tasks, self.own, writer)
            statistics.take_in()
        shared = statistics.value()
        weights = {x: statistics.fitted(writer, x) for x in set(damping_of.values())}
        return shared, lambda linear: weights[damping_of[linear.name]](linear)
