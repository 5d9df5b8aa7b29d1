"""One decoder layer is pruned: score → mask → solve, group by group.

Two things vary. The *order* in which the inputs of groups arrive is a generator of groups:

    weights_alone         no inputs: every linear is a group of its own
    group_by_group        forwards halt at each group, and continue with its pruned weights
    whole_layer           a first pass shows the inputs of all groups, a second one the outputs
    DenseTwin.arrivals    as `group_by_group`, in step with the dense layer (`dense_twin.py`)

The *target* of a group is in its statistics: the outputs of its own weights on the inputs of the
pruned model, or those of the dense twin (`GroupStatistics.weights`).
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.calibration.statistics import CrossGram, GroupStatistics, Sources
from secateur.engine.prune.checks import counted_zeros
from secateur.engine.prune.coverage import is_reached
from secateur.engine.prune.tasks import LinearTask, Settings, Tasks, gathering, solved_at_once
from secateur.engine.stream.calibration_stream import LayerInputs, OpenStream
from secateur.engine.stream.halted_forwards import (
    Arrival,
    GroupBatch,
    HaltedLayer,
    batches_of,
    by_group,
    by_layer,
)
from secateur.errors import NumericalError, located
from secateur.machine import exact_matmuls
from secateur.models.architecture import Linear, linears_of
from secateur.models.block_files import StoredBlocks
from secateur.models.targets import Target
from secateur.parallel.ranks import ALONE, Ranks, owners
from secateur.progress import Progress
from secateur.quantization.blocks import BlockGrid
from secateur.runs.records import LinearRecord
from secateur.sparsity.shared_rows import ROWS_TOGETHER
from secateur.sparsity.solvers import Solution
from secateur.types import STORED, Mask, Statistics, Weight

if TYPE_CHECKING:
    from secateur.engine.prune.reconstruction import LayerTuning

log = logging.getLogger(__name__)

Arrivals = Generator[list[GroupStatistics], None, None]
"""Groups whose inputs are known from all micro-batches of this process. Before the next ones are
yielded, the weights of these may change."""


_SENT_BYTES = 2**26
"""Parameters are joined up to this size when processes exchange them."""


class OpenLayer:
    """A decoder layer with its weights, and how calibration passes through it.

    Args:
        module: the layer.
        index: its number.
        target: the model.
        tasks: the tasks of all linears.
        settings: how the work is done.
        opened: the hidden states; None where no forward is needed.
        progress: receives every forward.

    Attributes:
        linears: all prunable linears of the layer, by their names within it.
        pruned: the linears to prune.
        sources: sources of the statistics to gather, by name.
        batches: the linears to prune, by what arrives together; none without sources.
        stored: returns what was gathered of a linear before the run.
        unseen: the full names of linears that calibration did not reach; they stay unchanged.
        blocks: of matrices that were rounded to a type of llama.cpp, by parameter.
        tuning: tunes the layer after pruning; None without tuning.
        steps_taken: number of forwards so far.
    """

    def __init__(
        self,
        module: nn.Module,
        index: int,
        target: Target,
        tasks: Tasks,
        settings: Settings,
        opened: OpenStream | None,
        progress: Progress,
    ) -> None:
        self.module, self.index, self.tasks, self.settings = module, index, tasks, settings
        self.opened, self.progress, self.steps_taken = opened, progress, 0
        self.architecture, self.device = target.architecture, target.device
        self.name, self.last = self.architecture.layer_name(index), index + 1 == len(target.layers)
        self.linears = linears_of(module, self.name)
        self.pruned = [x for x in self.linears.values() if tasks[x.name].changes]
        needed = gathering(tasks, asymmetric=settings.asymmetric)
        self.sources = {} if opened is None else needed.forward
        self.batches = batches_of(module, self.pruned_groups())
        self.stored: Callable[[Linear], dict[str, Tensor]] = lambda linear: {}
        if needed.backward:
            from secateur.engine.stream.layerwise import stored_gradients

            self.stored = stored_gradients(settings.work, index, needed.backward, self.device)
        self.unseen: list[str] = []
        self.blocks: dict[str, StoredBlocks] = {}
        self.tuning: LayerTuning | None = None
        if settings.tunes and self.pruned:
            from secateur.engine.prune.reconstruction import LayerTuning

            dense = self.inputs(dense=True)
            self.tuning = LayerTuning(module, tasks, settings, self.inputs(), dense)

    def pruned_groups(self) -> list[list[Linear]]:
        """The linears to prune, by shared input, without groups that stay dense."""
        if self.opened is None or not self.sources:
            return []
        layout = self.opened.stream.layouts[self.index]
        groups = [[self.linears[name] for name in group] for group in layout.groups]
        return [g for g in groups if any(self.tasks[x.name].changes for x in g)]

    @property
    def ranks(self) -> Ranks:
        """The processes that solve different linears. Without inputs every process solves all."""
        return self.settings.ranks if self.sources else ALONE

    @property
    def passes_on(self) -> bool:
        """Whether the outputs of the layer right after pruning enter the next one."""
        return self.opened is not None and not self.last and self.tuning is None

    def inputs(self, *, dense: bool = False) -> LayerInputs:
        """The hidden states of the pruned or the dense model at this layer."""
        assert self.opened is not None
        matmuls = partial(self.settings.matmuls, self.device)
        return self.opened.layer_inputs(self.index, matmuls, self.step, dense=dense)

    def step(self) -> None:
        """Report one forward."""
        self.steps_taken += 1
        self.progress.step(note=f"layer {self.index}")

    def complete(self, group: GroupStatistics) -> list[Linear]:
        """Add up what all processes have gathered of some groups. Return their linears to prune.

        Linears that calibration did not reach stay unchanged and are recorded.
        """
        group.merge(self.ranks)
        reached = []
        for number, linears in enumerate(group.groups):
            tokens = group.tokens[number] if self.sources else None
            changed = [x for x in linears if self.tasks[x.name].changes]
            experts = [x for x in changed if self.architecture.of_expert(x.name)]
            left = [x.name for x in experts if not is_reached(tokens, self.stored(x))]
            self.unseen += left
            reached.append([x for x in changed if x.name not in left])
        if group.batch:
            group.keep([number for number, linears in enumerate(reached) if linears])
        return [x for linears in reached for x in linears]

    def sharing(self, group: GroupStatistics, linears: Sequence[Linear]) -> Ranks:
        """The processes that solve these linears of a group together, each some of their rows.

        It is one alone where rows are not independent, or too few for all processes.
        """
        least = ROWS_TOGETHER * self.ranks.count
        together = not group.batch and self.remasking is None and bool(self.sources)
        if together and all(self.tasks[x.name].method.by_rows for x in linears):
            return self.ranks if all(x.shape[0] >= least for x in linears) else ALONE
        return ALONE

    @property
    def remasking(self) -> LayerTuning | None:
        """The tuning, if it also chooses the masks anew."""
        return self.tuning if self.tuning is not None and self.tuning.remasks else None

    def solved(
        self, group: GroupStatistics, linears: Sequence[Linear], mine: Collection[str]
    ) -> Iterator[Solved]:
        """Solve linears that share an input, or those of a batch of experts.

        Args:
            group: the statistics of the inputs, complete.
            linears: the linears to prune. Their methods differ only in the pattern.
            mine: names of the linears that this process solves.
        """
        names, tuning = {x.name for x in linears}, self.remasking
        # tuning also needs the shadow weights of linears that another process solves
        if not names or (tuning is None and names.isdisjoint(mine)):
            return iter(())
        tasks = {name: self.tasks[name] for name in names.intersection(mine)}
        # Values take the place of the sums, which `release` then frees, before the solver needs
        # memory.
        solving = Solving(group, self.settings, self.stored, self.sharing(group, linears))
        group.release()
        if tuning is not None:
            for number, own in enumerate(group.groups):
                for linear in (x for x in own if x.name in names):
                    known = solving.statistics(number)
                    tuning.keep(linear, solving.weights_of([linear])[0], known)
        return solving.solve(tasks)

    def agreed(self, arrived: Iterable[int]) -> Iterator[int]:
        """The numbers of batches that all micro-batches of all processes have reached.

        Only a forward shows which batch comes next, so a process without any asks the first one.
        """
        assert self.opened is not None
        stream = self.opened.stream
        for number in arrived if stream.batches() else [-1] * len(self.batches):
            yield self.ranks.gather(number)[0] if stream.some_idle else number


def prune_layer(layer: OpenLayer, arrivals: Arrivals) -> list[LinearRecord]:
    """Prune one decoder layer, on the inputs that the pruned model has.

    Several processes solve different rows of a linear, or different linears, and exchange them.

    Args:
        layer: the layer.
        arrivals: its groups, in the order in which their inputs arrive.
    """
    ranks, records = layer.ranks, list[LinearRecord]()
    with closing(arrivals):
        for groups in arrivals:
            waiting = [(group, layer.complete(group)) for group in groups]
            groups.clear()  # so a group leaves memory when it is solved
            every = [x for _, linears in waiting for x in linears]
            alone = [x for pair in waiting if layer.sharing(*pair).count == 1 for x in pair[1]]
            # solving takes about out · in² operations
            numbers = owners([x.shape[0] * x.shape[1] ** 2 for x in alone], ranks.count)
            owned = {x.name: owner for x, owner in zip(alone, numbers, strict=True)}
            mine = {x.name for x in every if owned.get(x.name, ranks.rank) == ranks.rank}
            found: list[LinearRecord] = []
            while waiting:
                solved = layer.solved(*waiting.pop(0), mine)
                found += [record for one in solved for record in _recorded(layer, one)]
            if ranks.count > 1:
                found = _exchanged(every, owned, found, ranks)
                _exchange_blocks(layer, owned)
            by_name = {record.name: record for record in found}
            records += [by_name[x.name] for x in every]
    return records


class Solved(NamedTuple):
    """Linears that were solved at once, all with the same task but for the name.

    Attributes:
        linears: one, or the same linear of some experts.
        tokens: the number of inputs of each.
        weight: what was pruned in place of their own weights, [out, in] or [batch, out, in].
        statistics: of their inputs.
        solution: the result.
        seconds: that it took.
    """

    linears: list[Linear]
    tokens: list[int]
    weight: Tensor
    statistics: Statistics
    solution: Solution
    seconds: float


def _wanted(linears: Sequence[Linear], tasks: Tasks) -> dict[int, LinearTask]:
    """The tasks of the linears of a group, by their places in it."""
    return {place: tasks[x.name] for place, x in enumerate(linears) if x.name in tasks}


class Solving:
    """Solves linears for which statistics were gathered together.

    Those that share an input are solved one by one, those of experts many at once.

    Args:
        group: what was gathered, complete. Its sums may be released afterwards.
        settings: how the work is done.
        stored: returns what was gathered of a linear before the run.
        ranks: the processes that solve each linear together.

    Attributes:
        weights_of: the weights to prune in place of linears' own, [linears, out, in].
    """

    def __init__(
        self,
        group: GroupStatistics,
        settings: Settings,
        stored: Callable[[Linear], dict[str, Tensor]],
        ranks: Ranks = ALONE,
    ) -> None:
        self.group, self.settings, self.stored, self.ranks = group, settings, stored, ranks
        self.values = group.value()
        self.weights_of = group.weights(settings.asymmetric_damping)

    def statistics(self, numbers: int | list[int]) -> Statistics:
        """The statistics of the input of a group, or of some groups of a batch."""
        if not self.group.batch:
            return self.values
        return {name: x[numbers] for name, x in self.values.items()}

    def _together(self, tasks: Tasks) -> Iterator[list[int]]:
        """The numbers of the groups that are solved at once: of experts, as many as fit.

        Linear by linear, they have the same method and sparsity.
        """
        alike: dict[object, list[int]] = {}
        for number, linears in enumerate(self.group.groups):
            if wanted := _wanted(linears, tasks):
                kinds = ((place, x.method, x.sparsity) for place, x in wanted.items())
                alike.setdefault(tuple(kinds), []).append(number)
        for numbers in alike.values():
            step, linears = 1, self.group.groups[numbers[0]]
            if self.group.batch:
                same, device = _wanted(linears, tasks).values(), linears[0].weight.device
                step = min(solved_at_once(task, self.settings, device) for task in same)
            yield from (numbers[start : start + step] for start in range(0, len(numbers), step))

    def solve(self, tasks: Tasks, numbers: Sequence[int] = ()) -> Iterator[Solved]:
        """Score → mask → solve.

        Args:
            tasks: those of the linears to solve; others of the groups stay as they are.
            numbers: of groups to solve at once. Without any: of all groups as many as fit.

        Raises:
            NumericalError: a linear cannot be solved; the message names it.
        """
        for some in [list(numbers)] if numbers else self._together(tasks):
            group, wanted = self.group, _wanted(self.group.groups[some[0]], tasks)
            device = group.linears[0].weight.device
            places = iter((device, torch.device("cpu")))  # on the host only for want of memory
            here = next(places)
            batched = group.batch and all(task.method.batched for task in wanted.values())
            started, statistics = time.perf_counter(), self.statistics(some if batched else some[0])
            while wanted:
                try:
                    there = {name: x.to(here) for name, x in statistics.items()}
                    method = next(iter(wanted.values())).method  # others differ in the pattern only
                    with located(group.groups[some[0]][0].name):
                        prepared = method.prepare(there, self.ranks)
                    for place, task in list(wanted.items()):
                        linears = [group.groups[number][place] for number in some]
                        weight, own = self._own(linears, task, batched=batched)
                        own = {name: x.to(here) for name, x in own.items()}
                        given = weight.to(here), prepared, {**there, **own}, task.sparsity
                        with located(task.name):
                            found = task.method.solve(*given, self.ranks)
                        found = Solution._make(x if x is None else x.to(device) for x in found)
                        tokens = [group.tokens[i] for i in some]
                        seconds = time.perf_counter() - started
                        yield Solved(linears, tokens, weight, statistics, found, seconds)
                        started = time.perf_counter()
                        del wanted[place]
                except NumericalError:
                    for number in some if len(some) > 1 else []:
                        list(self.solve(tasks, [number]))  # the one at fault has a name
                    raise
                except torch.OutOfMemoryError as error:
                    host = next(places, None)
                    if host is None or self.ranks.count > 1:  # others wait for sums on the GPU
                        raise
                    here = host
                    names, said = ", ".join(x.name for x in wanted.values()), str(error)
                    log.warning("%s: solved on the host, for want of GPU memory (%s)", names, said)

    def _own(
        self, linears: Sequence[Linear], task: LinearTask, *, batched: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weight to prune, and what was gathered of the linears alone; of one, or of each."""
        weight, reads = self.weights_of(linears), {STORED} & task.method.score.requires
        every = [
            {**self.group.own(x), **self.stored(x), **dict.fromkeys(reads, x.weight)}
            for x in linears
        ]
        if not batched:
            return weight[0], every[0]
        return weight, {name: torch.stack([x[name] for x in every]) for name in every[0]}


def _recorded(layer: OpenLayer, solved: Solved) -> list[LinearRecord]:
    """Take over the new weights of linears, and check them. Return the record of each."""
    linears, solution = solved.linears, solved.solution
    task, count = layer.tasks[linears[0].name], len(linears)
    # before `assign`, which overwrites what `weight` may be a view of
    lost = None
    if solution.error is None:
        lost = lost_energy(solved.weight, solution.mask, solved.statistics)
    for linear, found in zip(linears, solution.each(), strict=True):
        linear.assign(found.weight)
        if found.shift is not None:
            linear.shift(found.shift)
        if found.blocks is not None:
            grid: Any = task.method.solver.grid
            kept = StoredBlocks(grid.type, found.blocks.cpu(), linear.transposed)
            layer.blocks[f"{linear.name}.weight"] = kept
    zeros = counted_zeros(linears, task, solution.mask)
    measured = zeros, _numbers(solution.error, count), _numbers(lost, count), solved.tokens
    return [
        LinearRecord(
            name=linear.name,
            shape=linear.shape,
            asked=task.sparsity,
            pruned=pruned,
            zeros=zeros,
            error=error,
            lost=share,
            seconds=solved.seconds / count,
            tokens=tokens if layer.sources else None,
        )
        for linear, (pruned, zeros), error, share, tokens in zip(linears, *measured, strict=True)
    ]


def _numbers(found: Tensor | float | None, count: int) -> list[float | None]:
    """What was measured of each linear, with one wait; None where there is no number."""
    if found is None:
        return [None] * count
    numbers: list[float] = torch.as_tensor(found).reshape(-1).tolist()
    return [None if math.isnan(number) else number for number in numbers]


def lost_energy(weight: Weight, mask: Mask, statistics: Statistics) -> Tensor | None:
    """The share of its output's energy that a linear loses; None without statistics of the inputs.

    lost = Σ over pruned w² ‖X_j‖² / Σ over all w² ‖X_j‖²

    It is NaN where all energy is 0. A batch of linears has a share for each.
    """
    if "column_norm" in statistics:
        power = statistics["column_norm"].square()
    elif "gram" in statistics:
        power = statistics["gram"].diagonal(dim1=-2, dim2=-1)
    else:
        return None
    energy = weight.detach().float().square() * power[..., None, :]
    lost, total = (x.flatten(-2).sum(-1).double() for x in (energy.masked_fill(mask, 0.0), energy))
    return lost / total


def _exchanged(
    linears: Sequence[Linear], owned: Mapping[str, int], own: Sequence[LinearRecord], ranks: Ranks
) -> list[LinearRecord]:
    """Give every process the pruned linears of the others. Return the records of all.

    What one process sends is joined, up to `_SENT_BYTES` and one parameter at a time.

    Args:
        linears: the linears that the processes have pruned.
        owned: the process that has pruned each; all others were pruned by all together.
        own: the records of this process.
        ranks: the processes.
    """
    joined, sizes = dict[tuple[int, object, int], list[Tensor]](), Counter[object]()
    for linear in (x for x in linears if x.name in owned):
        owner = owned[linear.name]
        for parameter in linear.module.parameters(recurse=False):
            place = sizes[owner, parameter.dtype] // _SENT_BYTES
            joined.setdefault((owner, parameter.dtype, place), []).append(parameter.detach())
            sizes[owner, parameter.dtype] += parameter.nbytes
    for (owner, *_), values in joined.items():
        whole = torch.cat([x.flatten() for x in values])
        ranks.share(whole, owner)
        for value, sent in zip(values, whole.split([x.numel() for x in values]), strict=True):
            value.copy_(sent.view_as(value))
    gathered = ranks.gather([record.to_json() for record in own])
    by_name = {entry["name"]: entry for entries in reversed(gathered) for entry in entries}
    return [LinearRecord.model_validate(by_name[linear.name]) for linear in linears]


def _exchange_blocks(layer: OpenLayer, owned: Mapping[str, int]) -> None:
    """Give every process the blocks of matrices that others have rounded to types of llama.cpp.

    Args:
        layer: the layer.
        owned: the process that has rounded each linear, by its name.
    """
    for linear in (x for x in layer.linears.values() if x.name in owned):
        grid = layer.tasks[linear.name].method.solver.grid
        if isinstance(grid, BlockGrid):
            rows, columns = linear.shape
            packed = torch.empty(rows, grid.row_bytes(columns), dtype=torch.uint8)
            empty = StoredBlocks(grid.type, packed, linear.transposed)
            mine = layer.blocks.setdefault(f"{linear.name}.weight", empty)
            layer.ranks.share(mine.packed, owned[linear.name])


def arrivals_of(layer: OpenLayer) -> Arrivals:
    """The groups of a layer, in the order of the settings.

    With tuning, the windows of the dense model pass first, while the layer is dense.
    """
    if layer.settings.tunes:
        dense = layer.inputs(dense=True)
        dense.pass_through(layer.module)
        dense.states.advance(layer.index + 1)
    if not layer.sources:
        return weights_alone(layer)
    return group_by_group(layer) if layer.settings.sequential == "group" else whole_layer(layer)


def weights_alone(layer: OpenLayer) -> Arrivals:
    """All linears, each for itself: their weights and what is stored is all that is needed."""
    yield [GroupStatistics({}, [[linear]], layer.device) for linear in layer.pruned]
    if layer.passes_on:
        layer.inputs().pass_through(layer.module)


def whole_layer(layer: OpenLayer) -> Arrivals:
    """All groups, as the papers do: after one pass through the dense layer."""
    inputs, gathered = layer.inputs(), Gathered(layer.sources, layer.batches, layer.device)
    forwards = [
        partial(inputs.pass_one, layer.module, batch, stores=False) for batch in inputs.batches
    ]
    by_layer(layer.batches, forwards, gathered.add)
    yield gathered.all_taken()
    if layer.passes_on:
        inputs.pass_through(layer.module)


def group_by_group(layer: OpenLayer) -> Arrivals:
    """Each group, when the forwards of all micro-batches have reached it, in one pass."""
    gathered = Gathered(layer.sources, layer.batches, layer.device)
    halted = HaltedLayer(layer.inputs(), layer.module, layer.batches, stores=layer.passes_on)

    def gather(batch: int, number: int, arrival: Arrival, dense: Tensor | None) -> None:
        gathered.add(number, arrival)

    with closing(halted):
        for number in layer.agreed(by_group(halted, gather, outputs_needed=layer.passes_on)):
            yield [gathered.taken(number)]


class Gathered(dict[int, GroupStatistics]):
    """The statistics of a layer's batches, by number. Each begins when its first input arrives.

    Not earlier, because a layer of many experts has many grams.

    Args:
        sources: sources of the statistics, by their names.
        batches: linears of the layer, by what arrives together.
        device: device of the sums.
        cross_of: makes the cross gram of a batch that has another target than its own outputs.
    """

    def __init__(
        self,
        sources: Sources,
        batches: Sequence[GroupBatch],
        device: torch.device,
        cross_of: Callable[[GroupBatch], Callable[..., CrossGram] | None] = lambda batch: None,
    ) -> None:
        super().__init__()
        self.sources, self.batches, self.device, self.cross_of = sources, batches, device, cross_of

    def __missing__(self, number: int) -> GroupStatistics:
        batch = self.batches[number]
        cross, stacked = self.cross_of(batch), batch.stage is not None
        self[number] = GroupStatistics(
            self.sources, batch.groups, self.device, cross, batch=stacked
        )
        return self[number]

    def add(self, number: int, arrival: Arrival) -> None:
        """Add what arrives at a batch in one micro-batch."""
        with exact_matmuls(self.device):  # within a forward, which may be in bfloat16
            self[number].update(arrival.inputs, counts=arrival.counts)

    def taken(self, number: int) -> GroupStatistics:
        """Take the statistics of a batch out, also of one that no input has reached."""
        found = self[number]
        del self[number]
        return found

    def all_taken(self) -> list[GroupStatistics]:
        """Take the statistics of all batches out."""
        return [self.taken(number) for number in range(len(self.batches))]
