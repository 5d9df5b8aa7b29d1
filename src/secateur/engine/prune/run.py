"""The loop of a pruning run, and the work on one decoder layer.

    first inputs ─► for each decoder layer: read it ─► gather, prune ─► next inputs ─► write, ledger
    one layer:      inputs ─► halt at each group ─► gather, prune ─► (tune) ─► outputs

A run has tasks (`tasks.py`: the sparsity of each linear) and settings (how the work is done).
Magnitude needs no calibration, and statistics of a backward through the dense model were gathered
before the run (`stream/gradients.py`): `LayerPass` prunes by these alone. `CalibratedLayerPass`
also passes calibration tokens through the layer (`stream/calibration_stream.py`). With
reconstruction, the dense model's hidden states pass as well: a pruned layer is tuned to the outputs
of the dense layer before its own outputs are passed on. Asymmetric fitting is in `asymmetric.py`.

A linear has collapsed when it has lost four fifths of the energy of its output, a relative error
of 0.9. Solvers that repair weights measure that error. For solvers that only set weights to zero,
the norms of the inputs give an estimate that assumes uncorrelated inputs (`lost_energy`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from secateur.allocator import reused_pages
from secateur.calibration.statistics import Sources, Statistic, statistics
from secateur.engine.prune.coverage import coverage, is_reached
from secateur.engine.prune.tasks import (
    COLLAPSED,
    LinearTask,
    Settings,
    Tasks,
    gathering,
    left_dense,
)
from secateur.engine.stream.calibration_stream import LayerInputs, OpenStream
from secateur.engine.stream.calls import kind_of
from secateur.engine.stream.halted_forwards import HaltedLayer, by_group, by_layer
from secateur.engine.stream.targets import Target, walk_layers
from secateur.errors import NumericalError, VerificationError, located
from secateur.models.architecture import Linear, linears_of
from secateur.models.checkpoint import not_finite
from secateur.parallel.ranks import Ranks, owners
from secateur.precision import exact_matmuls, full_float32
from secateur.progress import Progress
from secateur.runs.folder import Ledger
from secateur.runs.records import Layer, LinearRecord
from secateur.sparsity.patterns import misplaced
from secateur.sparsity.solvers import Solution
from secateur.types import STORED, Mask, Statistics, Weight

log = logging.getLogger(__name__)


@dataclass
class Run:
    """One pruning run over all decoder layers of a target.

    Attributes:
        target: the model.
        tasks: the task of each linear (`tasks_of`); linears that calibration does not reach become
            dense during the run.
        settings: how the work is done.
        ledger: record of finished layers.
        progress: receives every step.
        opened: the calibration stream with the hidden states at the first layer to prune; None
            where no forward is needed.
        layer_pass: makes the work on a layer; None for one without forwards.
    """

    target: Target
    tasks: Tasks
    settings: Settings
    ledger: Ledger
    progress: Progress
    opened: OpenStream | None = None
    layer_pass: Callable[[Run, int, nn.Module], LayerPass] | None = None
    steps_taken: int = field(default=0, init=False)
    verified: set[Hashable] = field(default_factory=set, init=False)

    @property
    def steps_per_layer(self) -> int:
        """Progress steps in one layer: the forwards of micro-batches, or 1 without any."""
        if self.opened is None:
            return 1
        passes = 1 if self.settings.sequential == "group" else 2
        passes += self.settings.dense_needed
        if self.settings.tunes:
            passes += 2 + self.settings.reconstruction.passes
        return passes * len(self.opened.batches())

    @torch.no_grad()
    @full_float32()
    def execute(self, done: int = 0) -> None:
        """Prune every layer from number `done` on."""
        count = len(self.target.layers)
        for entry in self.ledger.layers:
            self.tasks = left_dense(self.tasks, entry.unseen)
        self.progress.start("pruning", self.steps_per_layer * (count - done))
        with reused_pages():
            started = time.perf_counter()  # before the first layer is read
            for index, layer in walk_layers(self.target, range(done, count)):
                self.prune_layer(index, layer, started)
                started = time.perf_counter()
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
        work = (self.layer_pass or LayerPass)(self, index, layer)
        for linear in work.linears.values():
            if not linear.weight.any():
                log.warning("%s is all zero before it is pruned", linear.name)
        records: list[LinearRecord] = []
        with closing(work.gather()) as gathered:
            for groups in gathered:
                records += work.prune(groups)
        changed = [f"{record.name}.weight" for record in records]
        biased = {x.name for x in work.linears.values() if x.has_bias}
        shifted = [x.name for x in records if self.tasks[x.name].method.solver.shifts]
        changed += [f"{name}.bias" for name in shifted if name in biased]
        tuned = work.tune()
        if tuned:
            prefix = self.target.architecture.layer_name(index)
            changed = [f"{prefix}.{parameter}" for parameter, _ in layer.named_parameters()]
        self.tasks = left_dense(self.tasks, work.unseen)
        self._verify_kind(layer, list(work.linears.values()))
        self.target.commit(index, changed)
        self.finish_layer(index, records, tuned, work.unseen, started)

    def step(self, index: int) -> None:
        """Report one step within a layer."""
        self.steps_taken += 1
        self.progress.step(note=f"layer {index}")

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
        if self.opened is not None and index + 1 < len(self.target.layers):
            self.opened.advance(index + 1)
        self.settings.ranks.wait()  # all have stored their inputs of the next layer
        seconds = time.perf_counter() - started
        lost = collapsed([record for record in records if not self._removes_all(record)])
        more = {"reconstruction": tuned, "collapsed": lost, "unseen": tuple(unseen)}
        given = {name: value for name, value in more.items() if value}
        self.ledger.finish_layer(Layer(layer=index, seconds=seconds, linears=records, **given))
        self.settings.ranks.wait()  # the ledger of the first process has its line
        if self.opened is not None:
            self.opened.forget(index)
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
    """The work on one decoder layer, without forwards.

    Args:
        run: the run.
        index: the number of the layer.
        layer: the layer with its weights.

    Attributes:
        linears: all prunable linears of the layer, by their names within it.
        pruned: the linears to prune.
        stored: returns what was gathered of a linear before the run.
        unseen: the full names of linears that calibration did not reach; they stay unchanged.
    """

    def __init__(self, run: Run, index: int, layer: nn.Module) -> None:
        self.index, self.layer, self.tasks, self.settings = index, layer, run.tasks, run.settings
        self.device, self.architecture = run.target.device, run.target.architecture
        self.linears = linears_of(layer, self.architecture.layer_name(index))
        self.pruned = [x for x in self.linears.values() if self.tasks[x.name].changes]
        self.stored: Callable[[Linear], dict[str, Tensor]] = lambda linear: {}
        if names := gathering(self.tasks).backward:
            from secateur.engine.stream.gradients import stored_gradients

            self.stored = stored_gradients(self.settings.work, index, names, self.device)
        self.unseen: list[str] = []

    def gather(self) -> Generator[Sequence[int], None, None]:
        """Yield numbers of groups when all that pruning them needs is known."""
        yield range(len(self.pruned))

    def prune(self, groups: Sequence[int]) -> list[LinearRecord]:
        """Prune linears, each for itself, by their weights and by stored statistics."""
        linears = self._reached([self.pruned[number] for number in groups], None)
        weights = self._weights(lambda linear: linear.weight, {})
        return [
            record
            for linear in linears
            for record in prune_group([linear], {}, self.stored, self.tasks, weights)
        ]

    def tune(self) -> dict[str, float]:
        """Tune the pruned layer if the settings say so. Return its error before and after."""
        return {}

    def _weights(
        self, weight_of: Callable[[Linear], Tensor], shared: Mapping[str, Tensor]
    ) -> Callable[[Linear], Tensor]:
        """What returns the weights to prune."""
        return weight_of

    def _reached(self, linears: Sequence[Linear], tokens: int | None) -> list[Linear]:
        """The linears that calibration reached. The others stay unchanged and are recorded."""
        experts = [x for x in linears if self.architecture.of_expert(x.name)]
        left = [x.name for x in experts if not is_reached(tokens, self.stored(x))]
        self.unseen += left
        return [x for x in linears if x.name not in left]


class CalibratedLayerPass(LayerPass):
    """The work on one decoder layer through which calibration tokens pass.

    Attributes:
        groups: the linears to prune, by shared input.
        sources: sources of the statistics to gather, by name; empty if the layer is only tuned.
        last: whether no layer follows.
        tuning: tunes the layer after pruning; None without tuning.
    """

    def __init__(self, run: Run, index: int, layer: nn.Module) -> None:
        super().__init__(run, index, layer)
        assert run.opened is not None
        self.run, self.opened, self.stream = run, run.opened, run.opened.stream
        self.sources = gathering(run.tasks, asymmetric=self.settings.asymmetric).forward
        self.last = index + 1 == len(run.target.layers)
        self.groups = self.pruned_groups()
        self.gathered: dict[int, GroupStatistics] = {}
        self.tuning: LayerTuning | None = None
        if self.settings.tunes and self.pruned:
            from secateur.engine.prune.reconstruction import LayerTuning

            dense = self.inputs(dense=True)
            self.tuning = LayerTuning(layer, self.tasks, self.settings, self.inputs(), dense)

    def pruned_groups(self) -> list[list[Linear]]:
        """The linears to prune, by shared input, without groups that stay dense."""
        named = self.stream.layouts[self.index].groups if self.sources else ()
        groups = [[self.linears[name] for name in group] for group in named]
        return [g for g in groups if any(self.tasks[x.name].changes for x in g)]

    @property
    def outputs_needed(self) -> bool:
        """Whether the outputs of the layer right after pruning are passed on."""
        return not self.last and self.tuning is None

    def inputs(self, *, dense: bool = False) -> LayerInputs:
        """The hidden states of the pruned or the dense model at this layer."""
        matmuls = partial(self.settings.matmuls, self.device)
        step = partial(self.run.step, self.index)
        return self.opened.layer_inputs(self.index, matmuls, step, dense=dense)

    def gather(self) -> Generator[Sequence[int], None, None]:
        """Pass all windows through the layer; yield groups when their statistics are complete.

        The outputs are passed on unless tuning comes first.
        """
        inputs = self.inputs()
        if self.settings.tunes:
            self._pass_dense()
        if self.sources and self.settings.sequential == "group":
            yield from self._gather_by_group()
            return
        if self.sources:
            forwards = [
                partial(inputs.pass_one, self.layer, b, stores=False) for b in inputs.batches
            ]
            by_layer(self.groups, forwards, self._gather_exactly)
            yield range(len(self.groups))
        else:
            yield from super().gather()
        if self.outputs_needed:
            inputs.pass_through(self.layer)

    def _pass_dense(self) -> None:
        """Pass the windows of the dense model through the dense layer."""
        dense = self.inputs(dense=True)
        dense.pass_through(self.layer)
        dense.states.advance(self.index + 1)

    def _gather_by_group(self) -> Iterator[Sequence[int]]:
        """Yield each group in one pass, when the inputs of all micro-batches are known."""
        halted = HaltedLayer(self.inputs(), self.layer, self.groups, stores=self.outputs_needed)
        with closing(halted):
            arrived = by_group(halted, self._update, outputs_needed=self.outputs_needed)
            yield from self._in_order(arrived)

    def _update(self, index: int, group: int, x: Tensor) -> None:
        """Add the input of a group in one micro-batch."""
        self._statistics(group).update(x)

    def _in_order(self, arrived: Iterable[int]) -> Iterator[Sequence[int]]:
        """Groups that all micro-batches of all processes have reached.

        Only a forward shows which group comes next, so a process without any asks the first one.
        """
        for group in arrived if self.stream.batches() else [-1] * len(self.groups):
            some_idle = self.stream.some_idle
            yield [self.settings.ranks.gather(group)[0] if some_idle else group]

    def _statistics(self, group: int) -> GroupStatistics:
        """The statistics of a group, created when its first input arrives.

        Not earlier, because a layer of many experts has many grams.
        """
        if group not in self.gathered:
            self.gathered[group] = self._new_statistics(group)
        return self.gathered[group]

    def _new_statistics(self, group: int) -> GroupStatistics:
        return GroupStatistics(self.sources, self.groups[group], self.device)

    def _gather_exactly(self, group: int, x: Tensor) -> None:
        """Add the input of a group while a forward runs."""
        with exact_matmuls(self.device):
            self._statistics(group).update(x)

    def prune(self, groups: Sequence[int]) -> list[LinearRecord]:
        """Prune groups whose inputs are known from all micro-batches of all processes.

        Several processes solve different linears, and then exchange them.
        """
        if not self.sources:
            return super().prune(groups)
        ranks, found = self.settings.ranks, list[LinearRecord]()
        work = {group: self._complete(group) for group in groups}
        every = [x for linears in work.values() for x in linears]
        owned = owners([x.shape[0] * x.shape[1] ** 2 for x in every], ranks.count)
        mine = {x.name for x, owner in zip(every, owned, strict=True) if owner == ranks.rank}
        for group, linears in work.items():
            statistics = self.gathered.pop(group)
            solved = [x for x in linears if x.name in mine]
            if not (solved or (linears and self._remasks)):
                continue
            shared, weight_of = self._fitted(group, statistics)
            weight_of = self._weights(weight_of, shared)
            statistics.release()
            if self._remasks:  # keeps what tuning needs, though another process solves it
                for linear in (x for x in linears if x.name not in mine):
                    weight_of(linear)
            own = partial(self._own, statistics)
            records = prune_group(solved, shared, own, self.tasks, weight_of)
            found += [x.model_copy(update={"tokens": statistics.tokens}) for x in records]
            del statistics, shared, weight_of, own  # before the next group's values are made
        return exchange(every, owned, found, ranks) if ranks.count > 1 else found

    def _complete(self, group: int) -> list[Linear]:
        """Complete the statistics of a group. Return its linears to prune."""
        statistics = self._statistics(group)
        statistics.merge(self.settings.ranks)
        linears = [x for x in self.groups[group] if self.tasks[x.name].changes]
        return self._reached(linears, statistics.tokens)

    def _fitted(
        self, group: int, statistics: GroupStatistics
    ) -> tuple[dict[str, Tensor], Callable[[Linear], Tensor]]:
        """The complete statistics of a group, and what returns the weights to prune."""
        return statistics.value(), lambda linear: linear.weight

    def _own(self, statistics: GroupStatistics, linear: Linear) -> dict[str, Tensor]:
        """The statistics that a linear has for itself."""
        return {**statistics.own(linear), **self.stored(linear)}

    @property
    def _remasks(self) -> bool:
        """Whether tuning may change the masks."""
        return self.tuning is not None and self.tuning.remasks

    def _weights(
        self, weight_of: Callable[[Linear], Tensor], shared: Mapping[str, Tensor]
    ) -> Callable[[Linear], Tensor]:
        return self.tuning.keeping(weight_of, shared) if self.tuning else weight_of

    def tune(self) -> dict[str, float]:
        """Tune the pruned layer if the settings say so, and propagate it."""
        pruned = [x for x in self.pruned if x.name not in self.unseen]
        if self.tuning and pruned:
            return self.tuning.execute(pruned, stores=not self.last)
        if self.tuning and not self.last:
            self.inputs().pass_through(self.layer)
        return {}


class GroupStatistics:
    """Running statistics of a group of linears that share an input.

    Args:
        sources: sources of the statistics, by their names.
        linears: the linears of the group.
        device: device of the sums.

    Attributes:
        tokens: number of inputs so far.
        running: the statistics that all linears of the group share, by name.
        apart: the others, by the name of the linear and that of the statistic.
    """

    def __init__(self, sources: Sources, linears: Sequence[Linear], device: torch.device) -> None:
        self.sources, self.linears, self.tokens = sources, linears, 0
        shared = [name for name, source in sources.items() if source.shared]
        own = sources.keys() - shared
        self.running = {name: statistics[name](linears[0].shape, device) for name in shared}
        self.apart = {
            x.name: {name: statistics[name](x.shape, device) for name in sorted(own)}
            for x in linears
        }

    def update(self, x: Tensor) -> None:
        """Add the inputs of one micro-batch, with any leading shape."""
        flat = x.reshape(-1, x.shape[-1])
        self.tokens += len(flat)
        for name, statistic in self.running.items():
            statistic.update(self.sources[name].rows(self.linears[0], flat))
        for linear in self.linears:
            for name, statistic in self.apart[linear.name].items():
                statistic.update(self.sources[name].rows(linear, flat))

    def every(self) -> list[Statistic]:
        """All statistics, in an order that is the same in every process."""
        return [*self.running.values(), *(x for own in self.apart.values() for x in own.values())]

    def merge(self, ranks: Ranks) -> None:
        """Add up the statistics that the processes have gathered, each from its own windows.

        Each sum passes alone, so no process holds more than one copy of one sum besides its own.
        """
        self.tokens = sum(ranks.gather(self.tokens))
        for statistic in self.every():
            ranks.total(statistic.total)

    def value(self) -> dict[str, Tensor]:
        """The statistics that the group shares.

        Raises:
            NumericalError: the inputs overflowed; the message names the first linear that reads
                them.
        """
        return _values(self.linears[0], self.running)

    def own(self, linear: Linear) -> dict[str, Tensor]:
        """The statistics that a linear of the group has for itself.

        Raises:
            NumericalError: its numbers overflowed.
        """
        return _values(linear, self.apart[linear.name])

    def release(self) -> None:
        """Forget the sums. Values that were read stay."""
        self.running.clear()


def _values(linear: Linear, gathered: Mapping[str, Statistic]) -> dict[str, Tensor]:
    with located(linear.name):
        return {name: statistic.value() for name, statistic in gathered.items()}


def prune_group(
    linears: Sequence[Linear],
    shared: Mapping[str, Tensor],
    own: Callable[[Linear], Mapping[str, Tensor]],
    tasks: Mapping[str, LinearTask],
    fitted: Callable[[Linear], Tensor] = lambda linear: linear.weight,
) -> list[LinearRecord]:
    """Prune linears that share an input.

    Args:
        linears: the linears to work on.
        shared: statistics of their input.
        own: returns the statistics of a linear's own gradients.
        tasks: tasks of the linears, by name. Their methods differ only in the pattern.
        fitted: returns the weight [out, in] to prune in place of a linear's own.
    """
    if not linears:
        return []
    with located(linears[0].name):
        prepared = tasks[linears[0].name].method.solver.prepare(shared)
    records = []
    for linear in linears:
        started, task = time.perf_counter(), tasks[linear.name]
        weight = fitted(linear)
        known = {**shared, **own(linear), STORED: linear.weight}
        with located(linear.name):
            solution = task.method.solve(weight, prepared, known, task.sparsity)
        lost = lost_energy(weight, solution.mask, shared) if solution.error is None else None
        linear.assign(solution.weight)
        if solution.shift is not None:
            linear.shift(solution.shift)
        records.append(_verify(linear, task, solution, lost, started))
    return records


def _verify(
    linear: Linear, task: LinearTask, solution: Solution, lost: float | None, started: float
) -> LinearRecord:
    """Compare the stored zeros of a linear with the number that its pattern requires."""
    weight = linear.weight
    expected = task.method.pattern.pruned(linear.shape, task.sparsity)
    pruned = weight.numel() - int(solution.mask.sum())
    zeros = weight.numel() - int(torch.count_nonzero(weight))
    if pruned != expected or zeros < expected:
        raise VerificationError(
            f"{linear.name} should have {expected} zeros; the mask has {pruned}, the weight "
            f"{zeros}",
            where=linear.name,
            remedy="this is a fault in secateur or in a plug-in; please report it",
        )
    check_finite([(f"{linear.name}.weight", weight)])
    return LinearRecord(
        name=linear.name,
        shape=linear.shape,
        asked=task.sparsity,
        pruned=pruned,
        zeros=zeros,
        error=solution.error,
        lost=lost,
        seconds=time.perf_counter() - started,
    )


def exchange(
    linears: Sequence[Linear], owners: Sequence[int], own: Sequence[LinearRecord], ranks: Ranks
) -> list[LinearRecord]:
    """Give every process the pruned linears of the others. Return the records of all.

    Args:
        linears: the linears that the processes have pruned.
        owners: the process that has pruned each.
        own: the records of this process.
        ranks: the processes.
    """
    gathered = ranks.gather([record.to_json() for record in own])
    by_name = {entry["name"]: entry for entries in gathered for entry in entries}
    for linear, owner in zip(linears, owners, strict=True):
        for parameter in linear.module.parameters(recurse=False):
            ranks.share(parameter, owner)
    return [LinearRecord.model_validate(by_name[linear.name]) for linear in linears]


def lost_energy(weight: Weight, mask: Mask, statistics: Statistics) -> float | None:
    """The share of its output's energy that a linear loses; None without statistics of the inputs.

    lost = Σ over pruned w² ‖X_j‖² / Σ over all w² ‖X_j‖²
    """
    if "column_norm" in statistics:
        power = statistics["column_norm"].square()
    elif "gram" in statistics:
        power = statistics["gram"].diagonal()
    else:
        return None
    energy = weight.detach().float().square() * power
    total = float(energy.sum())
    return float(energy.masked_fill(mask, 0.0).sum()) / total if total > 0 else None


def collapsed(records: Sequence[LinearRecord]) -> dict[str, float]:
    """The collapsed linears, with their lost energy."""
    known = {r.name: r.lost if r.error is None else r.error for r in records}
    # an error that is not a number counts as the largest
    return {n: lost for n, lost in known.items() if lost is not None and not lost <= COLLAPSED}


def format_collapsed(lost: Mapping[str, float]) -> str:
    """Describe the collapsed linears of a layer in one line."""
    return ", ".join(f"{name} lost {share:.1%} of its output" for name, share in lost.items())


def collapse_error(layer: str, lost: Mapping[str, float]) -> VerificationError:
    """The error that ends a run after a collapsed layer."""
    return VerificationError(
        f"the layer has collapsed: {format_collapsed(lost)}",
        where=layer,
        remedy="start anew with --restart and a lower --sparsity, or less for this layer "
        f"(--overrides '{layer}.*=0.3'); the finished layers were kept, and --resume "
        "with --on-collapse warn goes on with the same sparsity",
    )


def check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights in memory that are NaN or infinite.

    Raises:
        NumericalError: there are such values; the message names the tensor and their number.
    """
    for name, tensor in tensors:
        if bad := not_finite(tensor):
            raise NumericalError(
                f"{bad} of {tensor.numel()} weights are NaN or infinite",
                where=name,
                remedy="the model is damaged: load or make it again",
            )


def refuse_all_zero(target: Target) -> None:
    """Refuse a model without a weight to prune. Reads up to the first matrix that has one.

    Raises:
        NumericalError: every matrix of every decoder layer is zero.
    """
    count = 0
    for index, layer in walk_layers(target):
        linears = linears_of(layer, target.architecture.layer_name(index)).values()
        if any(linear.weight.any() for linear in linears):
            return
        count += len(linears)
    if count:
        raise NumericalError(
            f"all {count} matrices of the decoder are zero",
            where=target.architecture.layers_path,
            remedy="the checkpoint holds no trained weights: get it again",
        )
