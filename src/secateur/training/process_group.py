"""The processes of a training: one, or several that `torchrun` or `accelerate launch` has started.

One process uses plain torch. Several processes use FSDP2 (torch's `fully_shard`). Each process
holds a part of every weight, gradient, moment and mask, and reads its share of every step's
windows. Of a checkpoint each process reads its part, and none loads all of it.

Where a GPU has too little memory, all this stays in the memory of the host, and the optimizer works
there (FSDP2's `CPUOffloadPolicy`). The GPU gets one decoder layer at a time. A single process does
this too; it is then a group of one.

Matrices of decoder layers are gathered in the dtype of their products. So a matrix is rounded
before it is sent instead of afterwards, and the GPU keeps no rounded copies. Norms are not rounded:
a step changes them by less than bfloat16 can tell. Gradients are summed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secateur.errors import ArchitectureError
from secateur.models.architecture import describe
from secateur.models.checkpoint import CheckpointReader
from secateur.models.opening import load_whole
from secateur.models.skeleton import StoredModel, aliases, build_skeleton
from secateur.parallel.processes import WORKING, joined
from secateur.parallel.ranks import Ranks
from secateur.training.masks import is_shared


class ProcessGroup(Ranks):
    """The processes that train together. They are `Ranks` that can divide a model.

    Args:
        device: device of the model in this process.
        rank: the number of this process.
        count: the number of processes.
        here: the number of processes on this machine.
        place: the number of this process on its machine.
        plain: the group for plain data; see `Ranks`.
        on_host: whether what learns is in the memory of the host.
    """

    def __init__(
        self,
        device: torch.device,
        rank: int = 0,
        count: int = 1,
        here: int = 1,
        place: int = 0,
        plain: dist.ProcessGroup | None = None,
        on_host: bool = False,
    ) -> None:
        super().__init__(rank, count, here, place, plain)
        self.device, self.on_host = device, on_host
        self.within: Ranks | None = None

    @property
    def divides(self) -> bool:
        """Whether FSDP2 holds the parameters of a model that learns."""
        return self.count > 1 or self.on_host

    def holding(self, on_host: bool) -> ProcessGroup:
        """The same processes, with what learns on the host or on the device."""
        other = copy(self)
        other.on_host = on_host
        return other

    @classmethod
    def launched(cls, device: torch.device) -> ProcessGroup:
        """The processes that were launched together with this one, or this one alone.

        Args:
            device: device of the model, if there is only one process.
        """
        ranks = joined(device.type)
        if ranks.count > 1:
            ranks.plain = _plain_group()  # the caller may have made the group, without gloo
        return cls.of(ranks, device)

    @classmethod
    def of(cls, ranks: Ranks, device: torch.device) -> ProcessGroup:
        """Processes of a run that now divide a model; a group stays as it is.

        Args:
            ranks: the processes.
            device: device of the recipe. Each of several processes has a GPU of its own.
        """
        if isinstance(ranks, ProcessGroup):
            return ranks
        if ranks.count > 1 and device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        group = cls(device, ranks.rank, ranks.count, ranks.here, ranks.place, ranks.plain)
        group.within, group.in_once = ranks, ranks.in_once
        return group

    def enter(self, name: str, tensor: Tensor | None = None) -> None:
        """Begin a call that all processes make."""
        self.within.enter(name, tensor) if self.within else super().enter(name, tensor)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context around an operation in which all processes take part."""
        with self.within.together() if self.within else super().together():
            yield

    @contextmanager
    def connected(self) -> Iterator[None]:
        """A context in which a model can be divided. A single process gets a group of its own."""
        alone = self.on_host and not dist.is_initialized()
        if alone:
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            if alone:
                dist.destroy_process_group()

    def shard(
        self,
        model: Any,
        fill: Callable[[nn.Module], None] = lambda unit: None,
        *,
        gathered: torch.dtype | None = None,
        learns: bool = True,
    ) -> None:
        """Divide a model among the processes, in place. A single process keeps it whole.

        The units are divided one at a time. So a process holds at most one whole unit and its parts
        of the earlier ones. FSDP2 gathers a unit again when the model runs it.

        Args:
            model: a causal language model, or its skeleton. A sharded model stays unchanged. New
                parameters replace the old ones, which end empty.
            fill: called with each unit before it is divided; it may load its weights.
            gathered: dtype of gathered matrices of decoder layers; None for that of the parameters.
            learns: whether the model learns. Of one that does not, such as a teacher, embeddings
                and head stay gathered after their first use, and nothing is on the host.

        Raises:
            ArchitectureError: two decoder layers share a parameter.
        """
        if not self.divides:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if isinstance(model, FSDPModule):
            self.reshard(model)
            return
        # innermost units first, so the last unit, the model, holds what is in no other
        mesh, chosen = init_device_mesh(self.device.type, (self.count,)), _units(model, learns)
        policies, rounded = self._policies(gathered, learns), describe(model).layers(model)
        _refuse_shared(chosen)
        for unit in chosen:
            fill(unit)
            before = [p for p in unit.parameters() if not is_shared(p)]
            rounds = gathered is not None and unit in rounded
            for part in not_rounded(unit) if rounds else ():
                fully_shard(part, mesh=mesh, **policies[False])
            fully_shard(unit, mesh=mesh, **policies[rounds])
            if rounds:
                # its inputs are in float32, also where nobody else has entered autocast
                unit.forward = torch.autocast(self.device.type, gathered)(unit.forward)
            for parameter in before:  # its part is copied; torch frees the rest too late
                parameter.data = parameter.data.new_empty(0)

    def _policies(self, gathered: torch.dtype | None, learns: bool) -> tuple[dict[str, Any], ...]:
        """The arguments of `fully_shard` for a unit: outside the decoder layers, and for a layer.

        The residual stream stays in float32: embeddings and head are gathered so, and a layer's
        inputs are not cast.
        """
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

        outside: dict[str, Any] = {}
        if self.on_host and learns:
            pinned = self.device.type == "cuda"  # the GPU copies it without the processor
            outside["offload_policy"] = CPUOffloadPolicy(pin_memory=pinned)
        rounding = MixedPrecisionPolicy(
            gathered, reduce_dtype=torch.float32 if learns else None, cast_forward_inputs=False
        )
        return outside, {**outside, "mp_policy": rounding}

    def reshard(self, model: Any) -> None:
        """Free the parameters that the last forward gathered outside the decoder layers.

        Without a backward, torch keeps them gathered.
        """
        if self.divides:
            model.reshard()

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each number over all processes."""
        return [sum(each) for each in zip(*self.gather(list(values)), strict=True)]


@cache
def _plain_group() -> dist.ProcessGroup:
    """A group with gloo. One process may write a large model while the others wait."""
    return dist.new_group(backend="gloo", timeout=WORKING)


def _units(model: Any, learns: bool) -> list[nn.Module]:
    """The units of a model that FSDP2 gathers one at a time: decoder layers, and the rest."""
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    outside = [inputs, head] if learns and isinstance(head, nn.Linear) else []
    if outside and inputs.weight is head.weight:
        outside = []
    return [*describe(model).layers(model), *outside, model]


def not_rounded(layer: nn.Module) -> list[nn.Module]:
    """The modules of a layer that are gathered as they are, innermost first.

    Autocast does not round their parameters: they have vectors only, as norms do, or parameters
    beside those of their modules, as state spaces do. These may also read the others by themselves.
    """
    found = []
    for module in layer.modules():
        own = list(module.parameters(recurse=False))
        within = len(list(module.parameters())) > len(own)
        if own and module is not layer and (within or all(p.ndim < 2 for p in own)):
            found.append(module)
    return found[::-1]


def _refuse_shared(chosen: Sequence[nn.Module]) -> None:
    """Refuse units that share a parameter. The last unit holds all, and is not checked."""
    seen: set[int] = set()
    for unit in chosen[:-1]:
        own = {id(p): name for name, p in unit.named_parameters()}
        common = [own[key] for key in own.keys() & seen]
        if common:
            raise ArchitectureError(
                f"decoder layers share {len(common)} parameters, so they cannot be divided among "
                "several processes",
                where=min(common),
                remedy="start the command without torchrun or accelerate launch",
            )
        seen |= own.keys()


@contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """Make the decoder layers keep only their inputs; the backward runs them again."""

    def run(forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **options)
        return checkpoint(forward, *args, use_reentrant=False, **options)

    layers: list[nn.Module] = list(describe(model).layers(model))
    before = [layer.__dict__.get("forward") for layer in layers]  # what `shard` has put there
    # The forward alone is replaced, so hooks of the call (FSDP2's gathering) run as before.
    for layer in layers:
        layer.forward = partial(run, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def load(
    folder: Path,
    processes: ProcessGroup,
    *,
    dtype: torch.dtype | None = None,
    gathered: torch.dtype | None = None,
    learns: bool = True,
) -> Any:
    """Load a transformers model in eval mode, and divide it if the processes do that.

    A single process loads the whole model. Several processes read the decoder layers one at a time,
    and each keeps its part. So a process holds at most its part of the model and one layer.

    Args:
        folder: the checkpoint.
        processes: the processes.
        dtype: dtype of the parameters; None keeps the stored one.
        gathered: see `ProcessGroup.shard`.
        learns: likewise.

    Raises:
        CheckpointError: a parameter is not stored.
    """
    if processes.count == 1 and not (learns and processes.on_host):
        return load_whole(folder, processes.device, dtype=dtype)
    model = build_skeleton(folder, opened=False)
    stored = StoredModel(model, CheckpointReader(folder))
    names = {group[0]: group for group in aliases(model)}

    def fill(unit: nn.Module) -> None:
        # a parameter of an earlier unit is no longer on meta, so each is read once
        own = {id(p) for p in unit.parameters() if p.is_meta}
        for name, group in names.items():
            if id(model.get_parameter(name)) not in own:
                continue
            value = stored.read(name).to(processes.device, dtype)
            parameter = nn.Parameter(value, requires_grad=value.is_floating_point())
            for alias in group:
                owner, _, leaf = alias.rpartition(".")
                model.get_submodule(owner)._parameters[leaf] = parameter

    for name, buffer in model.named_buffers():
        if name in stored.group_of:
            buffer.copy_(stored.read(name))
    processes.shard(model, fill, gathered=gathered, learns=learns)
    return model
