"""How calibration passes through one decoder layer.

There are two orders. Both have one decoder layer in memory, and one micro-batch runs at a time:

* `by_layer`, as in the papers. A first pass with dense weights gathers the statistics of every
  linear of the layer. All linears are pruned. A second pass with pruned weights makes the inputs of
  the next layer.
* `by_group`, the default, needs one pass. The forward of every micro-batch halts at the first group
  of linears that it reaches. When all have arrived, the statistics of this group are complete. The
  group is pruned, and the forwards continue with pruned weights to the next group. So later groups
  of the layer see the inputs that they will see in the pruned model, for half the work. Experts do
  not see each other's outputs, so their groups arrive together, as one batch.

A forward that halts in the middle of a model's `forward()` needs its own stack. Greenlets give it
one within a single thread. So grad mode, thread pools and the order of all operations are the
same as in a plain call.

A halted forward holds tensors in its Python frames, where they have no name. `LiveTensors` watches
every operation, so it knows the storages that are still alive. The memory plan counts their bytes
in a rehearsal on the meta device. A run with little memory on a CPU moves them to disk until the
forward continues (`ActivationOffload`). Such a storage is resized to zero bytes in place, as in
sharded training, so every view of it is valid again afterwards. On a GPU a forward with little
memory ends instead, and begins again up to the next batch: its arithmetic takes less time than to
move its tensors over the bus.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.engine.stream.calibration_stream import LayerInputs
from secateur.engine.stream.calls import call_layer, input_mark
from secateur.errors import ArchitectureError
from secateur.models.architecture import Linear
from secateur.models.checkpoint import read_all, write_all
from secateur.models.experts import ExpertStage, OpenExperts, Sent

Forward = Callable[[], object]
LinearGroups = Sequence[Sequence[Linear]]


class GroupBatch(NamedTuple):
    """Groups of linears whose inputs arrive together.

    Attributes:
        groups: one group of linears that share an input, or the same group of several experts;
            none where forwards do not halt.
        experts: the numbers of these experts; not read outside experts.
        stage: where experts get the inputs; None for a group outside experts.
    """

    groups: list[Sequence[Linear]]
    experts: Sequence[int] = ()
    stage: ExpertStage | None = None


def batches_of(layer: nn.Module, groups: LinearGroups) -> list[GroupBatch]:
    """Sort the groups of a layer by what arrives together."""
    places = {
        id(getattr(expert, name)): (stage, number, number // experts.at_once)
        for experts in layer.modules()
        if isinstance(experts, OpenExperts)
        for stage in experts.stages
        for number, expert in enumerate(experts)
        for name in stage.names
    }
    found: dict[Hashable, tuple[list[Sequence[Linear]], list[int], ExpertStage | None]] = {}
    for group in groups:
        stage, number, part = places.get(id(group[0].module), (None, 0, id(group)))
        together, numbers, _ = found.setdefault((stage, part), ([], [], stage))
        together.append(group)
        numbers.append(number)
    return [GroupBatch(*each) for each in found.values()]


def put_together(model: nn.Module, at_once: int) -> int:
    """Let experts get their inputs together, so many at once. Return how many there are of a layer.

    More do not help than there are.
    """
    opened = [m for m in model.modules() if isinstance(m, OpenExperts)]
    for experts in opened:
        experts.at_once = at_once
    return max(map(len, opened), default=1)


class Arrival(NamedTuple):
    """What arrives at a batch of groups in one forward.

    Attributes:
        x: the input of a group, or what its stage gets.
        sent: the tokens that experts receive; None for a group outside experts.
        stage: of the experts.
    """

    x: Tensor
    sent: Sent | None = None
    stage: ExpertStage | None = None

    @property
    def inputs(self) -> Tensor:
        """The inputs, of experts one after the other. A halted forward does not hold them."""
        if self.stage is None or self.sent is None:
            return self.x
        return self.stage.inputs(self.x, self.sent)

    @property
    def counts(self) -> list[int] | None:
        """The number of inputs of each expert."""
        return None if self.sent is None else self.sent.counts


Gather = Callable[[int, Arrival], None]


def by_layer(batches: Sequence[GroupBatch], forwards: Sequence[Forward], gather: Gather) -> None:
    """Gather the inputs of every batch in one pass; weights do not change.

    Args:
        batches: the linears of the layer, by what arrives together.
        forwards: one call per micro-batch.
        gather: called with a batch's index and what arrives, once per micro-batch.
    """
    inputs = _SharedInputs(batches, gather)
    try:
        for forward in forwards:
            inputs.seen = {}
            forward()
    finally:
        inputs.remove()


class _SharedInputs:
    """Hooks that report the inputs of each batch of groups, once in each forward.

    Args:
        batches: the linears of the layer, by what arrives together.
        arrived: called with the batch's index and what arrives.
    """

    def __init__(self, batches: Sequence[GroupBatch], arrived: Gather) -> None:
        self.arrived = arrived
        self.seen: dict[int, Hashable] = {}
        self.handles = [
            batch.stage.register_forward_pre_hook(partial(self._experts, index, batch.experts))
            for index, batch in enumerate(batches)
            if batch.stage is not None
        ]
        self.handles += [
            linear.module.register_forward_pre_hook(self._hook(index, linear))
            for index, batch in enumerate(batches)
            if batch.stage is None
            for group in batch.groups
            for linear in group
        ]

    def _experts(
        self, index: int, experts: Sequence[int], stage: ExpertStage, args: tuple[Tensor, Sent]
    ) -> None:
        """Report the inputs of the experts of a batch."""
        if experts[0] in args[1].experts:
            self.seen[index] = ()
            self.arrived(index, Arrival(*stage.only(*args, experts), stage))

    def _hook(self, group: int, linear: Linear) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            mark = input_mark(x)  # linears of a group get the same memory, not equal numbers
            if group not in self.seen:
                self.seen[group] = mark
                self.arrived(group, Arrival(x))
            elif self.seen[group] != mark:
                raise ArchitectureError(
                    "this linear does not receive the input its group shares",
                    where=linear.name,
                    remedy="correct `groups` of its family in secateur/models/families",
                )

        return before

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()


class HaltingForwards:
    """The forwards of all micro-batches through one layer, halted at each batch they reach.

    Attributes:
        current: the forward that runs, or ran last.

    Args:
        batches: the linears of the layer, by what arrives together.
        forwards: one call per micro-batch.
        offload: takes the tensors of halted forwards; None leaves them in memory.
        matmuls: returns a context for the forwards, not for the work between them.
        repeats: whether a forward ends where it halts, and is repeated up to the next batch.
    """

    def __init__(
        self,
        batches: Sequence[GroupBatch],
        forwards: Sequence[Forward],
        offload: ActivationOffload | None,
        matmuls: Callable[[], AbstractContextManager[object]] = nullcontext,
        *,
        repeats: bool = False,
    ) -> None:
        self.matmuls, self.forwards, self.repeats = matmuls, forwards, repeats
        self.hub = hub = getcurrent()
        self.offload = offload
        self.batches = batches
        self.hooks = _SharedInputs(batches, lambda index, x: hub.switch((index, x)))
        self.seen: list[dict[int, Hashable]] = [{} for _ in forwards]
        self.running = [greenlet(forward, parent=hub) for forward in forwards]
        self.passed = [0 for _ in forwards]  # batches before the next one, in a repeated forward
        self.ahead: dict[int, tuple[int, Arrival] | None] = {}
        self.current = 0

    def advance(self, index: int) -> tuple[int, Arrival] | None:
        """Run one forward up to the next batch. Return its index and inputs, or None at the end."""
        watch: AbstractContextManager[object] = nullcontext()
        self.current, self.hooks.seen = index, self.seen[index]
        if self.offload:
            self.offload.restore(index)
            watch = self.offload.live
        if index in self.ahead:  # after `restore`: its tensors are in memory again
            return self.ahead.pop(index)
        with watch, self.matmuls():
            for _ in range(self.passed[index]):
                self.running[index].switch()
            arrival: tuple[int, Arrival] = self.running[index].switch()
        return None if self.running[index].dead else arrival

    def look_ahead(self, index: int) -> None:
        """Run one forward up to the next batch now. The next `advance` returns this batch."""
        self.ahead[index] = self.advance(index)

    def halt(self, index: int) -> None:
        """Move the tensors of a forward away after its input was used, or forget them."""
        if self.offload:
            self.offload.store(index)
        if self.repeats:
            self.running[index].throw(GreenletExit)
            self.running[index] = greenlet(self.forwards[index], parent=self.hub)
            self.seen[index] = {}
            self.passed[index] += 1

    def finish(self) -> None:
        """Run all forwards to their ends."""
        for index, running in enumerate(self.running):
            while not running.dead:
                if self.advance(index) is not None:
                    self.halt(index)

    def close(self) -> None:
        """Stop the forwards that are still halted."""
        self.hooks.remove()
        self.ahead = {}
        for running in self.running:
            if not running.dead:  # unwinds its stack, so its tensors are freed
                running.throw(GreenletExit)


def by_group(
    halting: HaltingForwards,
    gather: Callable[[int, int, Arrival, Tensor | None], None],
    dense: HaltingForwards | None = None,
    *,
    outputs_needed: bool = True,
) -> Iterator[int]:
    """Yield each batch of groups as soon as all micro-batches have reached it, in one pass.

    The caller prunes the groups; then the forwards continue with the pruned weights.

    Args:
        halting: the forwards of the layer that is pruned.
        gather: called with a forward's index, a batch's index, what arrives there, and the input of
            the same group in the dense layer (None where that does not halt).
        dense: the forwards of the dense layer, in step. They halt at the same batches, except empty
            ones, and are still halted at the end.
        outputs_needed: False ends the forwards after the last batch.

    Raises:
        ArchitectureError: the micro-batches do not reach the batches in the same order.
    """

    def advance(index: int) -> set[int]:
        """Run one forward to its next batch; no batch at the end."""
        arrival = halting.advance(index)
        if arrival is None:
            return set()
        batch, x = arrival
        beside = dense if dense and dense.batches[batch].groups else None
        twin = beside.advance(index) if beside else None
        gather(index, batch, x, twin[1].x if twin else None)
        reached = {batch} if twin is None else {batch, twin[0]}
        del arrival, x, twin  # so that their tensors can move away
        halting.halt(index)
        if beside:
            beside.halt(index)
        return reached

    left, halted = len(halting.batches), list(range(len(halting.running)))
    while halted and (left or outputs_needed):
        reached = {index: advance(index) for index in halted}
        # -1 stands for a forward that has ended
        together = {batch for batches in reached.values() for batch in batches or {-1}}
        if len(together) > 1:
            raise ArchitectureError(
                "micro-batches do not pass the linears of a layer in the same order",
                where=halting.batches[max(together)].groups[0][0].name,
                remedy="run with --sequential layer",
            )
        halted = [index for index, batches in reached.items() if batches]
        if halted:
            yield together.pop()
            left -= 1


class HaltedLayer(HaltingForwards):
    """One model's forwards through one decoder layer, halted at each group of linears.

    Args:
        inputs: the hidden states of the model.
        layer: the layer with its weights.
        batches: linears of the layer, by what arrives together; the forwards do not halt at an
            empty batch.
        writers: modules whose output is added to the residual stream, if the sums are needed:
            linears, or the norms after them.
        stores: whether the outputs of the layer are stored.
    """

    def __init__(
        self,
        inputs: LayerInputs,
        layer: nn.Module,
        batches: Sequence[GroupBatch],
        writers: Sequence[nn.Module] = (),
        *,
        stores: bool = True,
    ) -> None:
        self.inputs, self.layer, self.stores = inputs, layer, stores
        forwards = [partial(self._forward, batch) for batch in inputs.batches]
        stream = inputs.calibration
        stays = stream.in_memory and stream.target.device == stream.home
        repeats = not stays and stream.target.device.type != "cpu"
        offload = None if stays or repeats else self._offload()
        super().__init__(batches, forwards, offload, inputs.matmuls, repeats=repeats)
        # Summed inside the forwards, so the sums move away with the forwards' other tensors.
        self.sums: dict[int, Tensor] = {}
        self.handles = [x.register_forward_hook(self._add) for x in writers]

    def _offload(self) -> ActivationOffload:
        """What takes the tensors of halted forwards."""
        inputs, stream = self.inputs, self.inputs.calibration
        sizes = {batch.stop - batch.start for batch in stream.batches()}
        shared = stream.outer.shared_tensors(inputs.index, sizes)
        permanent = [*self.layer.parameters(), *self.layer.buffers(), *shared]
        return ActivationOffload(permanent, inputs.states.folder, stream.own.start)

    def _forward(self, batch: slice) -> None:
        hidden = self.inputs.read(batch)
        self.sums.pop(self.current, None)
        if self.offload is not None:
            self.offload.live.note(hidden)
        outputs = call_layer(self.layer, hidden, self.inputs.call(batch))
        if self.stores:
            self.inputs.write(batch, outputs)
        self.inputs.step()

    def _add(self, module: nn.Module, args: Any, out: Tensor) -> None:
        """Add the output of a writer to the sum of the running forward."""
        before = self.sums.get(self.current)
        self.sums[self.current] = out if before is None else before + out

    def before(self, index: int) -> Tensor:
        """The residual stream before the layer, of micro-batch `index`."""
        return self.inputs.read(self.inputs.batches[index])

    def added(self, index: int) -> Tensor | float:
        """The sum of the writers' outputs so far. Use it only while the forward is in memory."""
        return self.sums.get(index, 0.0)

    def close(self) -> None:
        """Stop the halted forwards, remove the hooks, and release the sums."""
        super().close()
        for handle in self.handles:
            handle.remove()
        self.sums = {}


class LiveTensors(TorchDispatchMode):
    """Watches operations, and tracks which of their result storages are alive.

    Args:
        permanent: tensors whose storages are never counted (weights, shared arguments).
        find_peak: update `peak_bytes` after every operation, which costs a count each time.
    """

    def __init__(self, permanent: Iterable[Tensor], *, find_peak: bool = False) -> None:
        super().__init__()
        self.find_peak = find_peak
        self.permanent = {t.untyped_storage()._cdata for t in permanent}  # addresses of storages
        self.current: dict[int, StorageWeakRef] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and note the storages of its results."""
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.note(value)
        if self.find_peak:
            self.peak_bytes = max(self.peak_bytes, self.live_bytes())
        return out

    def note(self, tensor: Tensor) -> None:
        """Count this tensor's storage from now on."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.permanent:
            self.current[storage._cdata] = StorageWeakRef(storage)

    def live(self) -> list[torch.UntypedStorage]:
        """The storages that are still alive."""
        alive = {key: ref for key, ref in self.current.items() if not ref.expired()}
        self.current = alive
        # None if the storage was freed after `expired` looked
        storages = [torch.UntypedStorage._new_with_weak_ptr(r.cdata) for r in alive.values()]
        return [s for s in storages if s is not None]

    def live_bytes(self) -> int:
        """The size of all storages that are still alive."""
        return sum(storage.nbytes() for storage in self.live())


class ActivationOffload:
    """Moves the tensors of halted forwards to disk, and back.

    Args:
        permanent: tensors that do not move: weights, shared arguments.
        folder: takes the tensors.
        first: number of the first forward among those of all processes that use the folder.
    """

    def __init__(self, permanent: Iterable[Tensor], folder: Path, first: int = 0) -> None:
        self.live, self.folder, self.first = LiveTensors(permanent), folder, first
        self.alive: dict[int, dict[int, StorageWeakRef]] = {}
        self.moved: dict[int, list[tuple[torch.UntypedStorage, int]]] = {}

    def store(self, forward: int) -> None:
        """Free the memory of all tensors that the halted forward keeps alive."""
        storages = [x for x in self.live.live() if x.nbytes()]  # 0: moved already
        self.alive[forward] = self.live.current
        self.moved[forward] = [(storage, storage.nbytes()) for storage in storages]
        with self.file(forward).open("wb", buffering=0) as stream:
            for storage in storages:
                write_all(stream, _content(storage))
        for storage in storages:
            storage.resize_(0)  # in place, so that every view of it stays valid

    def restore(self, forward: int) -> None:
        """Fill the storages of a halted forward again, and resume watching it."""
        self.live.current = self.alive.get(forward, {})
        if forward not in self.moved:
            return
        with self.file(forward).open("rb", buffering=0) as stream:
            for storage, size in self.moved.pop(forward):
                storage.resize_(size)
                read_all(stream, _content(storage))
        self.file(forward).unlink()

    def file(self, forward: int) -> Path:
        """The file of one halted forward."""
        return self.folder / f"parked-{self.first + forward:05d}.bin"


def _content(storage: torch.UntypedStorage) -> Tensor:
    """The bytes of a storage as a tensor that shares its memory."""
    return torch.empty(0, dtype=torch.uint8).set_(storage)
